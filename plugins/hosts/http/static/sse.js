// Server-sent events of a response's body. EventSource cannot send a body, so they are read here.

/**
 * @param {ReadableStream<Uint8Array>} body
 * @returns {AsyncGenerator<{ event: string, data: string }>}
 */
export async function* events(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  const parser = new Parser();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      yield* parser.add(done ? decoder.decode() : decoder.decode(value, { stream: true }));
      if (done) return;
    }
  } finally {
    // Whoever stops reading, or is stopped, closes the connection, which ends the request.
    reader.cancel().catch(() => {});
  }
}

/** Lines, cut anywhere, as events. One that is not ended by an empty line is none. */
export class Parser {
  #rest = "";
  #event = "";
  /** @type {string[]} */
  #data = [];

  /** @param {string} text */
  *add(text) {
    this.#rest += text;
    for (;;) {
      const end = this.#rest.search(/[\r\n]/);
      if (end < 0) return;
      // After a last \r there may come the \n that belongs to it.
      if (this.#rest[end] === "\r" && end === this.#rest.length - 1) return;
      const line = this.#rest.slice(0, end);
      const both = this.#rest.startsWith("\r\n", end);
      this.#rest = this.#rest.slice(end + (both ? 2 : 1));
      if (line) this.#field(line);
      else if (this.#data.length) {
        yield { event: this.#event || "message", data: this.#data.join("\n") };
        this.#data = [];
        this.#event = "";
      } else this.#event = "";
    }
  }

  /** @param {string} line */
  #field(line) {
    const colon = line.indexOf(":");
    const name = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (name === "data") this.#data.push(value);
    else if (name === "event") this.#event = value;
  }
}
