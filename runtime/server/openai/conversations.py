"""Conversations that continue from the generated tokens instead of a new rendering of their text.

A client sends the whole conversation every time. Its rendering may give other tokens than those that were generated: a
template may drop earlier reasoning or write calls differently, and a text has many tokenisations. Therefore the token
path of every answer is kept; its key is the rendering of the conversation up to that answer. The next request continues
from the path of the longest known part of its conversation, and only the new messages are rendered.
"""

from __future__ import annotations

import hashlib
import os
import threading
from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from ramet.errors import InvalidRequest
from ramet.runtime.text.chat_encoding import encode_marked, render_marked
from ramet.runtime.text.tokenizer import Tokenizer

Json: TypeAlias = dict[str, Any]  # Any: JSON

MAX_PATHS = 4096
MAX_TOKENS = 4 << 20  # 16 MiB of token ids
_MAX_TRIED = 4  # number of earlier answers of a conversation that are looked up

_MARK = f"RametMark{os.urandom(6).hex()}"  # stands for an answer's content; random, so no client can send it


@dataclass(slots=True)
class TokenPath:
    """Prompt and answer as tokens, without the answer's closing tokens. `text`: the answer, to explain differences."""

    ids: array[int]
    opening: bytes  # key of the prompt that was answered
    text: str


class PathStore:
    """The most recently used paths, bounded in number and tokens. Thread-safe."""

    def __init__(self, max_paths: int = MAX_PATHS, max_tokens: int = MAX_TOKENS) -> None:
        self._max_paths = max_paths
        self._max_tokens = max_tokens
        self._paths: OrderedDict[bytes, TokenPath] = OrderedDict()
        self._answered: dict[bytes, bytes] = {}  # key of a prompt -> key of its last answer
        self._num_tokens = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._paths)

    def get(self, key: bytes) -> TokenPath | None:
        with self._lock:
            path = self._paths.get(key)
            if path is not None:
                self._paths.move_to_end(key)
            return path

    def answer_to(self, opening: bytes) -> TokenPath | None:
        """The last answer to a prompt."""
        with self._lock:
            return self._paths.get(self._answered.get(opening, b""))

    def put(self, key: bytes, path: TokenPath) -> None:
        with self._lock:
            self._remove(key)
            self._paths[key] = path
            self._answered[path.opening] = key
            self._num_tokens += len(path.ids)
            while len(self._paths) > self._max_paths or self._num_tokens > self._max_tokens:
                self._remove(next(iter(self._paths)))

    def _remove(self, key: bytes) -> None:
        path = self._paths.pop(key, None)
        if path is not None:
            self._num_tokens -= len(path.ids)
            if self._answered.get(path.opening) == key:
                del self._answered[path.opening]


@dataclass(slots=True)
class ChatPrompt:
    """A rendered conversation. `num_reused`: tokens taken from a path. `miss`: why there were not more, or None.

    `end`: the last characters of the prompt's text. They show whether reasoning is open.
    """

    ids: list[int]
    end: str
    messages: list[Json]
    tools: list[Json] | None
    variables: Mapping[str, Any]  # Any: JSON
    salt: str
    has_earlier_answer: bool
    is_continued: bool = False
    num_reused: int = 0
    miss: str | None = None
    opening: bytes = field(default=b"")


