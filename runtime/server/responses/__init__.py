"""OpenAI's Responses API, on top of chat completions."""
