// What a screen reader reads out of an answer that streams: sentences, not syllables.

import { byId, make } from "./dom.js";

export class Announcer {
  #box = byId("announced");
  #rest = "";

  /** The next characters of an answer.
   * @param {string} delta */
  add(delta) {
    this.#rest += delta;
    const end = Math.max(...[". ", "! ", "? ", "\n"].map((mark) => this.#rest.lastIndexOf(mark)));
    if (end < 0) return;
    this.say(this.#rest.slice(0, end + 1));
    this.#rest = this.#rest.slice(end + 1);
  }

  /** The answer has ended. */
  flush() {
    this.say(this.#rest);
    this.#rest = "";
  }

  /** @param {string} text */
  say(text) {
    if (!text.trim()) return;
    this.#box.append(make("p", {}, text.trim()));
    while (this.#box.childElementCount > 20) this.#box.firstElementChild?.remove();
  }
}
