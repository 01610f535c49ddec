// What an answer took.

import { make } from "./dom.js";
import { bytes, rounded, whole } from "./numbers.js";

/**
 * @param {[string, string, string?][]} rows name, value and, where there is more to say, a remark
 */
export function figures(rows) {
  return make(
    "dl",
    { class: "figures" },
    ...rows.map(([name, value, remark]) =>
      make("div", { title: remark }, make("dt", {}, name), make("dd", {}, value)),
    ),
  );
}

/**
 * Of a chat's answer. Seconds to the first token are those that were waited here, sending included;
 * the others are the server's own.
 * @param {any} usage
 * @param {number} first seconds
 * @returns {[string, string, string?][]}
 */
export function taken(usage, first) {
  const tokens = usage.completion_tokens;
  const { media_tokens: seen = 0, cached_tokens: known = 0 } = usage.prompt_tokens_details || {};
  const prompt = `Prompt: ${whole(usage.prompt_tokens)} tokens, ${whole(seen)} of them from pictures, ${whole(known)} known from before`;
  /** @type {[string, string, string?][]} */
  const rows = [["Tokens", whole(tokens), prompt]];
  const decoding = usage.seconds?.decode;
  if (decoding > 0 && tokens > 1) {
    rows.push(["Speed", `${rounded((tokens - 1) / decoding)} tokens/s`]);
  }
  rows.push(["First token", `${rounded(first)} s`]);
  if (usage.peak_memory_bytes > 0) rows.push(["Memory", bytes(usage.peak_memory_bytes), "At the peak"]);
  return rows;
}
