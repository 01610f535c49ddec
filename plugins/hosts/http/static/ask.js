// A question, its answer as it streams, and what becomes of both.

import { chat, size } from "./api.js";
import { send } from "./loading.js";
import { taken } from "./usage.js";
import { address, bodyLimit } from "./media.js";
import { bytes } from "./numbers.js";
import { AnswerTurn } from "./message.js";

const SPARE = 1024; // bytes of a request beside its conversation

/**
 * @typedef {object} Page
 * @property {import("./conversation.js").Conversation} conversation
 * @property {import("./viewer.js").Stage} stage
 * @property {import("./composer.js").Composer} composer
 * @property {import("./progress.js").Work} work
 * @property {() => boolean} ready whether it can be asked, which is said where it cannot
 * @property {() => void} changed called when something is to be kept
 */

/** @typedef {import("./conversation.js").Answered} Answered */

/**
 * @param {string} question
 * @param {Page} page
 * @returns {Promise<void>}
 */
export async function ask(question, page) {
  const { conversation, stage, composer, work } = page;
  const media = [...conversation.waiting];
  const turn = new AnswerTurn(question, small(media, conversation));
  let whole = false;
  const answer = async (/** @type {AbortSignal} */ signal) => {
    const sent = (/** @type {import("./media.js").Medium} */ medium) => address(medium, signal);
    // Not what is added meanwhile: that waits for the next question.
    const making = () => conversation.body(sent, { media, question });
    const body = await send(turn, conversation.media, making);
    checkSize(body);
    await stream(turn, body, signal, work);
    whole = true;
  };
  const doing = async (/** @type {AbortSignal} */ signal) => {
    try {
      await answer(signal);
    } finally {
      work.announcer.flush();
      // What was stopped is an answer as far as it goes; what broke off is none.
      if (turn.text && (whole || signal.aborted) && turn.element.isConnected) {
        const { text, figures } = turn;
        const notes = whole ? turn.notes : [...turn.notes, "Stopped."];
        /** @type {Answered} */
        const answered = { kind: "answer", media, question, answer: text, notes, figures };
        conversation.answered(answered);
        stage.keep(media);
        offer(turn, answered, page);
        page.changed();
      } else if (turn.text) turn.offerCopy();
      else if (signal.aborted && turn.element.isConnected) composer.restore(question);
    }
  };
  await work.run(turn, doing, () => ask(question, page));
}

/** An answer of before, shown again.
 * @param {Answered} answered
 * @param {Page} page */
export function show(answered, page) {
  const turn = new AnswerTurn(answered.question, small(answered.media, page.conversation));
  turn.add(answered.answer);
  for (const note of answered.notes) turn.note(note);
  turn.took(answered.figures);
  turn.close();
  page.stage.keep(answered.media);
  offer(turn, answered, page);
  page.work.show(turn);
}

/** What is shown small with a question: where there is only one, it stands large beside it.
 * @param {import("./media.js").Medium[]} media
 * @param {import("./conversation.js").Conversation} conversation */
function small(media, conversation) {
  return conversation.media.length > 1 ? media : [];
}

/**
 * @param {AnswerTurn} turn
 * @param {Answered} answered
 * @param {Page} page
 */
function offer(turn, answered, page) {
  const again = (/** @type {string} */ question) => {
    if (!page.ready()) return;
    page.stage.release(page.conversation.cut(answered));
    page.work.cut(turn);
    ask(question, page);
  };
  turn.offerCopy();
  turn.offerAgain(again);
}

/**
 * @param {AnswerTurn} turn
 * @param {object} body
 * @param {AbortSignal} signal
 * @param {import("./progress.js").Work} work
 */
async function stream(turn, body, signal, work) {
  const began = performance.now();
  let first = 0;
  for await (const { delta, finish, notes, usage } of chat(body, signal)) {
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

/** @param {object} body */
function checkSize(body) {
  const [has, most] = [size(body) + SPARE, bodyLimit()];
  if (has > most) {
    throw new Error(
      `The images of this conversation make ${bytes(has)} to send, but the server takes ` +
        `${bytes(most)} in one request; remove some, or start anew.`,
    );
  }
}
