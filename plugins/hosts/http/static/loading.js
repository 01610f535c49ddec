// What is waited for before a request is answered: that a file is sent, and the model loaded.

import { models } from "./api.js";
import { isSentBefore } from "./media.js";

const PATIENCE = 400; // milliseconds before the server is asked what it does, and between two times

/**
 * Sends what goes before the request.
 * @template Sent
 * @param {import("./message.js").Turn} turn
 * @param {import("./media.js").Medium[]} media of the request
 * @param {() => Promise<Sent>} sending
 * @returns {Promise<Sent>}
 */
export async function send(turn, media, sending) {
  if (!media.some(isSentBefore)) return sending();
  turn.sending(true);
  try {
    return await sending();
  } finally {
    turn.sending(false);
    watchLoading(turn);
  }
}

/**
 * Until something comes, or the model is loaded, or the turn has ended.
 * @param {import("./message.js").Turn} turn
 */
export async function watchLoading(turn) {
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, PATIENCE));
    if (!turn.waits) return;
    // Where the server does not answer, the request that it is about says so.
    const [model] = await models().catch(() => []);
    turn.loading(model?.loaded === false);
    if (model?.loaded !== false) return;
  }
}
