// What an answer took, in one line.

import { make } from "./dom.js";
import { bytes, rounded, whole } from "./numbers.js";

/**
 * @param {[text: string, remark?: string][]} rows the remark shows where the pointer rests
 */
export function figures(rows) {
  return make("p", { class: "figures" }, ...rows.map(([text, title]) => make("span", { title }, text)));
}

/**
 * Of a chat's answer. Seconds to the first token are those that were waited here, sending included;
 * the others are the server's own.
 * @param {any} usage
 * @param {number} first seconds
 * @returns {[text: string, remark?: string][]}
 */
export function taken(usage, first) {
  const tokens = usage.completion_tokens;
  const { media_tokens: seen = 0, cached_tokens: known = 0 } = usage.prompt_tokens_details || {};
  const prompt = `Prompt: ${whole(usage.prompt_tokens)} tokens, ${whole(seen)} of them from images, ${whole(known)} known from before`;
  /** @type {[text: string, remark?: string][]} */
  const rows = [[count(tokens, "token"), prompt]];
  const decoding = usage.seconds?.decode;
  if (decoding > 0 && tokens > 1) rows.push([`${rounded((tokens - 1) / decoding)} tokens/s`]);
  rows.push([`first after ${rounded(first)} s`]);
  if (usage.peak_memory_bytes > 0) rows.push([bytes(usage.peak_memory_bytes), "Memory at the peak"]);
  return rows;
}

/** @param {number} number
 * @param {string} unit */
export function count(number, unit) {
  return `${whole(number)} ${unit}${number === 1 ? "" : "s"}`;
}
