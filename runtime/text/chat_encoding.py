"""A conversation as token ids, in which only the chat template can write special tokens.

A conversation is rendered to text, and that text is parsed for special tokens. So a message that spells `<|im_end|>`
could end its own turn and forge the next one. To prevent this, such spellings are put between marks before rendering,
and marked spellings are encoded as plain text.
Source: transformers 5's `sanitize_control_tokens` for the idea of marking what comes from outside.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ramet.runtime.text.chat_template import Message, ToolSchema
from ramet.runtime.text.tokenizer import Tokenizer

# The marks: private-use characters, which are first removed from outside text.
_OPEN, _CLOSE = "\uf8f0", "\uf8f1"


def render_marked(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
    tools: Sequence[ToolSchema] | None = None,
    continue_final_message: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Render a conversation by the tokenizer's chat template, with marks for `encode_marked`.

    Parameters and errors are those of `ChatTemplate.render`.
    """
    spelled = _spellings(tokenizer)
    return tokenizer.chat_template.render(
        [_marked(message, spelled) for message in messages],
        add_generation_prompt=add_generation_prompt,
        tools=None if tools is None else [_marked(tool, spelled) for tool in tools],
        continue_final_message=continue_final_message,
        variables=None if variables is None else _marked(variables, spelled),
    )


def encode_marked(tokenizer: Tokenizer, text: str, *, continues: bool = False) -> list[int]:
    """Return the token ids of a marked text, or of a piece of one. `continues`: it follows other text."""
    if _OPEN not in text and _CLOSE not in text:
        return tokenizer.encode(text, parse_special=True, continues=continues)
    spelled = _spellings(tokenizer)
    # A template may cut a string anywhere. A mark without its partner is dropped, but still divides the text there.
    pieces = re.split(f"({_OPEN}(?:{spelled.pattern}){_CLOSE})|[{_OPEN}{_CLOSE}]", text)
    runs: list[str | int] = []
    for index, piece in enumerate(pieces):
        if not piece:
            continue
        if index % 2:
            _append_text(runs, piece[1:-1])
            continue
        start = 0
        for match in spelled.finditer(piece):
            _append_text(runs, piece[start : match.start()])
            runs.append(tokenizer.special_tokens[match[0]])
            start = match.end()
        _append_text(runs, piece[start:])
    ids: list[int] = []
    for index, run in enumerate(runs):
        ids += [run] if isinstance(run, int) else tokenizer.encode(run, continues=continues and index == 0)
    return ids


def _spellings(tokenizer: Tokenizer) -> re.Pattern[str]:
    names = sorted(tokenizer.special_tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)) or "(?!)")  # (?!) never matches


def _append_text(runs: list[str | int], text: str) -> None:
    """Append text, and merge it with a last run of text, because adjoining text is tokenised together."""
    if runs and isinstance(runs[-1], str):
        runs[-1] += text
    elif text:
        runs.append(text)


def _marked(value: Any, spelled: re.Pattern[str]) -> Any:
    """Return a copy of a JSON value with special spellings between marks. Keys of objects stay unchanged."""
    if isinstance(value, str):
        plain = value.replace(_OPEN, "").replace(_CLOSE, "")
        return spelled.sub(lambda match: f"{_OPEN}{match[0]}{_CLOSE}", plain)
    if isinstance(value, Mapping):
        return {key: _marked(item, spelled) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_marked(item, spelled) for item in value]
    return value
