"""A conversation goes on from the tokens that were generated, also where the template writes them differently."""

from __future__ import annotations

from typing import Any

from ramet.runtime.server.openai.conversations import Conversations, PathStore
from ramet.runtime.testing.byte_tokenizer import ByteTokenizer
from ramet.runtime.text.chat_template import ChatTemplate

Client = Any  # of conftest.py
# Drops the reasoning of earlier answers, as Qwen3's template does.
DROPS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1].lstrip('\n') }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HI: dict[str, Any] = {"role": "user", "content": "Hi"}
MORE: dict[str, Any] = {"role": "user", "content": "More"}


def talk(client: Client, answer: str, **fields: Any) -> tuple[list[int], dict[str, Any]]:
    messages = [HI, {"role": "assistant", "content": answer}, MORE]
    result = client.chat(messages=messages, **fields)
    return client.engine.submitted[-1].prompt_ids, result["usage"]["history"]


def test_reasoning_that_the_template_drops_stays_in_the_path(make_client: Any) -> None:
    client = make_client(DROPS)
    said = "<think>\nhm\n</think>\n\nYes."
    client.engine.says(said)
    client.engine.cached_tokens = 4000
    client.chat()
    first = client.engine.submitted[-1].prompt_ids
    ids, history = talk(client, "Yes.")
    assert ids[: len(first) + len(said)] == [*first, *said.encode()]
    end = client.tokenizer.decode(ids[len(first) + len(said) :])
    assert end == "<|im_end|>\n<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\n"
    assert history == {"reused_tokens": len(first) + len(said), "reason": None}


def test_why_nothing_is_reused_is_said(make_client: Any) -> None:
    client = make_client(DROPS)
    client.engine.says("Yes.")
    client.chat()
    _, history = talk(client, "Yet.")
    assert history["reused_tokens"] == 0
    assert "message 1 (assistant)" in history["reason"]
    assert "differs at character 2" in history["reason"]
    _, history = talk(client, "Yes.", cache_salt="other")
    assert "not seen here" in history["reason"]
    _, history = talk(client, "Yes.", history="render")
    assert history == {"reused_tokens": 0, "reason": "the history is rendered anew, as asked"}
    client.engine.hello.context_length = 40
    _, history = talk(client, "Yes.")
    assert "too many for the context" in history["reason"]


def test_calls_that_the_template_writes_anew_stay_in_the_path(client: Client) -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    said = '<tool_call> {"name":"add","arguments":{"a":1}} </tool_call>'
    client.engine.says(said)
    call = client.chat(tools=tools)["choices"][0]["message"]["tool_calls"][0]
    first = client.engine.submitted[-1].prompt_ids
    messages = [
        HI,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": "2"},
    ]
    usage = client.chat(messages=messages, tools=tools)["usage"]
    assert usage["history"]["reused_tokens"] == len(first) + len(said)
    assert client.engine.submitted[-1].prompt_ids[: len(first) + len(said)] == [*first, *said.encode()]


def test_reasoning_sent_back_by_a_client_makes_no_difference(make_client: Any) -> None:
    client = make_client(DROPS)
    client.engine.says("<think>hm</think>Yes.")
    client.chat()
    messages = [HI, {"role": "assistant", "content": "Yes.", "reasoning_content": "hm"}, MORE]
    assert client.chat(messages=messages)["usage"]["history"]["reused_tokens"] > 0


def test_a_stop_string_is_no_part_of_the_path(client: Client, replay: Any) -> None:
    def script(command: Any) -> Any:
        said = replay(command, "Yes.END", cuts=[4], stop="END")
        said[1].text = ""
        return said

    client.engine.script = script
    client.chat(stop="END")
    first = client.engine.submitted[-1].prompt_ids
    _, history = talk(client, "Yes.")
    assert history["reused_tokens"] == len(first) + 4


def test_the_store_is_bounded_and_forgets_what_was_used_longest_ago() -> None:
    tokenizer = ByteTokenizer()
    tokenizer.chat_template = ChatTemplate(DROPS)
    store = PathStore(max_paths=3, max_tokens=10_000)
    conversations = Conversations(tokenizer, store)

    def turn(text: str) -> int:
        prompt = conversations.prompt([{"role": "user", "content": text}])
        conversations.remember(prompt, {"role": "assistant", "content": "ok"}, list(b"ok"))
        messages = [{"role": "user", "content": "0"}, {"role": "assistant", "content": "ok"}, MORE]
        return conversations.prompt(messages).num_reused

    assert all(turn(str(number)) for number in range(6))  # the first one is used all the time
    assert len(store) == 3
    small = PathStore(max_paths=100, max_tokens=50)
    conversations = Conversations(tokenizer, small)
    assert turn("x" * 100) == 0
    assert len(small) == 0
