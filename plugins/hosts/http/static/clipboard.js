// Texts to the clipboard and to files.

import { icon, make } from "./dom.js";

/**
 * A button that copies, and says that it has.
 * @param {string} label
 * @param {() => string} text
 */
export function copyButton(label, text) {
  const said = make("span", {}, label);
  return make(
    "button",
    {
      type: "button",
      class: "quiet",
      click: async () => {
        const done = await copied(text());
        said.textContent = done ? "Copied" : "The browser does not allow copying";
        setTimeout(() => (said.textContent = label), 1600);
      },
    },
    icon("copy"),
    said,
  );
}

/**
 * A button that saves a text as a file.
 * @param {string} label
 * @param {() => string} name
 * @param {() => string | Promise<string>} text
 * @param {(text: string) => void} [fault] told why there is no text; where there always is one, none
 */
export function saveButton(label, name, text, fault) {
  return make(
    "button",
    {
      type: "button",
      class: "quiet",
      click: async () => {
        fault?.("");
        try {
          save(name(), await text());
        } catch (error) {
          if (!fault) throw error;
          fault(/** @type {Error} */ (error).message);
        }
      },
    },
    icon("save"),
    label,
  );
}

/**
 * @param {string} name
 * @param {string} text
 */
function save(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "text/plain;charset=utf-8" }));
  make("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

/** @param {string} text */
async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copiedTheOldWay(text);
  }
}

/** Over plain HTTP from another machine browsers have no `navigator.clipboard`.
 * @param {string} text */
function copiedTheOldWay(text) {
  const focused = /** @type {HTMLElement | null} */ (document.activeElement);
  const box = make("textarea", { class: "unseen", "aria-hidden": "true" });
  box.value = text;
  document.body.append(box);
  box.select();
  const done = document.execCommand("copy");
  box.remove();
  focused?.focus();
  return done;
}
