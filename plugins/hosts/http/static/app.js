// The page: what its parts do for one another.

import { ask } from "./ask.js";
import { Composer } from "./composer.js";
import { Conversation } from "./conversation.js";
import { DEMO, examples, questions } from "./demo.js";
import { byId } from "./dom.js";
import { Connection } from "./connection.js";
import { listen } from "./file_input.js";
import { limits, medium } from "./media.js";
import { Stage } from "./viewer.js";
import { describe } from "./describe.js";
import { Work } from "./progress.js";

/** @typedef {import("./media.js").Medium} Medium */

const connection = new Connection(suggest);
const stage = new Stage(remove);
const composer = new Composer(asked, () => work.stop());
const work = new Work(composer, connection);
let conversation = new Conversation();

/** @param {string} question */
async function asked(question) {
  await ask(question, { conversation, stage, composer, work });
  suggest();
}

/** @param {File[]} files */
async function take(files) {
  const faults = [];
  const names = [];
  for (const file of files) {
    try {
      add(await medium(file));
      names.push(file.name);
    } catch (error) {
      faults.push(/** @type {Error} */ (error).message);
    }
  }
  stage.fault(faults.join(" "));
  if (names.length) work.announcer.say(`Added: ${names.join(", ")}.`);
  suggest();
  // On a telephone the keyboard would cover what was just added; a refusal is read where it stands.
  if (names.length && matchMedia("(pointer: fine)").matches) composer.focus();
}

/** @param {Medium} found */
function add(found) {
  const film = found.kind === "video" && conversation.film;
  if (film && (stage.keeps(film) || composer.busy)) {
    URL.revokeObjectURL(found.url);
    throw new Error(`One film at a time; start anew to show ${found.name}.`);
  }
  if (film) remove(film); // the other one takes its place
  conversation.waiting.push(found);
  stage.add(found);
}

/** @param {Medium} medium */
function remove(medium) {
  conversation.waiting = conversation.waiting.filter((other) => other !== medium);
  stage.remove(medium);
  stage.fault("");
  suggest();
}

function suggest() {
  byId("limits").textContent = limits(connection.context);
  document.body.classList.toggle("demo", connection.root === DEMO);
  composer.suggest(connection.root === DEMO ? questions(conversation.media) : []);
}

function anew() {
  work.clear();
  conversation = new Conversation();
  stage.clear();
  composer.empty();
  composer.fault("");
  suggest();
  composer.focus();
}

byId("examples").append(...examples(take, (text) => stage.fault(text)));
byId("anew").addEventListener("click", anew);
byId("describe").addEventListener("click", () => {
  const film = conversation.film;
  if (film) describe(film, byId("cut").value, { stage, work });
});
listen(take);
suggest();
connection.connect();
