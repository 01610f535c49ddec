// A question and its answer, as they are shown.

import { copyButton } from "./clipboard.js";
import { icon, make } from "./dom.js";
import { rendered } from "./markdown.js";
import { figures } from "./usage.js";

/** @typedef {import("./media.js").Medium} Medium */

export class Turn {
  /**
   * @param {string} question
   * @param {Medium[]} media what is shown small with it
   */
  constructor(question, media) {
    this.question = question;
    this.heading = make("h2", {}, question);
    const shown = media.filter(({ kind }) => kind === "image").map(thumbnail);
    this.body = make("div", { class: "answer", "aria-busy": "true" });
    this.#waiting = make("p", { class: "waiting" }, this.#awaited);
    this.#end = make("div", { class: "end" });
    this.element = make(
      "article",
      { class: "turn" },
      make(
        "header",
        {},
        this.heading,
        shown.length > 0 && make("div", { class: "shown" }, ...shown),
      ),
      this.body,
      this.#waiting,
      this.#end,
    );
    const began = performance.now();
    this.#clock = setInterval(() => {
      const seconds = Math.round((performance.now() - began) / 1000);
      this.#waiting.dataset.seconds = `${seconds} s`;
    }, 1000);
  }

  #waiting;
  #loading = make("progress", { "aria-label": "Loading the model" });
  #end;
  #actions = make("div", { class: "actions" });
  #clock;
  /** @type {string[]} */
  notes = [];
  /** @type {import("./conversation.js").Figures} */
  figures = [];
  #awaited = "Looking";
  #sending = false;

  /** Whether nothing has come yet. */
  get waits() {
    return this.#waiting.isConnected && Boolean(this.#awaited) && !this.#sending;
  }

  /** Whether a file is sent before anything is asked. @param {boolean} sending */
  sending(sending) {
    this.#sending = sending;
    this.#loading.remove();
    this.#waiting.textContent = sending ? "Sending the video" : this.#awaited;
  }

  /** What is waited for; nothing once something comes. @param {string} text */
  wait(text) {
    this.#awaited = text;
    this.#loading.remove();
    this.#waiting.textContent = text;
    this.#waiting.hidden = !text;
  }

  /** Whether it is the model that is waited for. @param {boolean} loading */
  loading(loading) {
    if (!this.waits) return;
    this.#waiting.textContent = loading ? "Loading the model" : this.#awaited;
    if (loading) this.#waiting.after(this.#loading);
    else this.#loading.remove();
  }

  /** @param {import("./conversation.js").Figures} rows */
  took(rows) {
    this.figures = rows;
    if (rows.length) this.#end.append(figures(rows));
  }

  /** A remark on the answer. @param {string} text */
  note(text) {
    this.notes.push(text);
    this.#end.before(make("p", { class: "note" }, text));
  }

  /** @param {...Node} buttons */
  offer(...buttons) {
    this.#actions.append(...buttons);
    this.#end.append(this.#actions);
  }

  /** Why there is no answer, or not all of it.
   * @param {string} text
   * @param {() => void} again */
  failed(text, again) {
    const button = make(
      "button",
      { type: "button", class: "quiet", "data-idle": true, click: again },
      icon("again"),
      "Try again",
    );
    this.#end.before(make("div", { class: "fault", role: "alert" }, make("p", {}, text), button));
  }

  /** Nothing more comes. */
  close() {
    clearInterval(this.#clock);
    this.#waiting.remove();
    this.#loading.remove();
    this.body.setAttribute("aria-busy", "false");
  }
}

/** The answer of a chat. */
export class AnswerTurn extends Turn {
  text = "";
  #words = make("div", { class: "words markdown" });
  #next = 0; // when it may be rendered again, on the clock of `performance`
  #editing = make("form");

  /** @param {string} delta */
  add(delta) {
    if (!this.text) {
      this.wait("");
      this.body.append(this.#words);
    }
    this.text += delta;
    // A long answer takes a while to be read, and is read from its beginning each time.
    const began = performance.now();
    if (began < this.#next) return;
    this.#render();
    const ended = performance.now();
    this.#next = ended + 10 * (ended - began);
  }

  #render() {
    this.#words.replaceChildren(...rendered(this.text));
  }

  close() {
    super.close();
    if (this.text) this.#render();
  }

  offerCopy() {
    this.offer(copyButton("Copy", () => this.text));
  }

  /** Another answer, to this question or to an edited one.
   * @param {(question: string) => void} again */
  offerAgain(again) {
    this.offer(
      make(
        "button",
        {
          type: "button",
          class: "quiet regenerate",
          "data-idle": true,
          click: () => again(this.question),
        },
        icon("again"),
        "Regenerate",
      ),
      make(
        "button",
        { type: "button", class: "quiet", "data-idle": true, click: () => this.#edit(again) },
        icon("edit"),
        "Edit",
      ),
    );
  }

  /** @param {(question: string) => void} again */
  #edit(again) {
    const field = make("textarea", { "aria-label": "Edited question", rows: 2 });
    field.value = this.question;
    const close = () => {
      this.#editing.remove();
      this.heading.classList.remove("unseen");
    };
    this.#editing.remove();
    this.#editing = make(
      "form",
      {
        class: "edit",
        submit: (/** @type {Event} */ event) => {
          event.preventDefault();
          if (field.value.trim()) again(field.value.trim());
        },
        keydown: (/** @type {KeyboardEvent} */ event) => {
          if (event.key === "Escape") close();
          if (event.key !== "Enter" || event.target !== field) return;
          if (event.shiftKey || event.isComposing) return;
          event.preventDefault();
          this.#editing.requestSubmit();
        },
      },
      field,
      make(
        "div",
        { class: "row" },
        make("button", { class: "primary", "data-idle": true }, "Ask again"),
        make("button", { type: "button", class: "quiet", click: close }, "Cancel"),
        make("span", { class: "hint" }, "This answer and those after it go."),
      ),
    );
    this.heading.classList.add("unseen"); // stays visible to screen readers as the section's heading
    this.heading.after(this.#editing);
    field.focus();
  }
}

/** @param {Medium} medium */
function thumbnail(medium) {
  const image = make("img", { src: medium.url, alt: medium.name, title: medium.name });
  image.addEventListener("error", () => image.remove());
  return image;
}
