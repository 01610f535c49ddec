// The conversation as a file: Markdown for people, JSON for the route for chats. That takes it again,
// unless it has a video that is too large for a request: the file's name stands in its place.

import { oneLine } from "./captions.js";
import { savedAs } from "./media.js";
import { clock } from "./numbers.js";

/** @typedef {import("./conversation.js").Conversation} Conversation */

/**
 * @param {Conversation} conversation
 * @param {string} model
 */
export function markdown({ turns, settings }, model) {
  const blocks = [`# Conversation with ${code(model)}`];
  if (settings.system) blocks.push("System prompt:", quoted(settings.system));
  for (const turn of turns) {
    if (turn.kind === "answer") {
      const names = turn.media.map(({ name }) => code(name)).join(", ");
      blocks.push("---", quoted([names, turn.question].filter(Boolean).join("\n\n")), turn.answer);
      blocks.push(...turn.notes.map((note) => `*${escaped(note)}*`));
    } else {
      const { summary, chapters = [], warnings = [] } = turn.result || {};
      blocks.push("---", `Description of ${code(turn.video.name)}`);
      if (summary) blocks.push(escaped(summary));
      if (chapters.length) {
        const rows = chapters.map((/** @type {any} */ one) => `- ${clock(one.start)} ${escaped(one.title)}`);
        blocks.push("Chapters:", rows.join("\n"));
      }
      const rows = turn.segments.map(
        ({ start, end, text }) => `- ${clock(start)} to ${clock(end)}: ${escaped(text)}`,
      );
      blocks.push("Parts:", rows.join("\n"));
      blocks.push(...warnings.map((/** @type {string} */ one) => `*${escaped(one)}*`));
    }
  }
  return blocks.join("\n\n") + "\n";
}

/**
 * @param {Conversation} conversation
 * @param {string} model
 */
export async function json(conversation, model) {
  const descriptions = conversation.turns
    .filter((turn) => turn.kind === "description")
    .map(({ video, segments, result }) => ({ video: video.name, segments, ...result }));
  const body = await conversation.body(savedAs);
  return JSON.stringify({ model, ...body, descriptions }, null, 2) + "\n";
}

/** @param {string} text */
function quoted(text) {
  return text
    .split("\n")
    .map((line) => `> ${line}`.trimEnd())
    .join("\n");
}

/** @param {string} text */
function code(text) {
  return `\`${oneLine(text).replaceAll("`", "'")}\``;
}

/** @param {string} text */
function escaped(text) {
  return oneLine(text).replace(/[\\`*_[\]<>#|~]/g, "\\$&");
}
