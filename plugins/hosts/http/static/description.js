// A video as it is described: its parts one by one; at last a summary and chapters above them.

import { srt, text, vtt } from "./captions.js";
import { copyButton, saveButton } from "./clipboard.js";
import { make, roving } from "./dom.js";
import { mark } from "./video.js";
import { clock } from "./numbers.js";
import { Turn } from "./message.js";

/** @typedef {import("./captions.js").Segment} Segment */

const STAGES = {
  queued: "Waiting in line",
  loading: "Loading the model",
  preparing: "Opening the video",
};

export class DescriptionTurn extends Turn {
  /** @type {{ segments: Segment[], summary: string, warnings: string[] }} */
  described = { segments: [], summary: "", warnings: [] };
  /** What came with the end, or null. @type {any} */
  result = null;
  #list = make("ol", { class: "parts" });
  #bar = make("progress", { "aria-label": "How far it is", max: 1 });
  /** A part that is being described, as far as it is. @type {HTMLElement | null} */
  #next = null;

  /** @param {import("./video.js").VideoPlayer} video */
  constructor(video) {
    super(`Describe ${video.name}`, []);
    this.video = video;
    this.element.classList.add("description");
    this.body.append(this.#list);
    this.body.after(this.#bar);
    this.wait("Opening the video");
    roving(this.#list);
    video.clear();
    video.watch((time) => mark(this.#list.children, this.described.segments, time));
  }

  /** @param {{ stage: string, done: number, total?: number }} event */
  progress({ stage, done, total }) {
    if (stage === "probe") {
      this.wait(total ? `Looking for scenes: ${clock(done)} of ${clock(total)}` : "Looking for scenes");
    } else if (["text", "describing"].includes(stage) && total) {
      this.#bar.value = done / total;
      if (done < total) this.wait(`Described: ${done} of ${total}`);
    } else if (stage in STAGES) {
      this.wait(STAGES[/** @type {keyof STAGES} */ (stage)]);
    }
  }

  /** The next characters of the part that is being described. @param {string} delta */
  add(delta) {
    if (!this.#next) this.#list.after((this.#next = make("p", { class: "words" })));
    this.#next?.append(delta);
  }

  /** @param {Segment} segment */
  part(segment) {
    this.#next?.remove();
    this.#next = null;
    const { start, end } = segment;
    const time = make(
      "button",
      {
        type: "button",
        class: "time",
        tabindex: this.described.segments.length ? -1 : 0,
        "aria-label": `Go to ${clock(start)}`,
        click: () => this.video.show(start),
      },
      clock(start),
      make("span", { class: "until" }, ` – ${clock(end)}`),
    );
    this.described.segments.push(segment);
    this.#list.append(make("li", {}, time, make("p", { class: "words" }, segment.text)));
    this.video.add(segment);
  }

  /** @param {any} result */
  done({ duration, summary, chapters, warnings }) {
    this.result = { duration, summary, chapters, warnings };
    this.described.summary = summary || "";
    this.described.warnings = warnings || [];
    this.video.lasts(duration);
    if (chapters?.length) {
      const list = make("ol", { class: "chapters" });
      for (const { start, title } of chapters) {
        const go = { type: "button", class: "time", click: () => this.video.show(start) };
        list.append(make("li", {}, make("button", go, clock(start)), make("p", {}, title)));
      }
      this.#list.before(make("h3", {}, "Chapters"), list);
    }
    if (summary) this.body.prepend(make("h3", {}, "Summary"), make("p", { class: "words" }, summary));
    if (summary || chapters?.length) this.#list.before(make("h3", {}, "Parts"));
    for (const warning of this.described.warnings) this.note(warning);
  }

  close() {
    super.close();
    this.#bar.remove();
    this.#next?.remove();
  }

  /** What has been described, to be taken along. */
  offerCaptions() {
    if (!this.described.segments.length) return;
    const stem = this.video.name.replace(/\.[^.]*$/, "") || "video";
    this.offer(
      copyButton("Copy as SRT", () => srt(this.described)),
      copyButton("Copy text", () => text(this.described)),
      saveButton("Save SRT", () => `${stem}.srt`, () => srt(this.described)),
      saveButton("Save VTT", () => `${stem}.vtt`, () => vtt(this.described)),
    );
  }
}
