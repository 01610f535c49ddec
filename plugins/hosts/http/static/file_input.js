// Files come in: dropped anywhere, chosen, or pasted.

import { byId } from "./dom.js";

/** @param {(files: File[]) => void} take */
export function listen(take) {
  const chooser = byId("chooser");
  for (const button of document.querySelectorAll("[data-choose]")) {
    button.addEventListener("click", () => chooser.click());
  }
  chooser.addEventListener("change", () => {
    take([...chooser.files]);
    chooser.value = ""; // the same file may be chosen again
  });

  let inside = 0; // dragenter comes for each element, and before the dragleave of the last
  /** @param {number} count */
  const entered = (count) => {
    inside = Math.max(0, count);
    document.body.classList.toggle("dragging", inside > 0);
  };
  addEventListener("dragenter", (event) => hasFiles(event.dataTransfer) && entered(inside + 1));
  addEventListener("dragleave", (event) => hasFiles(event.dataTransfer) && entered(inside - 1));
  addEventListener("dragover", (event) => {
    if (!hasFiles(event.dataTransfer)) return;
    event.preventDefault(); // or the browser would leave the page and open the file
    if (event.dataTransfer) event.dataTransfer.dropEffect = "copy";
  });
  addEventListener("drop", (event) => {
    if (!hasFiles(event.dataTransfer)) return;
    event.preventDefault();
    entered(0);
    take([...(event.dataTransfer?.files || [])]);
  });

  addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files || [])];
    if (!files.length) return; // words go where the cursor is
    event.preventDefault();
    take(files);
  });
}

/** @param {DataTransfer | null} carried */
function hasFiles(carried) {
  return Boolean(carried?.types.includes("Files"));
}
