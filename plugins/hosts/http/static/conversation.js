// What was asked and answered, as it is sent again with the next question.

import { part } from "./media.js";

/** @typedef {import("./media.js").Medium} Medium */

export class Conversation {
  /** @type {{ media: Medium[], question: string, answer: string }[]} */
  #turns = [];
  /** Media that no answered question has shown yet.
   * @type {Medium[]} */
  waiting = [];

  /** Everything that the next question is about.
   * @type {Medium[]} */
  get media() {
    return [...this.#turns.flatMap((turn) => turn.media), ...this.waiting];
  }

  get film() {
    return this.media.find((medium) => medium.kind === "video");
  }

  /** All messages, up to a question.
   * @param {string} question */
  async messages(question) {
    const messages = [];
    for (const { media, question, answer } of this.#turns) {
      messages.push(await asked(media, question), { role: "assistant", content: answer });
    }
    return [...messages, await asked(this.waiting, question)];
  }

  /** A question counts once it has an answer; one that failed may be asked again.
   * @param {string} question
   * @param {Medium[]} media
   * @param {string} answer */
  answered(question, media, answer) {
    this.#turns.push({ media, question, answer });
    this.waiting = this.waiting.filter((medium) => !media.includes(medium));
  }
}

/** @param {Medium[]} media
 * @param {string} question */
async function asked(media, question) {
  const parts = await Promise.all(media.map(part));
  return { role: "user", content: [...parts, { type: "text", text: question }] };
}
