// Answers' Markdown as elements. A library (marked) reads it; only what is listed here is built, and
// every text becomes a text node, so that no markup of a model's is ever the page's.

import { make } from "./dom.js";
import { Lexer } from "./marked.js";

/** @typedef {any} Token what marked read; its kind is `type`, its source `raw` */

/** @param {string} text
 * @returns {Node[]} */
export function rendered(text) {
  try {
    return blocks(new Lexer({ gfm: true, breaks: true }).lex(text));
  } catch {
    return [make("p", {}, text)]; // nested so deeply that the stack has no room
  }
}

/** @type {Record<string, (token: Token) => Node>} */
const BLOCKS = {
  paragraph: ({ tokens }) => make("p", {}, ...words(tokens)),
  heading: ({ tokens }) => make("h3", {}, ...words(tokens)), // below the question's own
  list: ({ items, ordered, start }) =>
    make(ordered ? "ol" : "ul", { start: ordered && start !== 1 && start }, ...items.map(item)),
  blockquote: ({ tokens }) => make("blockquote", {}, ...blocks(tokens)),
  code: ({ text }) => make("pre", { tabindex: 0 }, make("code", {}, text)),
  table: ({ header, rows }) =>
    make(
      "div",
      { class: "table", tabindex: 0 },
      make(
        "table",
        {},
        make("thead", {}, row(header, "th")),
        make("tbody", {}, ...rows.map((/** @type {Token[]} */ cells) => row(cells, "td"))),
      ),
    ),
  hr: () => make("hr"),
  checkbox: ({ raw }) => make("span", {}, raw),
  text: ({ tokens, text }) => make("span", {}, ...(tokens ? words(tokens) : [text])),
};

/** @type {Record<string, (token: Token) => Node | string>} */
const WORDS = {
  strong: ({ tokens }) => make("strong", {}, ...words(tokens)),
  em: ({ tokens }) => make("em", {}, ...words(tokens)),
  del: ({ tokens }) => make("del", {}, ...words(tokens)),
  codespan: ({ text }) => make("code", {}, text),
  br: () => make("br"),
  escape: ({ text }) => text,
  text: ({ text }) => text,
};

/** @param {Token[]} tokens
 * @returns {Node[]} */
function blocks(tokens) {
  return tokens
    .filter(({ type }) => type !== "space")
    .map((token) => BLOCKS[token.type]?.(token) ?? make("p", {}, token.raw.trim()));
}

/** Links, images and HTML stay as they were written.
 * @param {Token[]} tokens
 * @returns {(Node | string)[]} */
function words(tokens) {
  return tokens.map((token) => WORDS[token.type]?.(token) ?? token.raw);
}

/** @param {Token} token */
function item({ tokens }) {
  return make("li", {}, ...blocks(tokens));
}

/** @param {Token[]} cells
 * @param {string} tag */
function row(cells, tag) {
  return make("tr", {}, ...cells.map(({ tokens }) => make(tag, {}, ...words(tokens))));
}
