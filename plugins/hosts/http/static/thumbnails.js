// Small images of a video's moments, drawn here from the local file.

const HIGH = 96; // pixels; the timeline is half as high, for screens with twice as many

/** One video, looked at by a player of its own, one moment after another. */
export class Thumbnails {
  #video = document.createElement("video");
  #ready;
  /** @type {Promise<unknown>} */
  #line = Promise.resolve();

  /** @param {string} url */
  constructor(url) {
    this.#video.muted = true;
    this.#video.playsInline = true;
    this.#video.preload = "auto";
    this.#ready = happened(this.#video, "loadeddata");
    this.#ready.catch(() => {}); // whoever asks for an image gets it
    this.#video.src = url;
  }

  /**
   * The image at a time, in seconds.
   * @param {number} time
   * @returns {Promise<HTMLCanvasElement>}
   * @throws {Error} where the browser cannot decode it
   */
  at(time) {
    const drawn = this.#line.then(() => this.#draw(time));
    this.#line = drawn.catch(() => {});
    return drawn;
  }

  close() {
    this.#video.removeAttribute("src");
    this.#video.load();
  }

  /** @param {number} time */
  async #draw(time) {
    const video = this.#video;
    await this.#ready;
    if (!video.videoWidth) throw new Error("no image");
    const sought = happened(video, "seeked");
    const shown = nextFrame(video);
    video.currentTime = Math.min(time, video.duration || time);
    await sought;
    await shown;
    const canvas = document.createElement("canvas");
    canvas.height = HIGH;
    canvas.width = Math.round((HIGH * video.videoWidth) / video.videoHeight);
    const pen = canvas.getContext("2d");
    pen?.drawImage(video, 0, 0, canvas.width, canvas.height);
    return canvas;
  }
}

const PATIENCE = 15_000; // milliseconds
const FRAME = 500; // milliseconds, where no new frame comes because the same one is shown

/** When a frame is there to be drawn, which may be later than the search has ended.
 * @param {HTMLVideoElement} video */
function nextFrame(video) {
  return new Promise((resolve) => {
    setTimeout(resolve, FRAME);
    video.requestVideoFrameCallback?.(resolve);
  });
}

/**
 * @param {HTMLVideoElement} video
 * @param {string} event
 */
function happened(video, event) {
  return new Promise((resolve, reject) => {
    const fail = () => reject(new Error(`no ${event}`));
    video.addEventListener(event, resolve, { once: true });
    video.addEventListener("error", fail, { once: true });
    setTimeout(fail, PATIENCE);
  });
}
