"""Drafts of a sequence's next tokens: what followed the longest earlier occurrence of the text's end.

It is looked for in one array of tokens that a sequence has here:

    earlier answers to prompts     what the radix tree has   the client's draft,
    with the same end              after the same prompt     if it gave one        prompt and output

The end of the prompt stands before each answer, so that an answer's beginning is found like all that follows. Where a
text repeats a long passage and changes a word of it, it is likely to go on there (`_changed`). A draft costs no model,
and it need not be right: `speculation` learns how often the drafts of each kind are.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ramet.runtime.cache.probe import following
from ramet.runtime.cache.radix_cache import RadixCache
from ramet.runtime.types import Request, Sequence, TokenIds

SOURCES = ("runs", "tree", "given", "text", "model")  # in the order of a sequence's array; a model is none of it
_APART = np.full(1, -1, dtype=np.int32)  # no token: where one part of an array ends
_SHORTEST, _LONGEST = 2, 16  # tokens of an occurrence: fewer mean nothing, more are not counted
_MOST_PLACES = 128  # occurrences: of more, only the longer ones are looked at, and of a source only the last ones
_REACH = 16_384  # tokens of the client's draft, and of the text's end, in which occurrences are looked for
_TAIL = 8  # tokens of a prompt's end by which earlier answers are found
_MAX_RUNS, _MAX_RUN_TOKENS = 4, 2_048  # earlier answers of one kind of prompt, and the tokens kept of each
_MAX_TREE, _MAX_TREE_TOKENS = 2, 2_048  # texts of the radix tree, and the tokens taken of each
_MOST_SKIPPED = 4  # new tokens that are not looked at, after drafts that were wrong from the start
_PASSAGE = 8  # tokens of an occurrence, after which a changed word does not end it
_NEAR = 64  # tokens behind a changed word, where the passage may go on
_MAX_CHANGED = 8  # tokens of the text that fit nowhere near it, until the passage is given up
_MAX_KEPT_TOKENS = 1_000_000  # of all earlier answers together: 4 MB


class Draft(NamedTuple):
    """tokens: what may follow. source: an index into `SOURCES`. length: tokens of the occurrence, up to `_LONGEST`; 1:
    the text changed a word of a passage.
    """

    tokens: list[int]
    source: int
    length: int


class EarlierRuns:
    """The last answers to prompts with the same end, of one owner and cache salt; the oldest are forgotten first."""

    def __init__(self) -> None:
        self._runs: OrderedDict[tuple[str, str, bytes], deque[TokenIds]] = OrderedDict()
        self.num_tokens = 0

    def find(self, request: Request) -> list[TokenIds]:
        """Return the answers to prompts like this one, with the end of the prompt before each."""
        key = _kind_of(request)
        found = self._runs.get(key)
        if found is None:
            return []
        self._runs.move_to_end(key)
        return list(found)

    def add(self, sequence: Sequence) -> None:
        """Keep the answer of a sequence that has ended."""
        request, num_prompt = sequence.request, sequence.request.num_prompt
        end = min(sequence.num_tokens, num_prompt + _MAX_RUN_TOKENS)
        run = sequence.tokens(max(num_prompt - _TAIL, 0), end)
        if end - num_prompt < _SHORTEST:
            return
        runs = self._runs.setdefault(_kind_of(request), deque())
        self._runs.move_to_end(_kind_of(request))
        same = next((other for other in runs if np.array_equal(other, run)), None)
        if same is not None:
            return
        runs.append(run)
        self.num_tokens += len(run)
        if len(runs) > _MAX_RUNS:
            self.num_tokens -= len(runs.popleft())
        while self.num_tokens > _MAX_KEPT_TOKENS:
            _, oldest = self._runs.popitem(last=False)
            self.num_tokens -= sum(map(len, oldest))


def _kind_of(request: Request) -> tuple[str, str, bytes]:
    return request.owner, request.cache_salt, request.prompt_ids[-_TAIL:].tobytes()


class TextDrafts:
    """The array of one sequence, and the place in it that its text follows. Owner: `Speculation`.

    `rivals`: the sources that the last search did not choose, each with its longest occurrence's length and the token
    after it.
    """

    def __init__(
        self,
        sequence: Sequence,
        runs: EarlierRuns,
        cache: RadixCache | None = None,
        worth: Callable[[int, int], float] = lambda source, length: 0.0,
    ) -> None:
        """worth: how often drafts of a source with a length are right. Sources are compared by it, then by length."""
        request, tail = sequence.request, sequence.request.prompt_ids[-_TAIL:]
        earlier = [part for run in runs.find(request) for part in (run, _APART)]
        cached: list[TokenIds] = []
        if cache is not None:
            most = {"most_texts": _MAX_TREE, "most_tokens": _MAX_TREE_TOKENS}
            texts = following(cache, request.prompt_ids, request.cache_salt, **most)
            cached = [part for text in texts for part in (tail, text, _APART)]
        expected = []
        if request.expected_ids is not None:
            expected = [tail, request.expected_ids[:_REACH], _APART]
        own = sequence.tokens(max(sequence.num_tokens - _REACH, 0), sequence.num_tokens)
        # Where the second source begins, and those after it.
        self._borders = tuple(accumulate(sum(map(len, parts)) for parts in (earlier, cached, expected)))
        self._num_tokens = self._borders[-1] + len(own)
        self._tokens = np.empty(self._num_tokens + request.max_tokens - len(sequence.output_ids), dtype=np.int32)
        # What is not written yet takes no memory.
        np.concatenate([*earlier, *cached, *expected, own], out=self._tokens[: self._num_tokens])
        self._worth = worth
        self.rivals: list[tuple[int, int, int]] = []
        self._ends = request.stop_ids
        self._place: int | None = None  # of the next token of the occurrence that the text's end repeats
        self._length = 0  # of that occurrence
        self._changed: int | None = None  # the place behind a passage's changed word
        self._num_changed = 0  # new tokens since then that fit nowhere near it
        self._num_to_skip = 0  # new tokens until the next search: it is put off after searches in vain
        self._num_in_vain = 0
        self._search()

    def follow(self, new: list[int]) -> None:
        """Append new tokens, and follow the occurrence, or look for another one."""
        self.rivals = []
        end = self._num_tokens + len(new)
        self._tokens[self._num_tokens : end] = new
        for token in new:
            self._num_tokens += 1
            if self._place is None:
                continue
            if self._tokens[self._place] == token:
                self._place, self._length = self._place + 1, min(self._length + 1, _LONGEST)
                self._num_in_vain = 0
                continue
            if self._num_in_vain:  # nothing of what was found was right
                self._num_to_skip = min(self._num_in_vain, _MOST_SKIPPED)
            if self._length >= _PASSAGE:
                self._changed, self._num_changed = self._place + 1, 0
            elif self._changed is not None:
                self._changed, self._num_changed = self._changed + 1, self._num_changed + 1
                if self._num_changed == _MAX_CHANGED:
                    self._changed = None
            self._place, self._length = None, 0
        if self._place is None and self._changed is not None:
            self._search()
        elif self._place is None:
            self._num_to_skip -= len(new)
            if self._num_to_skip <= 0:
                self._search()

    def propose(self, most: int) -> Draft | None:
        """Return at most `most` tokens that may follow; None if the text's end occurs nowhere before."""
        place = self._place
        if place is None:
            return None
        tokens = self._tokens[place : min(place + most, self._num_tokens)].tolist()
        end = next((i for i, token in enumerate(tokens) if token < 0 or token in self._ends), None)
        if end is not None:
            tokens = tokens[:end]
        elif place + len(tokens) == self._num_tokens:  # the text repeats itself: it goes on so
            tokens = [tokens[i % len(tokens)] for i in range(most)]
        return Draft(tokens, sum(place >= border for border in self._borders), self._length) if tokens else None

    def _search(self) -> None:
        """Find the longest earlier occurrence of the text's end in each source, and choose a source.

        Of several of the same length, the last. Vectorised over the array.
        """
        text, last = self._tokens[: self._num_tokens], self._num_tokens - 1
        if last < _SHORTEST:
            return
        self._num_in_vain += 1  # unless a token turns out right
        # Places of the last token of an occurrence, behind which a token follows.
        found = 1 + np.flatnonzero(text[1:last] == text[last])
        found = found[(text[found - 1] == text[last - 1]) & (text[found + 1] >= 0)]
        changed = self._changed
        if changed is not None:
            near = found[(found >= changed - 1) & (found < changed + _NEAR)]
            if len(near):
                self._place, self._length = int(near[0]) + 1, _SHORTEST
                return
        if not len(found):
            self._place, self._length = changed, int(changed is not None)
            self._num_to_skip = min(self._num_in_vain, 2 * _MOST_SKIPPED)
            return
        found += 1
        size = _SHORTEST
        while len(found) > _MOST_PLACES and size < _LONGEST:
            longer = found[found > size]
            longer = longer[text[longer - 1 - size] == text[last - size]]
            if not len(longer):
                break
            found, size = longer, size + 1
        if len(found) > _MOST_PLACES:
            cuts = [0, *np.searchsorted(found, self._borders).tolist(), len(found)]
            found = np.concatenate([found[max(low, high - _MOST_PLACES) : high] for low, high in pairwise(cuts)])
        longest: dict[int, tuple[int, int]] = {}  # by source: length and place
        for place, length in zip(found.tolist(), _lengths(text, found).tolist(), strict=True):
            source = bisect_right(self._borders, place)
            longest[source] = max(longest.get(source, (0, 0)), (length, place))
        source = max(longest, key=lambda one: (self._worth(one, longest[one][0]), longest[one]))
        length, place = longest.pop(source)
        self.rivals = [(other, size, int(text[at])) for other, (size, at) in longest.items()]
        self._place, self._length = place, length
        if changed is not None and length < _PASSAGE:
            self._place, self._length = changed, 1


def _lengths(text: TokenIds, places: NDArray[np.intp]) -> NDArray[np.intp]:
    """The lengths, up to `_LONGEST`, of the occurrences of the text's end that end before each of these places."""
    most = min(_LONGEST, len(text) - 1)
    back = np.arange(1, most + 1)
    before = places[:, None] - back
    same = text[before.clip(0)] == text[len(text) - back]
    same &= before >= 0
    return np.where(same.all(axis=1), most, same.argmin(axis=1))
