// System prompt, temperature and length of answers.

import { byId } from "./dom.js";

/** @typedef {import("./conversation.js").Settings} Settings */

export class SettingsPanel {
  #button = byId("settings-button");
  #panel = byId("settings");
  #system = byId("system");
  #numbers = { temperature: byId("temperature"), max_tokens: byId("max-tokens") };

  /** @param {() => void} onchange */
  constructor(onchange) {
    this.#button.addEventListener("click", () => this.#open(this.#panel.hidden));
    this.#panel.addEventListener("input", () => this.#count());
    this.#panel.addEventListener("change", onchange);
  }

  /** What is set. @returns {Settings} */
  get values() {
    /** @type {Settings} */
    const values = {};
    const system = this.#system.value.trim();
    if (system) values.system = system;
    for (const [name, field] of Object.entries(this.#numbers)) {
      if (field.value && field.validity.valid) {
        values[/** @type {"temperature"} */ (name)] = field.valueAsNumber;
      }
    }
    return values;
  }

  set values({ system = "", temperature = "", max_tokens = "" }) {
    this.#system.value = system;
    this.#numbers.temperature.value = temperature;
    this.#numbers.max_tokens.value = max_tokens;
    this.#open(false);
    this.#count();
  }

  /** What is not as it has to be, as a sentence, or nothing; the field has the focus then. */
  check() {
    for (const field of Object.values(this.#numbers)) {
      if (field.validity.valid) continue;
      this.#open(true);
      field.focus();
      return field.dataset.wanted;
    }
    return "";
  }

  /** @param {boolean} open */
  #open(open) {
    this.#panel.hidden = !open;
    this.#button.setAttribute("aria-expanded", String(open));
  }

  #count() {
    const set = Object.keys(this.values).length;
    byId("settings-set").textContent = set ? ` (${set})` : "";
  }
}
