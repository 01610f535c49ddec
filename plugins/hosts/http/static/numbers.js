// Numbers and sentences, as people read them.

/** `1:02:03.4`, hours only where there are any.
 * @param {number} seconds */
export function clock(seconds) {
  const tenths = Math.round(seconds * 10);
  const [minutes, rest] = [Math.floor(tenths / 600), tenths % 600];
  const hours = Math.floor(minutes / 60);
  const tail = `${Math.floor(rest / 10)}`.padStart(2, "0") + `.${rest % 10}`;
  if (!hours) return `${minutes}:${tail}`;
  return `${hours}:${`${minutes % 60}`.padStart(2, "0")}:${tail}`;
}

/** Of a thousand bytes each, as file managers count them.
 * @param {number} count */
export function bytes(count) {
  if (count < 1e6) return `${Math.max(1, Math.round(count / 1e3))} kB`;
  if (count < 1e9) return `${rounded(count / 1e6)} MB`;
  return `${rounded(count / 1e9)} GB`;
}

/** Three digits, where there are as many.
 * @param {number} value */
export function rounded(value) {
  const digits = value >= 100 ? 0 : value >= 10 ? 1 : 2;
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

/** @param {number} count */
export function whole(count) {
  return count.toLocaleString("en");
}

/** A server's message begins small and has no full stop.
 * @param {string} text */
export function sentence(text) {
  const said = text.trim();
  return said.slice(0, 1).toUpperCase() + said.slice(1) + (/[.!?…]$/.test(said) ? "" : ".");
}
