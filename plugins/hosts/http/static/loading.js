// Says that the model is being loaded, which the first answer after a while waits for.

import { models } from "./api.js";

const PATIENCE = 400; // milliseconds before the server is asked what it does, and between two times

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
