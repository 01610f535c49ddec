// What was shown, asked and answered, as it is sent again with the next question, and kept.

/** @typedef {import("./media.js").Medium} Medium */
/** @typedef {[text: string, remark?: string][]} Figures */

/**
 * A question that was answered.
 * @typedef {object} Answered
 * @property {"answer"} kind
 * @property {Medium[]} media that were first shown with it
 * @property {string} question
 * @property {string} answer
 * @property {string[]} notes
 * @property {Figures} figures
 */

/**
 * A video that was described, as far as it was.
 * @typedef {object} DescribedVideo
 * @property {"description"} kind
 * @property {Medium} video
 * @property {import("./captions.js").Segment[]} segments
 * @property {any} result the last event's; null where it did not come to its end
 * @property {Figures} figures
 * @property {boolean} failed whether it broke off
 */

/** What the answers are asked for with; what is undefined is the server's own.
 * @typedef {{ system?: string, temperature?: number, max_tokens?: number }} Settings */

export class Conversation {
  /** @type {(Answered | DescribedVideo)[]} */
  turns = [];
  /** Media that no answered question has shown yet.
   * @type {Medium[]} */
  waiting = [];
  /** @type {Settings} */
  settings = {};

  /** Everything that the next question is about.
   * @type {Medium[]} */
  get media() {
    return [...this.#answers.flatMap((turn) => turn.media), ...this.waiting];
  }

  get video() {
    return this.media.find((medium) => medium.kind === "video");
  }

  get #answers() {
    return this.turns.filter((turn) => turn.kind === "answer");
  }

  /** What the route for chats takes, up to the last answer or to a question after it.
   * @param {(medium: Medium) => Promise<string>} address what stands for a medium
   * @param {{ media: Medium[], question: string }} [next] */
  async body(address, next) {
    const { system, ...sampling } = this.settings;
    /** @type {object[]} */
    const messages = system ? [{ role: "system", content: system }] : [];
    for (const { media, question, answer } of this.#answers) {
      messages.push(await asked(media, question, address), { role: "assistant", content: answer });
    }
    if (next) messages.push(await asked(next.media, next.question, address));
    return { messages, ...sampling };
  }

  /** A question counts once it has an answer; one that failed may be asked again.
   * @param {Answered} turn */
  answered(turn) {
    this.turns.push(turn);
    this.waiting = this.waiting.filter((medium) => !turn.media.includes(medium));
  }

  /** Takes back an answer and those after it. Their media are there for the next question.
   * @param {Answered} turn
   * @returns {Medium[]} */
  cut(turn) {
    const place = this.turns.indexOf(turn);
    const gone = this.#answers.filter((one) => this.turns.indexOf(one) >= place);
    const media = gone.flatMap((one) => one.media);
    this.turns = this.turns.filter((one) => one.kind !== "answer" || !gone.includes(one));
    this.waiting = [...media, ...this.waiting];
    return media;
  }
}

/** @param {Medium[]} media
 * @param {string} question
 * @param {(medium: Medium) => Promise<string>} address */
async function asked(media, question, address) {
  const parts = await Promise.all(
    media.map(async (medium) => {
      const type = `${medium.kind}_url`;
      return { type, [type]: { url: await address(medium) } };
    }),
  );
  return { role: "user", content: [...parts, { type: "text", text: question }] };
}