class Conversations:
    """Renders conversations for one tokenizer and template, and remembers their paths. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer, store: PathStore | None = None) -> None:
        self._tokenizer = tokenizer
        self._store = PathStore() if store is None else store  # an empty store is false

    def prompt(
        self,
        messages: list[Json],
        tools: list[Json] | None = None,
        variables: Mapping[str, Any] | None = None,  # Any: JSON
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        salt: str = "",
        appends: bool = True,
        max_prompt_tokens: int | None = None,
    ) -> ChatPrompt:
        """Token ids of a conversation. `appends`: continue an earlier answer's path if there is one.

        `max_prompt_tokens`: if a path would make the prompt longer than this, the conversation is rendered instead.
        Raises: InvalidRequest, as the chat template does.
        """
        text = render_marked(
            self._tokenizer,
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            continue_final_message=continue_final_message,
            variables=variables,
        )
        earlier = messages[:-1] if continue_final_message else messages
        has_earlier = any(message["role"] == "assistant" for message in earlier)
        prompt = ChatPrompt([], text[-64:], messages, tools, variables or {}, salt, has_earlier, continue_final_message)
        if has_earlier and appends and add_generation_prompt:
            self._append(prompt, max_prompt_tokens)
        elif has_earlier:
            prompt.miss = "the history is rendered anew, as asked"
        if not prompt.num_reused:
            prompt.ids = encode_marked(self._tokenizer, text)
        if not continue_final_message:
            opening = text if _bare(messages) == messages else self._render(_bare(messages), prompt, is_open=True)
            prompt.opening = self._key("opening", opening, salt)
        return prompt

    def remember(self, prompt: ChatPrompt, answer: Json, generated: Sequence[int]) -> None:
        """Keep the path of an answer: the message that the client will send back, and its generated tokens."""
        messages = [*prompt.messages, answer]
        if prompt.is_continued:
            last = prompt.messages[-1]
            messages = [*prompt.messages[:-1], {**answer, "content": last["content"] + answer["content"]}]
        try:
            closed = self._render(_bare(messages), prompt, is_open=False)
        except InvalidRequest:  # a template that cannot show this answer will refuse the conversation, too
            return
        path = TokenPath(array("i", [*prompt.ids, *generated]), prompt.opening, str(answer["content"]))
        self._store.put(self._key("closed", closed, prompt.salt), path)

    def _append(self, prompt: ChatPrompt, max_prompt_tokens: int | None) -> None:
        """Use the longest known path and render the messages after it, or record why there is no path."""
        ends = [i + 1 for i, message in enumerate(prompt.messages) if message["role"] == "assistant"]
        for count in reversed(ends[-_MAX_TRIED:]):
            try:
                closed = self._render(_bare(prompt.messages[:count]), prompt, is_open=False)
            except InvalidRequest:
                continue
            path = self._store.get(self._key("closed", closed, prompt.salt))
            if path is None:
                prompt.miss = prompt.miss or self._difference(prompt, count)
                continue
            new = self._text_after(prompt, count)
            if new is None:
                prompt.miss = f"the chat template does not let message {count - 1} be continued by appending"
                continue
            ids = [*path.ids, *encode_marked(self._tokenizer, new, continues=True)]
            if max_prompt_tokens is not None and len(ids) > max_prompt_tokens:
                prompt.miss = (
                    f"with all that was generated the prompt has {len(ids):,} tokens, too many for the context"
                )
                return
            prompt.ids, prompt.num_reused = ids, len(path.ids)
            return

    def _difference(self, prompt: ChatPrompt, count: int) -> str:
        """The reason why the answer at the end of `messages[:count]` has no path."""
        index = count - 1
        try:
            opening = self._render(_bare(prompt.messages[:index]), prompt, is_open=True)
        except InvalidRequest:
            return f"message {index} (assistant) was not generated here, or too long ago"
        known = self._store.answer_to(self._key("opening", opening, prompt.salt))
        if known is None:
            return f"the conversation up to message {index} (assistant) was not seen here, or too long ago"
        given, sent = known.text, str(prompt.messages[index]["content"])
        at = next((i for i, (a, b) in enumerate(zip(given, sent, strict=False)) if a != b), min(len(given), len(sent)))
        if given == sent:
            return f"message {index} (assistant) has the answer's text, but other tool calls or fields"
        return f"message {index} (assistant) is not the answer that was given: it differs at character {at}"

    def _text_after(self, prompt: ChatPrompt, count: int) -> str | None:
        """Render everything after the content of message `count - 1`.

        Returns None if the template refuses these messages or changes what stands before that content.
        """
        before, last, rest = prompt.messages[: count - 1], prompt.messages[count - 1], prompt.messages[count:]
        plain = {key: value for key, value in last.items() if key not in ("tool_calls", "reasoning_content")}
        plain["content"] = _MARK
        try:
            closing = _after_mark(self._render([*before, plain], prompt, is_open=False))
            if last.get("tool_calls"):
                calls = [*last["tool_calls"][:-1], _marked_call(last["tool_calls"][-1])]
                plain = {**last, "tool_calls": calls}
            alone = _after_mark(self._render([*before, plain], prompt, is_open=False))
            whole = _after_mark(self._render([*before, plain, *rest], prompt, is_open=True))
        except InvalidRequest:
            return None
        if closing is None or alone is None or whole is None or not whole.startswith(alone):
            return None
        return closing + whole[len(alone) :]

    def _render(self, messages: Sequence[Json], prompt: ChatPrompt, *, is_open: bool) -> str:
        return render_marked(
            self._tokenizer,
            messages,
            add_generation_prompt=is_open,
            tools=prompt.tools,
            variables=prompt.variables,
        )

    def _key(self, kind: str, text: str, salt: str) -> bytes:
        return hashlib.sha256(f"{kind} {len(salt)} {salt} {text}".encode("utf-8", "surrogatepass")).digest()


def _bare(messages: Sequence[Json]) -> list[Json]:
    """The messages without reasoning, because only some clients send it back."""
    return [{k: v for k, v in message.items() if k != "reasoning_content"} for message in messages]


def _after_mark(text: str) -> str | None:
    at = text.rfind(_MARK)
    return None if at < 0 else text[at + len(_MARK) :]


def _marked_call(call: Json) -> Json:
    return {**call, "function": {**call["function"], "arguments": {_MARK: _MARK}}}
