// The one request that is under way: shown as it goes, stopped, or ended by an error.

import { Announcer } from "./screen_reader.js";
import { byId } from "./dom.js";
import { watchLoading } from "./loading.js";

/** @typedef {import("./message.js").Turn} Turn */

const NEAR = 160; // pixels from the page's end within which it is followed

export class Work {
  announcer = new Announcer();
  #talk = byId("talk");
  /** @type {AbortController | null} */
  #running = null;
  #following = true;

  /**
   * @param {import("./composer.js").Composer} composer
   * @param {import("./connection.js").Connection} connection
   */
  constructor(composer, connection) {
    this.composer = composer;
    this.connection = connection;
  }

  /**
   * Shows a turn and does its work; whatever happens, the next can be asked afterwards.
   * @param {Turn} turn
   * @param {(signal: AbortSignal) => Promise<void>} doing
   * @param {() => void} again does the same once more, with another turn
   */
  async run(turn, doing, again) {
    const running = (this.#running = new AbortController());
    this.composer.busy = true;
    this.#following = true;
    this.#talk.append(turn.element);
    scrollTo({ top: document.documentElement.scrollHeight });
    watchLoading(turn);
    try {
      await doing(running.signal);
    } catch (error) {
      const once = () => {
        turn.element.remove();
        again();
      };
      if (running.signal.aborted) {
        turn.note("Stopped.");
        this.announcer.say("Stopped.");
      } else if (this.connection.wantsToken(error, once)) turn.element.remove();
      else this.follow(() => turn.failed(/** @type {Error} */ (error).message, once));
    } finally {
      this.#running = null;
      this.composer.busy = false;
      this.follow(() => turn.close());
    }
  }

  /** A turn that has ended. @param {Turn} turn */
  show(turn) {
    this.#talk.append(turn.element);
    scrollTo({ top: document.documentElement.scrollHeight });
  }

  /** Takes back an answer and those after it; descriptions of videos stay.
   * @param {Turn} turn */
  cut(turn) {
    const all = [...this.#talk.children];
    for (const one of all.slice(all.indexOf(turn.element))) {
      if (!one.matches(".description")) one.remove();
    }
  }

  stop() {
    this.#running?.abort();
  }

  clear() {
    this.stop();
    this.#talk.replaceChildren();
  }

  /** Shows a turn from its beginning, where its end was being followed; that ends with it.
   * @param {Turn} turn */
  showStart(turn) {
    if (!this.#isNearEnd()) return;
    this.#following = false;
    turn.element.scrollIntoView({ block: "start" });
  }

  /** Keeps the page's end in sight while something is added, for whoever is looking at it.
   * @param {() => void} change */
  follow(change) {
    const near = this.#isNearEnd();
    change();
    if (near && this.#following) scrollTo({ top: document.documentElement.scrollHeight });
  }

  #isNearEnd() {
    return innerHeight + scrollY >= document.documentElement.scrollHeight - NEAR;
  }
}
