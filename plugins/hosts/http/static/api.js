// The server's routes. What goes wrong is thrown as one Refusal, whose message is a sentence.

import { sentence } from "./numbers.js";
import { events } from "./sse.js";

const TOKEN = "mlx-onevision-token";

export class Refusal extends Error {
  /**
   * @param {string} message
   * @param {number} [status] 0 where there was no answer
   */
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** The token is kept for this tab, and as long as it is open.
 * @param {string} token */
export function useToken(token) {
  sessionStorage.setItem(TOKEN, token);
}

/**
 * What is served: the name it has here, and its own.
 * @typedef {{ id: string, root: string, context: number, loaded: boolean }} Model
 * @returns {Promise<Model[]>}
 */
export async function models() {
  return (await (await ask("v1/models")).json()).data;
}

/**
 * An answer's pieces as they come; at last how it ended, and what it took.
 * @param {object} asked messages, and how to sample
 * @param {AbortSignal} signal
 * @returns {AsyncGenerator<{ delta?: string, finish?: string, notes?: string[], usage?: any }>}
 */
export async function* chat(asked, signal) {
  const body = { ...asked, stream: true, stream_options: { include_usage: true } };
  const answer = await ask("v1/chat/completions", body, signal);
  for await (const { data } of whole(answer)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refusal(sentence(chunk.error.message), 200);
    if (chunk.usage) yield { usage: chunk.usage };
    for (const { delta, finish_reason: finish } of chunk.choices) {
      if (delta.content) yield { delta: delta.content };
      if (finish) yield { finish, notes: chunk.notes || [] };
    }
  }
  throw brokenOff();
}

/**
 * What happens while a video is described: the contract's events, the result in the last.
 * @param {object} asked
 * @param {AbortSignal} signal
 * @returns {AsyncGenerator<any>}
 */
export async function* describe(asked, signal) {
  const answer = await ask("v1/video/describe", asked, signal);
  for await (const { data } of whole(answer)) {
    const event = JSON.parse(data);
    if (event.kind === "error") {
      throw new Refusal(sentence([event.message, event.hint].filter(Boolean).join("; ")), 200);
    }
    yield event;
    if (event.kind === "done") return;
  }
  throw brokenOff();
}

/**
 * Sends a file by itself; it stays with the server for a while.
 * @param {File} file
 * @param {AbortSignal} [signal]
 * @returns {Promise<string>} its address, for requests
 */
export async function upload(file, signal) {
  return (await (await ask("v1/files", file, signal)).json()).url;
}

/** Whether the server still has it.
 * @param {string} address
 * @param {AbortSignal} [signal] */
export async function isUploaded(address, signal) {
  try {
    await ask(`v1/files/${address.replace("upload:", "")}`, undefined, signal);
    return true;
  } catch (error) {
    if (error instanceof Refusal && error.status === 404) return false;
    throw error;
  }
}

/** Bytes of a request, as it is sent.
 * @param {object} body */
export function size(body) {
  return new Blob([JSON.stringify(body)]).size;
}

/**
 * @param {string} path
 * @param {object} [body] sent with POST, as JSON unless it is a file
 * @param {AbortSignal} [signal]
 * @returns {Promise<Response>}
 */
async function ask(path, body, signal) {
  /** @type {Record<string, string>} */
  const headers = {};
  const token = sessionStorage.getItem(TOKEN);
  if (token) headers["Authorization"] = `Bearer ${token}`;
  const file = body instanceof File;
  if (body) headers["Content-Type"] = file ? "application/octet-stream" : "application/json";
  const sent = file ? body : body && JSON.stringify(body);
  let answer;
  try {
    answer = await fetch(path, {
      method: body ? "POST" : "GET",
      headers,
      body: sent,
      signal,
      cache: "no-store",
      redirect: "error",
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw await unanswered(sent instanceof File ? sent.size : (sent?.length ?? 0));
  }
  if (!answer.ok) throw await refused(answer, Boolean(token));
  return answer;
}

/** @param {Response} answer */
async function* whole(answer) {
  if (!answer.body) throw brokenOff();
  try {
    yield* events(answer.body);
  } catch (error) {
    if (/** @type {Error} */ (error).name === "AbortError") throw error;
    throw brokenOff();
  }
}

/** A server that does not want to read a long request to its end hangs up on the browser.
 * @param {number} sent bytes */
async function unanswered(sent) {
  if (sent > 1 << 16) {
    const alive = await fetch("v1/models", { cache: "no-store" }).catch(() => null);
    if (alive) {
      return new Refusal("The server hung up before it had everything; send fewer or smaller files.");
    }
  }
  return new Refusal("The server does not answer; see whether mlx-onevision serve is still running.");
}

function brokenOff() {
  return new Refusal("The connection broke off before the end.");
}

/**
 * @param {Response} answer
 * @param {boolean} tried whether a token was sent
 */
async function refused(answer, tried) {
  const { status } = answer;
  if (status === 401) {
    return new Refusal(tried ? "The token is not the server's." : "The server wants a token.", status);
  }
  if (status === 429) {
    const seconds = Number(answer.headers.get("Retry-After")) || 1;
    const unit = seconds === 1 ? "second" : "seconds";
    return new Refusal(`The server is busy; try again in ${seconds} ${unit}.`, status);
  }
  const body = await answer.json().catch(() => null);
  const said = body?.error?.message || `The server answers ${status}, and does not say why`;
  return new Refusal(sentence(said), status);
}
