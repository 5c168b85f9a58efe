// OpenAI's npm client: chats and responses.

import OpenAI from "openai";
import { SCHEMA, call, check, run, same, says } from "./tour.mjs";

const client = (url) => new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const user = (...answers) => ({ role: "user", content: says(...answers) });
const tool = { type: "function", function: { name: "look", parameters: SCHEMA, strict: true } };
const responseTool = { type: "function", name: "look", parameters: SCHEMA, strict: true };

async function text(url) {
  const chat = await client(url).chat.completions.create({ model: "default", messages: [user("Hello")] });
  same(chat.choices[0].message.content, "Hello");
  const made = await client(url).responses.create({ model: "default", input: says("Hello") });
  same(made.output_text, "Hello");
}

async function stream(url) {
  const events = await client(url).chat.completions.create({
    model: "default", messages: [user("one two three")], stream: true,
  });
  let said = "";
  for await (const chunk of events) said += chunk.choices[0]?.delta?.content ?? "";
  same(said, "one two three");
  const made = client(url).responses.stream({ model: "default", input: says("one two three") });
  same((await made.finalResponse()).output_text, "one two three");
}

async function tools(url) {
  const messages = [user(call("look", { path: "a.txt" }), "It says hi")];
  const first = await client(url).chat.completions.create({ model: "default", messages, tools: [tool] });
  const message = first.choices[0].message;
  same(JSON.parse(message.tool_calls[0].function.arguments), { path: "a.txt" });
  messages.push(message, { role: "tool", tool_call_id: message.tool_calls[0].id, content: "hi" });
  const second = await client(url).chat.completions.create({ model: "default", messages, tools: [tool] });
  same(second.choices[0].message.content, "It says hi");
  const asked = says(call("look", { path: "a.txt" }), "It says hi");
  const made = await client(url).responses.create({ model: "default", input: asked, tools: [responseTool] });
  const output = [{ type: "function_call_output", call_id: made.output[0].call_id, output: "hi" }];
  const next = await client(url).responses.create({
    model: "default", input: output, tools: [responseTool], previous_response_id: made.id,
  });
  same(next.output_text, "It says hi");
}

async function tools_streamed(url) {
  const runner = client(url).chat.completions.stream({
    model: "default", messages: [user(call("look", { path: "a b c" }))], tools: [tool],
  });
  const message = await runner.finalMessage();
  same(JSON.parse(message.tool_calls[0].function.arguments), { path: "a b c" });
}

async function typed(url) {
  const format = { type: "json_schema", json_schema: { name: "look", schema: SCHEMA, strict: true } };
  const chat = await client(url).chat.completions.parse({
    model: "default", messages: [user('{"path": "a.txt"}')], response_format: format,
  });
  same(JSON.parse(chat.choices[0].message.content), { path: "a.txt" });
  const made = await client(url).responses.parse({
    model: "default", input: says('{"path": "a.txt"}'),
    text: { format: { type: "json_schema", name: "look", schema: SCHEMA, strict: true } },
  });
  same(made.output_parsed, { path: "a.txt" });
}

async function conversation(url) {
  const first = await client(url).responses.create({ model: "default", input: says("One") });
  const second = await client(url).responses.create({
    model: "default", input: says("Two"), previous_response_id: first.id,
  });
  check(second.usage.input_tokens_details.cached_tokens >= first.usage.total_tokens - 2, "the first turn is cached");
}

async function errors(url) {
  for (const [fields, status] of [[{ model: "other" }, 404], [{ top_p: 7 }, 400]]) {
    try {
      await client(url).chat.completions.create({ model: "default", messages: [user("Hi")], ...fields });
    } catch (error) {
      check(error instanceof OpenAI.APIError && error.status === status, `${error} has status ${status}`);
      continue;
    }
    throw new Error("no error");
  }
}

async function cancel(url) {
  const abort = new AbortController();
  const events = await client(url).chat.completions.create(
    { model: "default", messages: [user("word ".repeat(20000))], stream: true }, { signal: abort.signal },
  );
  let count = 0;
  for await (const chunk of events) if ((count += 1) === 3) abort.abort();
  check(count < 1000, "the stream ended early");
}

await run({ text, stream, tools, tools_streamed, typed, conversation, errors, cancel });
