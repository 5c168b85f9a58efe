// The official npm client against a server of ours: `node smollm2.mjs http://127.0.0.1:30000 MODEL`.
// Prints one JSON line for each stop of the tour, {"name", "error"}; exit status 1 when one failed.
import assert from "node:assert/strict";
import OpenAI from "openai";

const [url, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0, timeout: 60_000 });
// The prompts of what is compared are computed once before: near a tie, a cached prompt may be answered otherwise.
const chat = (fields) => client.chat.completions.create({ model, temperature: 0, max_tokens: 24, ...fields });
const user = (content) => [{ role: "user", content }];
const WEATHER = {
  type: "function",
  function: {
    name: "get_weather",
    description: "The weather in a city.",
    parameters: {
      type: "object",
      properties: { city: { enum: ["Paris", "Rome"] }, days: { type: "integer", minimum: 1, maximum: 7 } },
      required: ["city", "days"],
      additionalProperties: false,
    },
  },
};
const TIME = {
  type: "function",
  function: { name: "get_time", parameters: { type: "object", properties: {}, additionalProperties: false } },
};

function checkCall(call) {
  assert.equal(call.type, "function");
  assert.ok(call.id);
  assert.equal(call.function.name, "get_weather");
  const given = JSON.parse(call.function.arguments);
  assert.ok(["Paris", "Rome"].includes(given.city));
  assert.ok(Number.isInteger(given.days) && given.days >= 1 && given.days <= 7);
}

async function info() {
  return (await fetch(`${url}/get_server_info`)).json();
}

