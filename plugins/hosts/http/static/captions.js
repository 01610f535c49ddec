// A described video as text and as subtitles: the same files as `mlx-onevision describe` writes.

/** @typedef {{ start: number, end: number, text: string }} Segment */
/** @typedef {{ segments: Segment[], summary?: string, warnings?: string[] }} Described */

const EMPTY = "(not described)"; // else it would look like a gap
const SILENT = "Only the picture is described, not the sound.";

/** SubRip has no way to write what looks like a tag, so that is given wide brackets.
 * @param {Described} described */
export function srt(described) {
  const plain = (/** @type {string} */ text) =>
    text.replace(/<(?= *\/? *[\p{L}\p{N}_])/gu, "＜").replaceAll("{\\", "｛\\");
  return cues(described, ",")
    .map(([start, end, text], place) => `${place + 1}\n${start} --> ${end}\n${plain(text)}\n`)
    .join("\n");
}

/** @param {Described} described */
export function vtt(described) {
  const escaped = (/** @type {string} */ text) =>
    text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  const written = cues(described, ".").map(
    ([start, end, text]) => `${start} --> ${end}\n${escaped(text)}\n`,
  );
  return ["WEBVTT\n", `NOTE ${SILENT}\n`, ...written].join("\n");
}

/** @param {Described} described */
export function text(described) {
  const lines = described.summary ? [oneLine(described.summary), ""] : [];
  for (const { start, end, text } of described.segments) {
    lines.push(`[${exact(start)} - ${exact(end)}] ${oneLine(text)}`);
  }
  return [...lines, ...(described.warnings || [])].join("\n") + "\n";
}

/** Start, end and text.
 * @param {Described} described
 * @param {string} separator */
function cues(described, separator) {
  return described.segments.map(({ start, end, text }) => {
    const last = Math.max(end, start + 0.001);
    return [padded(start, separator), padded(last, separator), oneLine(text) || EMPTY];
  });
}

/** @param {number} seconds
 * @param {string} separator */
function padded(seconds, separator) {
  return exact(seconds, separator).padStart("00:00:00.000".length, "0");
}

/** `1:02:03.456`.
 * @param {number} seconds */
function exact(seconds, separator = ".") {
  const all = even(seconds * 1000);
  const two = (/** @type {number} */ number) => `${number}`.padStart(2, "0");
  const [hours, minutes] = [Math.floor(all / 3_600_000), Math.floor(all / 60_000) % 60];
  const rest = `${all % 1000}`.padStart(3, "0");
  return `${hours}:${two(minutes)}:${two(Math.floor(all / 1000) % 60)}${separator}${rest}`;
}

/** Rounded as Python rounds: a half to the even side.
 * @param {number} value */
function even(value) {
  const low = Math.floor(value);
  return value - low === 0.5 ? low + (low % 2) : Math.round(value);
}

/** White space as Python sees it, which is not quite as JavaScript does.
 * @param {string} text */
export function oneLine(text) {
  return text
    .split(/[\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+/)
    .filter(Boolean)
    .join(" ");
}
