// The page: what its parts do for one another.

import { ask, show } from "./ask.js";
import { saveButton } from "./clipboard.js";
import { Composer } from "./composer.js";
import { Conversation } from "./conversation.js";
import { DEMO, examples, questions } from "./demo.js";
import { byId } from "./dom.js";
import { Connection } from "./connection.js";
import { listen } from "./file_input.js";
import { forget, keep, kept } from "./kept.js";
import { limits, medium } from "./media.js";
import { Stage } from "./viewer.js";
import { describe, showDescription } from "./describe.js";
import { json, markdown } from "./saved.js";
import { SettingsPanel } from "./settings.js";
import { Work } from "./progress.js";

/** @typedef {import("./media.js").Medium} Medium */

const connection = new Connection(suggest);
const stage = new Stage(remove);
const composer = new Composer(asked, () => work.stop(), ready);
const work = new Work(composer, connection);
let conversation = new Conversation();
const settings = new SettingsPanel(() => {
  conversation.settings = settings.values;
  changed();
});

/** @returns {import("./ask.js").Page} */
function page() {
  return { conversation, stage, composer, work, ready, changed };
}

/** @param {string} question */
async function asked(question) {
  if (ready()) await ask(question, page());
  suggest();
}

/** Whether it can be asked; what hinders it is said. */
function ready() {
  const fault = settings.check();
  composer.fault(fault);
  return !fault;
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
  if (names.length) changed();
  // On a telephone the keyboard would cover what was just added; a refusal is read where it stands.
  if (names.length && matchMedia("(pointer: fine)").matches) composer.focus();
}

/** @param {Medium} found */
function add(found) {
  const video = found.kind === "video" && conversation.video;
  if (video && (stage.keeps(video) || composer.busy)) {
    URL.revokeObjectURL(found.url);
    throw new Error(`One video at a time; start anew to show ${found.name}.`);
  }
  if (video) remove(video); // the other one takes its place
  conversation.waiting.push(found);
  stage.add(found);
}

/** @param {Medium} medium */
function remove(medium) {
  conversation.waiting = conversation.waiting.filter((other) => other !== medium);
  stage.remove(medium);
  stage.fault("");
  suggest();
  changed();
}

function suggest() {
  byId("limits").textContent = limits(connection.context);
  document.body.classList.toggle("demo", connection.root === DEMO);
  composer.suggest(connection.root === DEMO ? questions(conversation.media) : []);
}

/** Keeps the conversation for a reload. */
async function changed() {
  byId("export").hidden = !conversation.turns.length;
  await said(keep(conversation));
}

/** Says where the browser keeps nothing, or not so much.
 * @param {Promise<unknown>} keeping */
async function said(keeping) {
  const note = byId("unkept");
  try {
    await keeping;
    note.hidden = true;
  } catch (error) {
    const { name } = /** @type {Error} */ (error);
    note.textContent = `A reload will lose this conversation, as the browser does not keep it (${name}).`;
    note.hidden = false;
  }
}

/** What was there before a reload. */
async function restore() {
  const found = await kept().catch(() => null); // what cannot be kept says so when it is
  if (!found) return;
  conversation = found;
  settings.values = found.settings;
  const media = found.turns.flatMap((turn) => (turn.kind === "answer" ? turn.media : [turn.video]));
  for (const medium of new Set([...media, ...found.waiting])) stage.add(medium);
  for (const turn of found.turns) {
    if (turn.kind === "answer") show(turn, page());
    else showDescription(turn, page());
  }
  byId("export").hidden = !found.turns.length;
}

function anew() {
  work.clear();
  conversation = new Conversation();
  stage.clear();
  composer.empty();
  composer.fault("");
  settings.values = {};
  byId("export").hidden = true;
  said(forget());
  suggest();
  composer.focus();
}

byId("examples").append(...examples(take, (text) => stage.fault(text)));
byId("export").append(
  saveButton("Save as Markdown", () => "conversation.md", () => markdown(conversation, connection.model)),
  saveButton(
    "Save as JSON",
    () => "conversation.json",
    () => json(conversation, connection.model),
    (text) => stage.fault(text),
  ),
);
byId("anew").addEventListener("click", anew);
byId("describe").addEventListener("click", () => {
  const video = conversation.video;
  if (video) describe(video, byId("cut").value, page());
});
connection.connect();
await restore();
listen(take);
suggest();
