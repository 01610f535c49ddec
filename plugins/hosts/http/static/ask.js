// A question, its answer as it streams, and what becomes of both.

import { chat, size } from "./api.js";
import { taken } from "./usage.js";
import { bodyLimit } from "./media.js";
import { bytes } from "./numbers.js";
import { AnswerTurn } from "./message.js";

const SPARE = 1024; // bytes of a request beside its messages

/**
 * @typedef {object} Page
 * @property {import("./conversation.js").Conversation} conversation
 * @property {import("./viewer.js").Stage} stage
 * @property {import("./composer.js").Composer} composer
 * @property {import("./progress.js").Work} work
 */

/**
 * @param {string} question
 * @param {Page} page
 * @returns {Promise<void>}
 */
export async function ask(question, page) {
  const { conversation, stage, composer, work } = page;
  const media = [...conversation.waiting];
  // Where there is only one, it stands large beside it.
  const turn = new AnswerTurn(question, conversation.media.length > 1 ? media : []);
  let whole = false;
  const answer = async (/** @type {AbortSignal} */ signal) => {
    const messages = await conversation.messages(question);
    checkSize(messages);
    await stream(turn, messages, signal, work);
    whole = true;
  };
  const doing = async (/** @type {AbortSignal} */ signal) => {
    try {
      await answer(signal);
    } finally {
      work.announcer.flush();
      if (turn.text) turn.offerCopy();
      // What was stopped is an answer as far as it goes; what broke off is none.
      if (turn.text && (whole || signal.aborted)) {
        conversation.answered(question, media, turn.text);
        stage.keep(media);
      } else if (signal.aborted && turn.element.isConnected) composer.restore(question);
    }
  };
  await work.run(turn, doing, () => ask(question, page));
}

/**
 * @param {AnswerTurn} turn
 * @param {object[]} messages
 * @param {AbortSignal} signal
 * @param {import("./progress.js").Work} work
 */
async function stream(turn, messages, signal, work) {
  const began = performance.now();
  let first = 0;
  for await (const { delta, finish, notes, usage } of chat(messages, signal)) {
    if (delta) {
      first ||= (performance.now() - began) / 1000;
      work.follow(() => turn.add(delta));
      work.announcer.add(delta);
    }
    work.follow(() => {
      if (finish === "length") turn.note("Cut off: the answer may not have more tokens.");
      for (const note of notes || []) turn.note(note);
      if (usage) turn.took(taken(usage, first));
    });
  }
}

/** @param {object[]} messages */
function checkSize(messages) {
  const [has, most] = [size(messages) + SPARE, bodyLimit()];
  if (has > most) {
    throw new Error(
      `The pictures of this conversation make ${bytes(has)} to send, but the server takes ` +
        `${bytes(most)} in one request; remove some, or start anew.`,
    );
  }
}
