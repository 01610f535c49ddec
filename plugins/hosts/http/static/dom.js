// Building the document. Texts always become text nodes, so nobody's words are ever markup.

/**
 * An element with attributes, listeners (functions) and children.
 * @param {string} tag
 * @param {Record<string, string | number | boolean | null | undefined | ((event: any) => void)>} attributes
 * @param {...(Node | string | null | undefined | false)} children
 * @returns {any}
 */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, String(value));
  }
  for (const child of children) if (child) element.append(child);
  return element;
}

/**
 * One of the drawings in index.html; said by the text beside it, so hidden from screen readers.
 * @param {string} name
 */
export function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const drawing = document.createElementNS(space, "svg");
  drawing.setAttribute("class", "icon");
  drawing.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(space, "use");
  use.setAttribute("href", `#icon-${name}`);
  drawing.append(use);
  return drawing;
}

/**
 * @param {string} id
 * @returns {any}
 */
export function byId(id) {
  const found = document.getElementById(id);
  if (!found) throw new Error(`the page has no ${id}`);
  return found;
}

/**
 * Makes many buttons one stop of the Tab key: arrows, Home and End go from one to the next and
 * press it.
 * @param {HTMLElement} box what holds the buttons, now or later
 */
export function roving(box) {
  const buttons = () => [...box.querySelectorAll("button")];
  /** @param {HTMLElement} chosen */
  const settle = (chosen) => {
    for (const button of buttons()) button.tabIndex = button === chosen ? 0 : -1;
  };
  box.addEventListener("focusin", (event) => settle(/** @type {HTMLElement} */ (event.target)));
  box.addEventListener("keydown", (event) => {
    const all = buttons();
    const here = all.indexOf(/** @type {HTMLButtonElement} */ (document.activeElement));
    if (here < 0 || event.altKey || event.ctrlKey || event.metaKey) return;
    const places = {
      ArrowRight: here + 1,
      ArrowDown: here + 1,
      ArrowLeft: here - 1,
      ArrowUp: here - 1,
      Home: 0,
      End: all.length - 1,
    };
    const place = places[/** @type {keyof places} */ (event.key)];
    if (place === undefined) return;
    event.preventDefault();
    const next = all[Math.max(0, Math.min(place, all.length - 1))];
    next.focus();
    next.click();
  });
}
