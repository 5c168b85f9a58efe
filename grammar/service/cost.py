"""How long a source will take to compile, guessed from its text without compiling it.

The guess only chooses where a source begins in the queue (`fair_queue`), which corrects a wrong one. What makes sources
expensive is counted: their length, and repetitions, which multiply what they repeat. The rates are measured.
"""

from __future__ import annotations

import re

_PER_CHARACTER_S = {  # of a byte vocabulary, on one core of a Xeon at 2.0 GHz
    "json_schema": 1e-6,
    "regex": 30e-6,
    "cfg": 20e-6,
    "choice": 2e-6,
    "substring": 20e-6,
    "tools": 1e-6,
    "structural_tag": 1e-6,
    "grammar": 1e-6,
}
_START_S = 1e-3
_PER_POSITION_S = 30e-6  # of a pattern, its repetitions written out
_ASSERTION = 8  # how much more a position takes where another pattern is followed beside it
_MANY = 1e9
_MAX_READ = 20_000  # characters; a longer source is expected to be expensive by its length alone
_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]?|\(\?(?:[=!]|<[=!])|\(|\)|\{(\d*)(?:,(\d*))?\}|.", re.DOTALL)
_PATTERN = re.compile(r'"(?:pattern(?:Properties)?|regex)"\s*:\s*(?:\{\s*)?"((?:[^"\\]|\\.)*)"')
_COUNT = re.compile(r'"(?:min|max)(Items|Contains|Properties|Length)"\s*:\s*(\d{1,9})')
_COSTLY = re.compile(r'"(?:oneOf|anyOf|allOf|not|if|uniqueItems|contains|unevaluated\w+|patternProperties)"\s*:')


def expected_s(kind: str, text: str) -> float:
    """Return a guess of the seconds that a source takes to compile. At most 10 ms. `text`: the source, or its JSON."""
    seconds = _START_S + len(text) * _PER_CHARACTER_S.get(kind, 1e-6)
    text = text[:_MAX_READ]
    if kind == "regex":
        seconds += _PER_POSITION_S * _positions(text)
    elif kind in ("json_schema", "tools", "structural_tag", "grammar"):
        patterns = sum(_positions(found[1]) for found in _PATTERN.finditer(text))
        counts = sum(int(found[2]) for found in _COUNT.finditer(text) if found[1] != "Length")
        seconds += _PER_POSITION_S * patterns + 1e-4 * counts + 5e-4 * sum(1 for _ in _COSTLY.finditer(text))
    return seconds


def _positions(pattern: str) -> float:
    """Return the number of characters of a pattern with its repetitions written out, and assertions weighed."""
    sizes, weights, last = [0.0], [1.0], 0.0
    for token in _TOKEN.finditer(pattern):
        word = token[0]
        if word[0] == "(":
            sizes.append(0.0)
            weights.append(1.0)
            if len(word) > 1:
                weights[-2] = _ASSERTION
            last = 0.0
        elif word == ")" and len(sizes) > 1:
            last = (sizes.pop() + 1) * weights.pop()
            sizes[-1] += last
        elif word[0] == "{" and len(word) > 1:
            count = max((int(n[:9]) for n in token.groups() if n), default=1)
            sizes[-1] = min(_MANY, sizes[-1] + last * max(0, count - 1))
            last *= count
        else:
            last = 1.0
            sizes[-1] += last
    while len(sizes) > 1:  # a group that is not closed
        inner = sizes.pop() * weights.pop()
        sizes[-1] += inner
    return min(_MANY, sizes[0] * weights[0])