async function settled() {
  for (let i = 0; i < 200; i++) {
    const { in_flight, stats } = await info();
    if (!in_flight && stats.num_running === 0 && stats.num_waiting === 0) {
      assert.equal(stats.num_free_pages + stats.num_evictable_pages, stats.num_pages);
      return;
    }
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  assert.fail("the engine does not come to rest");
}

async function refused(fields, kind, param) {
  await assert.rejects(chat({ messages: user("Hi"), ...fields }), (error) => {
    assert.ok(error instanceof kind, `${error}`);
    assert.equal(error.param, param);
    return true;
  });
}

const TOUR = {
  async models() {
    const list = await client.models.list();
    assert.deepEqual(list.data.map((card) => card.id), [model]);
    assert.equal((await client.models.retrieve(model)).id, model);
  },
  async chat() {
    const answer = await chat({ messages: user("Name a river.") });
    assert.equal(answer.object, "chat.completion");
    assert.equal(answer.choices[0].message.role, "assistant");
    assert.ok(answer.choices[0].message.content.length > 5);
    assert.equal(typeof answer.usage.prompt_tokens_details.cached_tokens, "number");
    assert.equal(answer.usage.completion_tokens_details.reasoning_tokens, 0);
  },
  async stream() {
    const fields = { messages: user("Name a river.") };
    await chat(fields);
    const whole = await chat(fields);
    let text = "";
    let usage = null;
    for await (const chunk of await chat({ ...fields, stream: true, stream_options: { include_usage: true } })) {
      text += chunk.choices[0]?.delta?.content ?? "";
      usage = chunk.usage ?? usage;
    }
    assert.equal(text, whole.choices[0].message.content);
    assert.equal(usage.completion_tokens, whole.usage.completion_tokens);
    assert.ok(usage.prompt_tokens_details.cached_tokens > 0);
    const final = await client.chat.completions.stream({ model, temperature: 0, max_tokens: 24, ...fields }).finalContent();
    assert.equal(final, text);
  },
  async conversation() {
    const first = await chat({ messages: user("Name a river in Africa.") });
    const messages = [...user("Name a river in Africa."), first.choices[0].message, ...user("How long is it?")];
    const { usage } = await chat({ messages });
    assert.equal(usage.history.reason, null);
    assert.ok(usage.prompt_tokens_details.cached_tokens >= usage.history.reused_tokens - 1);
  },
  async tools_none() {
    const answer = await chat({ messages: user("Hi"), tools: [WEATHER], tool_choice: "none" });
    assert.equal(answer.choices[0].message.tool_calls, undefined);
    assert.ok(answer.choices[0].message.content);
  },
  async tools_auto() {
    const answer = await chat({ messages: user("What is the weather in Paris?"), tools: [WEATHER], max_tokens: 80 });
    const { message, finish_reason } = answer.choices[0];
    if (finish_reason === "tool_calls") message.tool_calls.forEach(checkCall);
    else assert.ok(message.content);
  },
  async tools_required() {
    const fields = { messages: user("The weather in Rome?"), tools: [WEATHER, TIME], tool_choice: "required" };
    const answer = await chat({ ...fields, tools: [WEATHER], parallel_tool_calls: false, max_tokens: 80 });
    assert.equal(answer.choices[0].finish_reason, "tool_calls");
    assert.equal(answer.choices[0].message.tool_calls.length, 1);
    checkCall(answer.choices[0].message.tool_calls[0]);
  },
  async tools_named() {
    const fields = {
      messages: user("What time is it?"),
      tools: [TIME, WEATHER],
      tool_choice: { type: "function", function: { name: "get_weather" } },
      max_tokens: 80,
    };
    await chat(fields);
    const whole = await chat(fields);
    checkCall(whole.choices[0].message.tool_calls[0]);
    const stream = client.chat.completions.stream({ model, temperature: 0, ...fields });
    const streamed = await stream.finalChatCompletion();
    assert.equal(streamed.choices[0].finish_reason, "tool_calls");
    const [a, b] = [whole, streamed].map((answer) => answer.choices[0].message.tool_calls[0].function);
    assert.deepEqual([a.name, a.arguments], [b.name, b.arguments]);
  },
  async parallel_calls() {
    const bias = await biasTowardsMore();
    const answer = await chat({
      messages: user("The weather in Paris and in Rome?"),
      tools: [WEATHER],
      tool_choice: "required",
      max_tokens: 120,
      logit_bias: bias,
    });
    const calls = answer.choices[0].message.tool_calls;
    assert.ok(calls.length >= 2, JSON.stringify(calls));
    assert.equal(new Set(calls.map((call) => call.id)).size, calls.length);
    calls.filter((call) => !call.incomplete).forEach(checkCall);
    if (calls.some((call) => call.incomplete)) assert.equal(answer.choices[0].finish_reason, "length");
  },
  async tool_result() {
    const call = { id: "call_1", type: "function", function: { name: "get_weather", arguments: '{"city":"Rome","days":1}' } };
    const messages = [
      ...user("The weather in Rome?"),
      { role: "assistant", content: null, tool_calls: [call] },
      { role: "tool", tool_call_id: "call_1", content: "sunny" },
    ];
    const answer = await chat({ messages, tools: [WEATHER], tool_choice: "none" });
    assert.ok(answer.choices[0].message.content);
  },
  async json_schema() {
    const schema = {
      type: "object",
      properties: { name: { type: "string", maxLength: 20 }, length_km: { type: "integer" } },
      required: ["name", "length_km"],
      additionalProperties: false,
    };
    const response_format = { type: "json_schema", json_schema: { name: "river", schema, strict: true } };
    const answer = await chat({ messages: user("Describe a river."), response_format, max_tokens: 80 });
    const value = JSON.parse(answer.choices[0].message.content);
    assert.deepEqual(Object.keys(value), ["name", "length_km"]);
    assert.ok(Number.isInteger(value.length_km));
    assert.equal(answer.choices[0].finish_reason, "stop");
  },
  async json_object() {
    const fields = { messages: user("Describe a river as JSON."), response_format: { type: "json_object" } };
    const answer = await chat({ ...fields, max_tokens: 60 });
    assert.equal(typeof JSON.parse(answer.choices[0].message.content), "object");
  },
  async logprobs() {
    const answer = await chat({ messages: user("Hi"), max_tokens: 5, logprobs: true, top_logprobs: 3 });
    const { content } = answer.choices[0].logprobs;
    assert.equal(content.length, answer.usage.completion_tokens);
    for (const entry of content) {
      assert.ok(entry.logprob <= 0);
      assert.equal(entry.top_logprobs.length, 3);
      assert.equal(entry.top_logprobs[0].token, entry.token);
      assert.ok(Array.isArray(entry.bytes));
    }
  },
  async several_choices() {
    const answer = await chat({ messages: user("Say a word."), n: 3, seed: 1, temperature: 1.2, max_tokens: 8 });
    assert.deepEqual(answer.choices.map((choice) => choice.index), [0, 1, 2]);
    assert.ok(new Set(answer.choices.map((choice) => choice.message.content)).size > 1);
    const again = await chat({ messages: user("Say a word."), seed: 2, temperature: 1.2, max_tokens: 8 });
    assert.equal(again.choices[0].message.content, answer.choices[1].message.content);
  },
  async stop() {
    const fields = { messages: user("Count: one, two, three, four, five.") };
    await chat(fields);
    const text = (await chat(fields)).choices[0].message.content;
    const stop = text.slice(6, 9);
    const stopped = await chat({ ...fields, stop });
    assert.equal(stopped.choices[0].message.content, text.slice(0, text.indexOf(stop)));
    assert.equal(stopped.choices[0].finish_reason, "stop");
    assert.equal(stopped.choices[0].matched_stop, stop);
  },
  async completions() {
    const fields = { model, prompt: "The capital of France is", max_tokens: 6, temperature: 0 };
    await client.completions.create(fields);
    const whole = await client.completions.create(fields);
    let text = "";
    for await (const chunk of await client.completions.create({ ...fields, stream: true })) {
      text += chunk.choices[0].text;
    }
    assert.equal(text, whole.choices[0].text);
    assert.match(text, /Paris/);
  },
  async errors() {
    await refused({ top_p: 7 }, OpenAI.BadRequestError, "top_p");
    await refused({ foo: 1 }, OpenAI.BadRequestError, "foo");
    await refused({ model: "gpt-9" }, OpenAI.NotFoundError, "model");
    await refused({ messages: user("x ".repeat(9000)) }, OpenAI.BadRequestError, "messages");
    await refused({ messages: user("x ".repeat(9000)), stream: true }, OpenAI.BadRequestError, "messages");
    await assert.rejects(client.models.retrieve("gpt-9"), OpenAI.NotFoundError);
  },
  async abort() {
    const stream = await chat({ messages: user("Tell a long story."), max_tokens: 4000, stream: true, ignore_eos: true });
    for await (const chunk of stream) {
      if (chunk.choices[0].delta.content) break; // leaving the loop closes the socket
    }
    const controller = new AbortController();
    const whole = client.chat.completions.create(
      { model, messages: user("Tell a long story."), max_tokens: 4000, ignore_eos: true },
      { signal: controller.signal },
    );
    setTimeout(() => controller.abort(), 300);
    await assert.rejects(whole, OpenAI.APIUserAbortError);
    await settled();
  },
};

// A model this small rarely goes on to a second call: what begins one is made likelier than what ends the list.
async function biasTowardsMore() {
  const response = await fetch(`${url}/v1/tokenize`, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ prompt: "]", add_special_tokens: false }),
  });
  const { tokens } = await response.json();
  return Object.fromEntries(tokens.map((token) => [token, -100]));
}

let failed = false;
for (const [name, stop] of Object.entries(TOUR)) {
  let error = null;
  try {
    await stop();
  } catch (caught) {
    error = `${caught?.stack ?? caught}`;
    failed = true;
  }
  console.log(JSON.stringify({ name, error }));
}
process.exit(failed ? 1 : 0);
