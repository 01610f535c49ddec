// Which model answers, and the token, where the server wants one.

import { models, Refusal, useToken } from "./api.js";
import { byId } from "./dom.js";

export class Connection {
  model = "";
  /** What that is, whatever its name here. */
  root = "";
  /** Tokens of prompt and answer together; 0 where that is not known yet. */
  context = 0;
  #form = byId("token");
  #field = byId("token-field");
  #fault = byId("server-fault");
  /** What has to be done once there is a token. @type {() => void} */
  #next = () => {};

  /** @param {() => void} onconnected */
  constructor(onconnected) {
    this.onconnected = onconnected;
    byId("reconnect").addEventListener("click", () => this.connect());
    this.#form.addEventListener("submit", (/** @type {Event} */ event) => {
      event.preventDefault();
      if (!this.#field.value.trim()) return;
      useToken(this.#field.value.trim());
      this.#field.value = "";
      this.#form.hidden = true;
      this.#next();
    });
  }

  async connect() {
    try {
      [{ id: this.model, root: this.root, context: this.context }] = await models();
      this.#fault.hidden = true;
      byId("model").textContent = this.model;
      this.onconnected();
    } catch (error) {
      if (this.wantsToken(error, () => this.connect())) return;
      byId("server-said").textContent = /** @type {Error} */ (error).message;
      this.#fault.hidden = false;
    }
  }

  /**
   * Asks for a token, if that is what is missing.
   * @param {unknown} error
   * @param {() => void} next done with the token
   */
  wantsToken(error, next) {
    if (!(error instanceof Refusal && error.status === 401)) return false;
    byId("token-said").textContent = error.message;
    this.#next = () => {
      next();
      if (!this.model) this.connect();
    };
    this.#form.hidden = false;
    this.#field.focus();
    return true;
  }
}
