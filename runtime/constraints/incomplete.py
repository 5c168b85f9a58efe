"""What is said of a constrained text that a limit of tokens ended: the whole text, or a string in it."""

from __future__ import annotations

import json
from collections.abc import Sequence

_STRINGS = json.JSONDecoder()


def cut_off(max_tokens: int, shortest: int) -> str:
    """Return why the text is incomplete. shortest: tokens of the grammar's shortest text, as far as it is known."""
    cut = f"it was cut by max_tokens ({max_tokens:,}) before it was complete"
    if shortest <= max_tokens:
        return f"{cut}; raise max_tokens"
    return f"{cut}: the shortest text found for its constraint takes {shortest:,} tokens; raise max_tokens to that"


def strings_ended(string_tokens: int, places: Sequence[str]) -> str:
    """Return which strings of a text are incomplete. places: their JSON pointers."""
    named = ", ".join(place or "the whole value" for place in dict.fromkeys(places))
    return f"string_tokens ({string_tokens:,}) ended the string at {named}; raise it for longer ones"


def place_of(text: str) -> str:
    """Return the JSON pointer of the value in which the beginning of a JSON text ends; in a key, of its object."""
    path: list[str | int | None] = []  # of open objects the current key, None if it must come; of arrays the index
    at = 0
    while at < len(text):
        char, at = text[at], at + 1
        if char == '"':
            try:
                string, at = _STRINGS.raw_decode(text, at - 1)
            except json.JSONDecodeError:
                break  # the text ends in this string
            if path and path[-1] is None:
                path[-1] = string
        elif char in "{[":
            path.append(None if char == "{" else 0)
        elif char in "}]" and path:
            path.pop()
        elif char == "," and path:
            path[-1] = path[-1] + 1 if isinstance(path[-1], int) else None
    steps = [str(step).replace("~", "~0").replace("/", "~1") for step in path if step is not None]
    return "".join(f"/{step}" for step in steps)
