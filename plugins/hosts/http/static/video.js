// A video: its player, and the timeline of its parts under it.

import { make, roving } from "./dom.js";
import { clock } from "./numbers.js";
import { Thumbnails } from "./thumbnails.js";

/** @typedef {import("./captions.js").Segment} Segment */

const LEAST = 12; // pixels of a part; a video of many short ones is scrolled
const LONGEST = 8; // how many times as wide as the page the timeline may become
const INTO = 0.001; // seconds behind a cut, so that rounding never shows the frame before it

export class VideoPlayer {
  /** @type {Segment[]} */
  #parts = [];
  /** @type {((time: number) => void)[]} */
  #watchers = [];
  #length = 0;
  #time = 0;

  /** @param {import("./media.js").Medium} medium */
  constructor(medium) {
    this.name = medium.name;
    this.player = make("video", {
      src: medium.url,
      controls: true,
      playsinline: true,
      preload: "metadata",
      "aria-label": medium.name,
    });
    this.#strip = make("div", { class: "strip" });
    this.#track = make(
      "div",
      { class: "track", role: "group", "aria-label": "Timeline of the video", hidden: true },
      this.#strip,
    );
    this.#note = make("p", { class: "note", hidden: true });
    this.element = make("div", { class: "video" }, this.player, this.#track, this.#note);
    this.#thumbnails = new Thumbnails(medium.url);
    this.player.addEventListener("error", () => this.#cannotShow());
    this.player.addEventListener("loadedmetadata", () => {
      if (!this.player.videoWidth) this.#cannotShow();
      this.#layOut();
    });
    this.player.addEventListener("timeupdate", () => this.#at(this.player.currentTime));
    this.player.addEventListener("seeking", () => this.#at(this.player.currentTime));
    roving(this.#strip);
  }

  #strip;
  #track;
  #note;
  #thumbnails;
  #blind = false;

  close() {
    this.player.removeAttribute("src");
    this.player.load();
    this.#thumbnails.close();
  }

  /** The timeline, empty again. */
  clear() {
    for (const watcher of this.#watchers) watcher(-1); // nothing of theirs is shown any more
    this.#parts = [];
    this.#watchers = [];
    this.#strip.replaceChildren();
    this.#track.hidden = true;
  }

  /** Another part is described. @param {Segment} part */
  add(part) {
    this.#parts.push(part);
    const number = this.#parts.length;
    const button = make(
      "button",
      {
        type: "button",
        class: "part",
        tabindex: number === 1 ? 0 : -1,
        title: part.text,
        "aria-label": `Part ${number}, ${clock(part.start)} to ${clock(part.end)}: ${part.text}`,
        click: () => this.show(part.start),
      },
      make("span", { class: "number" }, `${number}`),
    );
    this.#strip.append(button);
    this.#track.hidden = false;
    this.#layOut();
    this.#at(this.#time);
    this.#thumbnails.at((part.start + part.end) / 2).then(
      (image) => button.prepend(image),
      () => {}, // it stays a plain box; the player says whether the video can be shown at all
    );
  }

  /** Goes to a time. @param {number} time in seconds */
  show(time) {
    if (!this.#blind) this.player.currentTime = time + INTO;
    this.#at(time + INTO);
  }

  /** How long the video is, where it is known from elsewhere. @param {number} seconds */
  lasts(seconds) {
    this.#length = seconds;
    this.#layOut();
  }

  /** Calls back with the time that is shown, now and whenever it changes.
   * @param {(time: number) => void} watcher */
  watch(watcher) {
    this.#watchers.push(watcher);
    watcher(this.#time);
  }

  /** @param {number} time */
  #at(time) {
    this.#time = time;
    mark(this.#strip.children, this.#parts, time);
    for (const watcher of this.#watchers) watcher(time);
  }

  /** Every part as wide as it is long; what is not described yet stays free. */
  #layOut() {
    const parts = this.#parts;
    if (!parts.length) return;
    const known = this.#length || (this.#blind ? 0 : this.player.duration) || 0;
    const length = Math.max(Number.isFinite(known) ? known : 0, parts[parts.length - 1].end);
    const shortest = Math.min(...parts.map(({ start, end }) => end - start));
    const room = this.#track.clientWidth || 1;
    const times = Math.min(LONGEST, Math.max(1, (LEAST * length) / (shortest * room)));
    this.#strip.style.width = `${100 * times}%`;
    parts.forEach(({ start, end }, place) => {
      const { style } = /** @type {HTMLElement} */ (this.#strip.children[place]);
      style.left = `${(100 * start) / length}%`;
      style.width = `${(100 * (end - start)) / length}%`;
    });
  }

  #cannotShow() {
    if (this.#blind) return;
    this.#blind = true;
    this.player.hidden = true;
    this.element.classList.add("blind");
    this.#note.textContent =
      `This browser cannot show ${this.name}, so the timeline has no images. ` +
      "The model reads the file itself.";
    this.#note.hidden = false;
    this.#layOut();
  }
}

/**
 * Marks which of the elements is shown just now.
 * @param {ArrayLike<Element>} elements
 * @param {Segment[]} parts
 * @param {number} time
 */
export function mark(elements, parts, time) {
  parts.forEach(({ start, end }, place) => {
    const here = start <= time && time < end;
    if (here) elements[place]?.setAttribute("aria-current", "true");
    else elements[place]?.removeAttribute("aria-current");
  });
}
