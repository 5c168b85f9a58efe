"""From the text of a branch to the tokens of a prompt: what is tokenised together, and which token is given back.

All text between two borders (a generation, a selection, a fork) is tokenised as one, however the program cut it into
pieces. Spellings of special tokens become these tokens in markup only, which is a chat template's text.

*Token healing*: a tokenizer splits a text as a whole, so a prompt that ends with a space or with half a word has a last
token that the model rarely saw before what it wants to write: it would write ` yes` as one token, after `Answer:`. The
last token of the author's text is therefore given back where the vocabulary has a longer one that begins with it, and
the model writes its bytes again, as part of any token that begins with them.

Where no token is given back, a value that is read from its text may begin with the space that prose has there
(`takes_space`).

The executor and the passes apply these rules; a backend that takes text alone leaves them to its server.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

P = TypeVar("P")  # a text, or what stands for one before a run
T = TypeVar("T")  # what a text becomes beside special tokens: tokens, or what stands for them before a run

GivenBack: TypeAlias = Callable[[int, int], bytes]


class Piece(NamedTuple, Generic[P]):
    """A piece of text that waits to be tokenised: a text, or what stands for one that is not known yet.

    With `is_markup` (a chat template's text), spellings of special tokens become these tokens. `node`: which added it,
    for passes.
    """

    text: P
    is_markup: bool = False
    node: int | None = None


def special_border(special_tokens: Iterable[str]) -> re.Pattern[str] | None:
    """Return the pattern of all spellings of special tokens, the longest first; None if there are none."""
    names = [re.escape(name) for name in sorted(special_tokens, key=len, reverse=True)]
    return re.compile(f"({'|'.join(names)})") if names else None


def tokenised(
    pieces: Sequence[Piece[P]],
    encode: Callable[[list[P], bool, bool], Iterable[T]],
    border: re.Pattern[str] | None,
    special_tokens: Mapping[str, int],
    *,
    is_start: bool,
) -> list[int | T]:
    """Return what adjoining pieces become.

    `encode(texts, add_special, continues)` is called for all text between two special tokens. `border`: see
    `special_border`. `is_start`: nothing stands before the pieces. The tokenizer's opening token is then added, unless
    markup comes first, which has its own.
    """
    runs: list[int | list[Any]] = []
    for text, is_markup, _ in pieces:
        parts: list[Any] = [text]  # Any: P, and spellings of special tokens
        if is_markup and border is not None and isinstance(text, str):
            parts = border.split(text)
        for index, part in enumerate(parts):
            if index % 2:
                runs.append(special_tokens[part])
            elif part != "" and runs and isinstance(runs[-1], list):
                runs[-1].append(part)
            elif part != "":
                runs.append([part])
    opens = is_start and bool(pieces) and not pieces[0][1]
    found: list[int | T] = []
    for index, run in enumerate(runs):
        is_first = is_start and index == 0
        found.extend([run] if isinstance(run, int) else encode(run, opens and is_first, not is_first))
    return found


def healing(token_bytes: Sequence[bytes]) -> GivenBack:
    """Return the rule for one vocabulary: `given_back(token, num_literal)`. `token_bytes`: empty for special tokens.

    It returns the bytes of a prompt's last token if that is given back, else b"". `num_literal`: the bytes of the
    author's own text at the prompt's end. A token that also holds other text, such as a chat template's, stays.
    """

    @cache
    def ordered() -> list[bytes]:
        return sorted({text for text in token_bytes if text})

    @cache
    def may_go_on(text: bytes) -> bool:
        """Return whether a longer token goes on with a letter or a digit; after white space, with anything."""
        try:
            is_space = text.decode()[-1].isspace()
        except UnicodeDecodeError:
            return False  # half of a character
        index = bisect.bisect_right(ordered(), text)
        while index < len(ordered()) and ordered()[index].startswith(text):
            rest = ordered()[index][len(text) :]
            if is_space or rest.decode(errors="replace")[0].isalnum():
                return True
            index += 1
        return False

    def given_back(token: int, num_literal: int) -> bytes:
        text = token_bytes[token]
        return text if text and len(text) <= num_literal and may_go_on(text) else b""

    return given_back


def takes_space(token: bytes) -> bool:
    """Return whether a space may stand between a text that ends with this token and a value.

    It may after a word or a mark that a space follows in prose, such as `Age:`, and not after `(`, `$` or `_`.
    """
    last = token.decode(errors="ignore")[-1:]
    return last.isalnum() or last in tuple(".:,;?!)")
