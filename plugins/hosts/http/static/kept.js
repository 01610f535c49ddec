// The conversation over a reload: one record in this browser's own database, with its files.

import { Conversation } from "./conversation.js";

/** @typedef {import("./media.js").Medium} Medium */

const [DATABASE, STORE, KEY] = ["mlx-onevision", "conversation", "current"];

/** @type {Promise<unknown>} */
let line = Promise.resolve(); // one write after another

/**
 * Keeps it in the place of what was kept before.
 * @param {Conversation} conversation
 * @throws {DOMException} where the browser keeps nothing, or not so much
 */
export function keep({ turns, waiting, settings }) {
  const plain = new Map();
  // The same medium stays the same object; its address and data belong to this page alone.
  const stored = (/** @type {Medium} */ medium) => {
    const { kind, name, file } = medium;
    if (!plain.has(medium)) plain.set(medium, { kind, name, file });
    return plain.get(medium);
  };
  const record = {
    turns: turns.map((turn) =>
      turn.kind === "answer"
        ? { ...turn, media: turn.media.map(stored) }
        : { ...turn, video: stored(turn.video) },
    ),
    waiting: waiting.map(stored),
    settings,
  };
  return inLine((store) => store.put(record, KEY));
}

/** Leaves nothing. */
export function forget() {
  return inLine((store) => store.clear());
}

/** What was kept, or null.
 * @returns {Promise<Conversation | null>} */
export async function kept() {
  const record = await inLine((store) => store.get(KEY));
  if (!record) return null;
  const opened = new Map();
  const shown = (/** @type {any} */ medium) => {
    if (!opened.has(medium)) {
      opened.set(medium, { ...medium, url: URL.createObjectURL(medium.file) });
    }
    return opened.get(medium);
  };
  const conversation = new Conversation();
  conversation.turns = record.turns.map((/** @type {any} */ turn) =>
    turn.kind === "answer"
      ? { ...turn, media: turn.media.map(shown) }
      : { ...turn, video: shown(turn.video) },
  );
  conversation.waiting = record.waiting.map(shown);
  conversation.settings = record.settings;
  return conversation;
}

/** @param {(store: IDBObjectStore) => IDBRequest} doing */
function inLine(doing) {
  const done = line.then(() => transact(doing));
  line = done.catch(() => {});
  return done;
}

/** @param {(store: IDBObjectStore) => IDBRequest} doing
 * @returns {Promise<any>} */
async function transact(doing) {
  const opening = indexedDB.open(DATABASE, 1);
  opening.onupgradeneeded = () => opening.result.createObjectStore(STORE);
  const database = await settled(opening);
  try {
    const transaction = database.transaction(STORE, "readwrite");
    const result = settled(doing(transaction.objectStore(STORE)));
    await new Promise((resolve, reject) => {
      transaction.oncomplete = resolve;
      transaction.onabort = () => reject(transaction.error);
    });
    return await result;
  } finally {
    database.close();
  }
}

/** @param {IDBRequest} request
 * @returns {Promise<any>} */
function settled(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}
