// A video described, from the request to the last line.

import * as api from "./api.js";
import { DescriptionTurn } from "./description.js";
import { address } from "./media.js";
import { send } from "./loading.js";
import { rounded } from "./numbers.js";
import { count } from "./usage.js";

/**
 * @param {import("./media.js").Medium} video
 * @param {string} cut "scenes", or seconds
 * @param {import("./ask.js").Page} page
 * @returns {Promise<void>}
 */
export async function describe(video, cut, page) {
  const { conversation, stage, work } = page;
  if (!stage.video) return;
  stage.keep([video]);
  const turn = new DescriptionTurn(stage.video);
  /** @type {import("./conversation.js").DescribedVideo | undefined} */
  let kept;
  const doing = async (/** @type {AbortSignal} */ signal) => {
    try {
      const source = await send(turn, [video], () => address(video, signal));
      const asked = { video: source, segments: cut === "scenes" ? cut : Number(cut) };
      await stream(turn, asked, signal, work);
    } finally {
      work.follow(() => turn.offerCaptions());
      const { described, result, figures } = turn;
      // What was stopped or broke off is kept as far as it goes, until it is made anew.
      if (described.segments.length && turn.element.isConnected) {
        const { segments } = described;
        const failed = !result && !signal.aborted;
        kept = { kind: "description", video, segments, result, figures, failed };
        conversation.turns.push(kept);
        page.changed();
      }
    }
  };
  await work.run(turn, doing, () => {
    const place = kept && stage.video ? conversation.turns.indexOf(kept) : -1;
    if (place >= 0) conversation.turns.splice(place, 1);
    return describe(video, cut, page);
  });
}

/** A description of before, shown again.
 * @param {import("./conversation.js").DescribedVideo} described
 * @param {import("./ask.js").Page} page */
export function showDescription({ video, segments, result, figures, failed }, { stage, work }) {
  if (!stage.video) return;
  stage.keep([video]);
  const turn = new DescriptionTurn(stage.video);
  for (const segment of segments) turn.part(segment);
  if (result) turn.done(result);
  else turn.note(failed ? "Broke off." : "Stopped.");
  turn.took(figures);
  turn.offerCaptions();
  turn.close();
  work.show(turn);
}

/**
 * @param {DescriptionTurn} turn
 * @param {object} asked
 * @param {AbortSignal} signal
 * @param {import("./progress.js").Work} work
 */
async function stream(turn, asked, signal, work) {
  const began = performance.now();
  const passed = () => (performance.now() - began) / 1000;
  let first = 0;
  for await (const event of api.describe(asked, signal)) {
    work.follow(() => {
      if (event.kind === "progress") turn.progress(event);
      else if (event.kind === "text") turn.add(event.delta);
      else if (event.kind === "segment") {
        first ||= passed();
        turn.part(event.segment);
        work.announcer.say(event.segment.text);
      } else if (event.kind === "done") {
        turn.done(event.result);
        work.announcer.say(event.result.summary || "");
        turn.took([
          [count(event.result.segments.length, "part")],
          [`first after ${rounded(first)} s`],
          [`${rounded(passed())} s in all`],
        ]);
      }
    });
    if (event.kind === "done") work.showStart(turn);
  }
}
