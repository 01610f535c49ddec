// What Node's clients make of a server: one line of JSON for each thing that they were asked to do.
// node clients.mjs BASE_URL IMAGE
import fs from "node:fs";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { Output, embed, generateObject, generateText, stepCountIs, streamText, tool } from "ai";
import OpenAI from "openai";
import { z } from "zod";

globalThis.AI_SDK_LOG_WARNINGS = false;
const [, , baseURL, file] = process.argv;
const settings = { baseURL, apiKey: "unused" };
const image = fs.readFileSync(file);
const question = { type: "text", text: "What is in the image?" };
const url = `data:image/png;base64,${image.toString("base64")}`;

async function tell(name, ask) {
  let told;
  try {
    told = { value: await ask() };
  } catch (error) {
    told = { error: `${error.name}: ${error.message}` };
  }
  console.log(JSON.stringify({ name, ...told }));
}

const openai = new OpenAI(settings);
const messages = [{ role: "user", content: [question, { type: "image_url", image_url: { url } }] }];
const count = { name: "count", parameters: { type: "object", properties: {} } };
const run = { ...count, function: () => "3", parse: JSON.parse };
const tools = [{ type: "function", function: run }];
const asked = { model: "demo", messages };
await tell("openai: chat", async () => {
  return (await openai.chat.completions.create(asked)).choices[0].message.content;
});
await tell("openai: stream", async () => {
  let text = "";
  for await (const chunk of await openai.chat.completions.create({ ...asked, stream: true }))
    text += chunk.choices[0]?.delta?.content ?? "";
  return text;
});
await tell("openai: runTools", () => openai.chat.completions.runTools({ ...asked, tools }).finalContent());
await tell("openai: runTools, stream", () =>
  openai.chat.completions.runTools({ ...asked, tools, stream: true }).finalContent());
await tell("openai: runTools, forced", async () => {
  const choice = { type: "function", function: { name: "count" } };
  const runner = openai.chat.completions.runTools({ ...asked, tools, tool_choice: choice });
  return await runner.finalFunctionToolCallResult();
});
await tell("openai: responses", async () => {
  const content = [
    { type: "input_text", text: question.text },
    { type: "input_image", image_url: url },
  ];
  const response = await openai.responses.create({ model: "demo", input: [{ role: "user", content }] });
  return response.output_text;
});

const schema = z.object({ shape: z.enum(["circle", "square", "triangle"]), count: z.number().int() });
const turn = [{ role: "user", content: [question, { type: "image", image }] }];
const own = { count: tool({ inputSchema: z.object({}), execute: async () => "3" }) };
const compatible = createOpenAICompatible({ name: "local", ...settings });
const official = createOpenAI(settings);
for (const [name, model] of [
  ["compatible", compatible("demo")],
  ["openai chat", official.chat("demo")],
  ["openai responses", official("demo")],
]) {
  const given = { model, messages: turn };
  await tell(`ai, ${name}: text`, async () => (await generateText(given)).text);
  await tell(`ai, ${name}: stream`, async () => await streamText(given).text);
  await tell(`ai, ${name}: object`, async () => (await generateObject({ ...given, schema })).object);
  await tell(`ai, ${name}: output`, async () => {
    return (await generateText({ ...given, output: Output.object({ schema }) })).output;
  });
  await tell(`ai, ${name}: tools`, async () => {
    return (await generateText({ ...given, tools: own, stopWhen: stepCountIs(3) })).text;
  });
  await tell(`ai, ${name}: required`, async () => {
    const asked = { ...given, tools: own, toolChoice: "required", stopWhen: stepCountIs(2) };
    return (await generateText(asked)).toolResults[0].output;
  });
  await tell(`ai, ${name}: required, stream`, async () => {
    const asked = { ...given, tools: own, toolChoice: { type: "tool", toolName: "count" } };
    return (await streamText(asked).toolResults)[0].output;
  });
  await tell(`ai, ${name}: second turn`, async () => {
    const first = (await generateText(given)).response.messages;
    const next = { role: "user", content: "How many shapes are there?" };
    return (await generateText({ model, messages: [...turn, ...first, next] })).text;
  });
}
await tell("ai: embed", async () => {
  const model = compatible.embeddingModel("demo");
  return (await embed({ model, value: "a red circle" })).embedding.length;
});
