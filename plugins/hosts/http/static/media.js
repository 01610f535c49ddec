// Images and videos: what a file is, whether it fits into a request, and how it is sent.

import { isUploaded, upload } from "./api.js";
import { bytes, whole } from "./numbers.js";

/**
 * @typedef {object} Medium
 * @property {"image" | "video"} kind
 * @property {string} name
 * @property {File} file
 * @property {string} url of this page alone, for showing it
 * @property {string} [data] as it is sent with a request; filled in by `dataUri`
 * @property {string} [uploaded] its address at the server, where it is sent before the request
 */

const SPARE = 4096; // bytes of a request around a file

/** A number that stands in the page when it is sent.
 * @param {string} name */
function limit(name) {
  return Number(document.querySelector(`meta[name=${name}]`)?.getAttribute("content"));
}

/** How many bytes the server takes in one request. */
export function bodyLimit() {
  return limit("body-limit") || 32 << 20;
}

/** How many bytes it takes in one file by itself; 0 where it takes none. */
function uploadLimit() {
  return limit("upload-limit") || 0;
}

/** Bytes of the largest file that fits into a request: base64 makes four bytes of three. */
function fileLimit() {
  return Math.floor(((bodyLimit() - SPARE) * 3) / 4);
}

/** What may be shown and asked, said before it is.
 * @param {number} context tokens, or 0 */
export function limits(context) {
  const [most, video] = [fileLimit(), uploadLimit()];
  const larger = video > most ? `; a video of up to ${bytes(video)}` : "";
  return (
    `JPEG, PNG, WebP, GIF, HEIC, AVIF, TIFF or BMP images; one MP4, MOV, WebM, MKV or AVI video; ` +
    `${bytes(bodyLimit() - SPARE)} in one conversation, so files of up to ${bytes(most)}${larger}.` +
    (context ? ` The model reads and writes ${whole(context)} tokens at most.` : "")
  );
}

/**
 * @param {File} file
 * @returns {Promise<Medium>}
 * @throws {Error} a sentence
 */
export async function medium(file) {
  const name = file.name || "The file";
  let head;
  try {
    head = new Uint8Array(await file.slice(0, 32).arrayBuffer());
  } catch {
    throw new Error(`${name} cannot be read; a folder has to be opened, and its files chosen.`);
  }
  const kind = sniff(head);
  if (!kind) throw new Error(`${name} is neither an image nor a video that is known here.`);
  const most = kind === "video" ? Math.max(fileLimit(), uploadLimit()) : fileLimit();
  if (file.size > most) {
    const taker = most > fileLimit() ? "the server" : "a request";
    const way =
      kind === "video"
        ? "mlx-onevision describe takes videos of any size."
        : "make it smaller first.";
    throw new Error(
      `${name} has ${bytes(file.size)}, but ${taker} has room for ${bytes(most)}; ${way}`,
    );
  }
  return { kind, name, file, url: URL.createObjectURL(file) };
}

/**
 * The file as a data URI. The server looks at the bytes, so the type is only a label.
 * @param {Medium} medium
 * @returns {Promise<string>}
 */
async function dataUri(medium) {
  if (!medium.data) {
    const reader = new FileReader();
    const read = new Promise((resolve, reject) => {
      reader.onload = () => resolve(reader.result);
      reader.onerror = () => reject(new Error(`${medium.name} cannot be read any more; add it again.`));
    });
    reader.readAsDataURL(medium.file);
    const written = await read;
    const { kind, file } = medium;
    const usual = kind === "image" ? "image/png" : "video/mp4";
    const type = file.type.startsWith(`${kind}/`) ? file.type : usual;
    medium.data = `data:${type};base64,${written.slice(written.indexOf(",") + 1)}`;
  }
  return medium.data;
}

/** Whether it does not fit into a request. @param {Medium} medium */
export function isSentBefore({ file }) {
  return file.size > fileLimit();
}

/**
 * What stands for the file in a request: its data, or where the server has it.
 * @param {Medium} medium
 * @param {AbortSignal} [signal]
 * @returns {Promise<string>}
 */
export async function address(medium, signal) {
  if (!isSentBefore(medium)) return dataUri(medium);
  if (!medium.uploaded || !(await isUploaded(medium.uploaded, signal))) {
    medium.uploaded = await upload(medium.file, signal);
  }
  return medium.uploaded;
}

/**
 * What stands for it in a conversation that is saved: its data, or its name where it is too large.
 * @param {Medium} medium
 * @returns {Promise<string>}
 */
export async function savedAs(medium) {
  return isSentBefore(medium) ? medium.name : dataUri(medium);
}

const IMAGE_BRANDS = ["heic", "heix", "heim", "heis", "hevc", "hevx", "mif1", "msf1", "avif"];

/**
 * Whether a file begins as an image or as a video: the rule of the server's `sniff`. Types that
 * systems guess from names are often wrong.
 * @param {Uint8Array} head its first 32 bytes
 * @returns {"image" | "video" | null}
 */
export function sniff(head) {
  const text = String.fromCharCode(...head);
  if (text.startsWith("\xff\xd8\xff") || text.startsWith("\x89PNG\r\n\x1a\n")) return "image";
  if (/^(GIF8[79]a|II\*\0|MM\0\*|qoif)/.test(text)) return "image";
  if (/^BM[^]{4}\0\0\0\0/.test(text)) return "image";
  if (/^RIFF[^]{4}WEBP/.test(text)) return "image";
  if (/^RIFF[^]{4}AVI /.test(text)) return "video";
  if (text.startsWith("ftyp", 4)) return IMAGE_BRANDS.includes(text.slice(8, 12)) ? "image" : "video";
  if (text.startsWith("\x1aE\xdf\xa3")) return "video";
  return ["moov", "mdat", "wide", "free"].includes(text.slice(4, 8)) ? "video" : null;
}
