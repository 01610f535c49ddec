// What the conversation is about: images, and a video.

import { byId, icon, make } from "./dom.js";
import { VideoPlayer } from "./video.js";
import { bytes } from "./numbers.js";

/** @typedef {import("./media.js").Medium} Medium */

export class Stage {
  #images = byId("images");
  #videoBox = byId("video");
  #fault = byId("media-fault");
  #said = byId("media-said");
  /** @type {VideoPlayer | null} */
  video = null;
  /** @type {Map<Medium, HTMLElement>} */
  #shown = new Map();
  /** @type {WeakSet<Medium>} */
  #kept = new WeakSet();

  /** @param {(medium: Medium) => void} onremove */
  constructor(onremove) {
    this.onremove = onremove;
    byId("media-read").addEventListener("click", () => this.fault(""));
  }

  /** @param {Medium} medium */
  add(medium) {
    const element = medium.kind === "image" ? this.#image(medium) : this.#player(medium);
    this.#shown.set(medium, element);
    this.#count();
  }

  /** @param {Medium} medium */
  remove(medium) {
    this.#shown.get(medium)?.remove();
    this.#shown.delete(medium);
    if (medium.kind === "video") {
      this.video?.close();
      this.video = null;
    }
    URL.revokeObjectURL(medium.url);
    this.#count();
  }

  /** What was asked about stays until the conversation ends. @param {Medium[]} media */
  keep(media) {
    for (const medium of media) {
      this.#kept.add(medium);
      this.#mayRemove(medium, false);
    }
  }

  /** What is asked about anew can go again. @param {Medium[]} media */
  release(media) {
    for (const medium of media) {
      this.#kept.delete(medium);
      this.#mayRemove(medium, true);
    }
  }

  /** @param {Medium} medium
   * @param {boolean} may */
  #mayRemove(medium, may) {
    const button = this.#shown.get(medium)?.querySelector(".remove");
    if (button) /** @type {HTMLElement} */ (button).hidden = !may;
  }

  /** @param {Medium} medium */
  keeps(medium) {
    return this.#kept.has(medium);
  }

  clear() {
    for (const medium of [...this.#shown.keys()]) this.remove(medium);
    this.fault("");
  }

  /** A sentence about a file, or none. @param {string} text */
  fault(text) {
    this.#said.textContent = text;
    this.#fault.hidden = !text;
  }

  /** @param {Medium} medium */
  #image(medium) {
    const image = make("img", { src: medium.url, alt: medium.name });
    image.addEventListener("error", () => {
      image.replaceWith(make("p", { class: "blank" }, "This browser cannot show this image."));
    });
    const figure = make(
      "figure",
      {},
      image,
      make("figcaption", {}, make("span", { class: "name" }, medium.name), this.#facts(medium)),
    );
    const item = make("li", {}, figure);
    this.#images.append(item);
    return item;
  }

  /** @param {Medium} medium */
  #player(medium) {
    this.video = new VideoPlayer(medium);
    const caption = make(
      "p",
      { class: "caption" },
      make("span", { class: "name" }, medium.name),
      this.#facts(medium),
    );
    this.video.element.append(caption);
    this.#videoBox.prepend(this.video.element);
    return this.video.element;
  }

  /** @param {Medium} medium */
  #facts(medium) {
    const remove = make(
      "button",
      {
        type: "button",
        class: "remove",
        "data-idle": true,
        "aria-label": `Remove ${medium.name}`,
        title: "Remove",
        click: () => this.onremove(medium),
      },
      icon("close"),
    );
    return make("span", { class: "facts" }, bytes(medium.file.size), remove);
  }

  #count() {
    const count = this.#images.childElementCount;
    this.#images.hidden = !count;
    this.#images.classList.toggle("several", count > 1);
    this.#videoBox.hidden = !this.video;
    document.body.classList.toggle("has-media", this.#shown.size > 0);
    document.body.classList.toggle("has-video", Boolean(this.video));
  }
}
