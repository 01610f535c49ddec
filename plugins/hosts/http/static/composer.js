// The question: where it is written, sent and stopped.

import { byId, make } from "./dom.js";

export class Composer {
  #form = byId("composer");
  #text = byId("question");
  #send = byId("send");
  #stop = byId("stop");
  #ideas = byId("ideas");
  #fault = byId("ask-fault");
  #busy = false;
  /** What had the focus when it became busy. @type {HTMLElement | null} */
  #before = null;

  /**
   * @param {(question: string) => void} onask
   * @param {() => void} onstop
   * @param {() => boolean} ready whether it can be asked
   */
  constructor(onask, onstop, ready) {
    this.#form.addEventListener("submit", (/** @type {Event} */ event) => {
      event.preventDefault();
      const question = this.#text.value.trim();
      if (this.#busy) return;
      if (!question) {
        this.fault("Ask something first.");
        this.focus();
        return;
      }
      this.fault("");
      if (!ready()) return;
      this.empty();
      onask(question);
    });
    this.#text.addEventListener("input", () => {
      this.fault("");
      this.#fit();
    });
    this.#text.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
      // While a word is being composed (Chinese, Japanese …), Enter ends the word.
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.#form.requestSubmit();
    });
    this.#stop.addEventListener("click", onstop);
    addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.#busy) onstop();
    });
    this.onask = onask;
  }

  get busy() {
    return this.#busy;
  }

  /** While a request is under way, it can be stopped and no other sent. The focus goes to what is
   * there to be pressed, and back. */
  set busy(busy) {
    const focused = /** @type {HTMLElement} */ (document.activeElement);
    const ours = busy ? focused === this.#send || "idle" in focused.dataset : focused === this.#stop;
    if (busy) this.#before = focused;
    this.#busy = busy;
    this.#send.hidden = busy;
    this.#stop.hidden = !busy;
    for (const button of document.querySelectorAll("[data-idle]")) {
      /** @type {HTMLButtonElement} */ (button).disabled = busy;
    }
    if (!ours) return;
    const next = busy ? this.#stop : this.#before?.isConnected ? this.#before : this.#send;
    next.focus({ preventScroll: true }); // what has just come is read
  }

  empty() {
    this.#text.value = "";
    this.#fit();
  }

  /** Gives a question back, unless another is being written. @param {string} question */
  restore(question) {
    if (this.#text.value) return;
    this.#text.value = question;
    this.#fit();
  }

  focus() {
    this.#text.focus();
  }

  /** A sentence under the question, or none. @param {string} text */
  fault(text) {
    this.#fault.textContent = text;
    this.#fault.hidden = !text;
    this.#text.setAttribute("aria-invalid", text ? "true" : "false");
  }

  /** Questions that are asked by one click. @param {string[]} questions */
  suggest(questions) {
    const shown = [...this.#ideas.children].map((idea) => idea.textContent);
    if (shown.join("\n") === questions.join("\n")) return; // one of them may have the focus
    this.#ideas.hidden = !questions.length;
    this.#ideas.scrollLeft = 0;
    this.#ideas.replaceChildren(
      ...questions.map((question) =>
        make(
          "button",
          {
            type: "button",
            class: "idea",
            "data-idle": true,
            disabled: this.#busy,
            click: () => this.onask(question),
          },
          question,
        ),
      ),
    );
  }

  #fit() {
    this.#text.style.height = "auto";
    this.#text.style.height = `${this.#text.scrollHeight}px`;
  }
}
