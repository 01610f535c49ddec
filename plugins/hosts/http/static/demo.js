// The small model inside the package knows coloured shapes only; here are some for it to look at.

import { icon, make } from "./dom.js";

export const DEMO = "demo";

const RED = "#dc2626";
const BLUE = "#2563eb";
const GREEN = "#16a34a";
const ORANGE = "#f97316";
const PURPLE = "#9333ea";

/** @typedef {[kind: "circle" | "square" | "triangle" | "star", colour: string, x: number, y: number, size: number]} Shape */
/** @typedef {{ name: string, background: string, shapes: Shape[] }} Drawing */

/** Each a button: a label and the images that it brings.
 * @type {{ label: string, drawings: Drawing[] }[]} */
const DRAWN = [
  {
    label: "An image",
    drawings: [
      {
        name: "three-shapes.png",
        background: "#f4f1ea",
        shapes: [
          ["circle", RED, 190, 330, 118],
          ["star", BLUE, 480, 310, 150],
          ["triangle", ORANGE, 770, 350, 150],
        ],
      },
    ],
  },
  {
    label: "Two images",
    drawings: [
      {
        name: "star.png",
        background: "#e8eef7",
        shapes: [
          ["star", PURPLE, 300, 230, 140],
          ["square", GREEN, 660, 430, 110],
        ],
      },
      { name: "circle.png", background: "#e4f1e6", shapes: [["circle", ORANGE, 560, 320, 170]] },
    ],
  },
];

const VIDEO = { label: "A video", name: "shapes.mp4", url: "page/shapes.mp4" };

/**
 * Buttons that bring the examples.
 * @param {(files: File[]) => void} take
 * @param {(text: string) => void} fail
 */
export function examples(take, fail) {
  const drawn = DRAWN.map(({ label, drawings }) => {
    const bring = () => take(drawings.map(file));
    return example(label, bring, ...drawings.map(draw));
  });
  const bringVideo = async () => {
    const answer = await fetch(VIDEO.url).catch(() => null);
    if (!answer?.ok) return fail("The example cannot be read; the server does not answer.");
    take([new File([await answer.blob()], VIDEO.name, { type: "video/mp4" })]);
  };
  return [...drawn, example(VIDEO.label, bringVideo, icon("video"))];
}

/**
 * Questions that the demo model can answer, about what is shown.
 * @param {import("./media.js").Medium[]} media
 */
export function questions(media) {
  const images = media.filter(({ kind }) => kind === "image").length;
  if (media.length > images) return ["What happens in the video?", "How does the red circle move?"];
  if (images > 1) return ["Which image has the star?", "What is in the second image?"];
  if (!images) return [];
  return ["What is in the image?", "How many shapes are there?", "Where is the star?"];
}

/**
 * @param {string} label
 * @param {() => void} bring
 * @param {...Node} look
 */
function example(label, bring, ...look) {
  return make(
    "button",
    { type: "button", class: "example", click: bring },
    make("span", { class: "look", "aria-hidden": "true" }, ...look),
    make("span", {}, label),
  );
}

/** At once: `toBlob` waits until the browser has nothing else to do, which may be seconds.
 * @param {Drawing} drawing */
function file(drawing) {
  const written = draw(drawing).toDataURL("image/png");
  const data = Uint8Array.from(atob(written.split(",")[1]), (one) => one.charCodeAt(0));
  return new File([data], drawing.name, { type: "image/png" });
}

/** @param {Drawing} drawing
 * @returns {HTMLCanvasElement} */
function draw({ background, shapes }) {
  const canvas = make("canvas", { width: 960, height: 640 });
  const pen = canvas.getContext("2d");
  pen.fillStyle = background;
  pen.fillRect(0, 0, canvas.width, canvas.height);
  for (const [kind, colour, x, y, size] of shapes) {
    pen.fillStyle = colour;
    pen.beginPath();
    if (kind === "circle") pen.arc(x, y, size, 0, 2 * Math.PI);
    else if (kind === "square") pen.rect(x - size, y - size, 2 * size, 2 * size);
    else if (kind === "star") outline(pen, x, y, size, 5, 0.42);
    else outline(pen, x, y, size, 3, 0.5);
    pen.fill();
  }
  return canvas;
}

/** A star's outline from the top; `inner` is the ratio of its inner radius.
 * @param {CanvasRenderingContext2D} pen
 * @param {number} x
 * @param {number} y
 * @param {number} radius
 * @param {number} points
 * @param {number} inner */
function outline(pen, x, y, radius, points, inner) {
  for (let step = 0; step < 2 * points; step++) {
    const angle = (Math.PI * step) / points - Math.PI / 2;
    const length = step % 2 ? radius * inner : radius;
    pen.lineTo(x + length * Math.cos(angle), y + length * Math.sin(angle));
  }
  pen.closePath();
}
