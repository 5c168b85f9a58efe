// The AI SDK with its providers for chats, responses and Anthropic's messages.

import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";
import { call, check, run, same, says } from "./tour.mjs";

const models = (url, name = "default") => {
  const openai = createOpenAI({ baseURL: `${url}/v1`, apiKey: "none" });
  const anthropic = createAnthropic({ baseURL: `${url}/v1`, apiKey: "none" });
  const compatible = createOpenAICompatible({ name: "here", baseURL: `${url}/v1`, supportsStructuredOutputs: true });
  return [
    openai.chat(name), openai.responses(name), compatible(name),
    anthropic(name === "default" ? "claude-any" : name),
  ];
};
const look = tool({
  description: "Look at a file", inputSchema: z.object({ path: z.string() }), execute: async ({ path }) => `${path} says hi`,
});

async function text(url) {
  for (const model of models(url)) same((await generateText({ model, prompt: says("Hello") })).text, "Hello");
}

async function stream(url) {
  for (const model of models(url)) {
    let said = "";
    for await (const piece of streamText({ model, prompt: says("one two three") }).textStream) said += piece;
    same(said, "one two three");
  }
}

async function tools(url) {
  for (const model of models(url)) {
    const prompt = says(call("look", { path: "a.txt" }), "It says hi");
    const made = await generateText({ model, prompt, tools: { look }, stopWhen: stepCountIs(3) });
    same(made.text, "It says hi");
    same(made.steps.length, 2);
  }
}

async function tools_streamed(url) {
  for (const model of models(url)) {
    const made = streamText({ model, prompt: says(call("look", { path: "a b c" }), "Done"), tools: { look } });
    same((await made.toolCalls)[0].input, { path: "a b c" });
  }
}

async function typed(url) {
  const output = Output.object({ schema: z.object({ name: z.string() }) });
  for (const model of models(url).slice(0, 3)) {
    same((await generateText({ model, prompt: says('{"name": "Ada"}'), output })).output, { name: "Ada" });
  }
}

async function conversation(url) {
  for (const model of models(url)) {
    const messages = [{ role: "user", content: says("One") }];
    const first = await generateText({ model, messages });
    messages.push(...first.response.messages, { role: "user", content: says("Two") });
    const { usage } = await generateText({ model, messages });
    const cached = usage.inputTokenDetails?.cacheReadTokens ?? usage.cachedInputTokens;
    check(cached > 0.4 * usage.inputTokens, `${cached} of ${usage.inputTokens} tokens are cached`);
  }
}

async function reasoning(url) {
  for (const model of models(url).slice(1)) {
    const providerOptions = { openai: { reasoningSummary: "auto", forceReasoning: true } };
    const made = await generateText({ model, prompt: says("<think>Hm</think>Done"), providerOptions });
    same([made.reasoningText, made.text], ["Hm", "Done"]);
  }
}

async function errors(url) {
  for (const model of models(url, "other")) {
    try {
      await generateText({ model, prompt: "Hi", maxRetries: 0 });
    } catch (error) {
      check(APICallError.isInstance(error) && error.statusCode === 404, String(error));
      continue;
    }
    throw new Error("no error");
  }
}

await run({ text, stream, tools, tools_streamed, typed, conversation, reasoning, errors });
