"""Which tokens write the forced bytes of a text.

Where a grammar leaves one continuation, such as `"age": ` after a comma, every way to cut it into tokens is a way
through the automaton, and a model under a mask takes odd ones: `"`, `a`, `ge`. It was trained on the tokenizer's own
split alone. So a token is refused if no split of the text that follows can begin with it.

The rule for one state: follow the automaton as far as a few texts are possible. They end where many bytes may follow,
as in a string or a number, or where no token reaches. A token that is shorter than such a text X is refused, unless the
tokenizer's split of some X that begins with it may begin with it. All other tokens stay as the automaton allows them.
The split of X may depend on text on both sides that is not known here:

- before X, by the kind of the character there (`Splits.firsts`);
- behind X, where a longer token may begin inside of X and go past its end. Then the split of the part before that token
  counts, if the tokenizer would cut there (`Splits.goes_on`). Only cuts in the first two tokens of X change the first.

No text of the language is lost: whatever it begins with, X, the first token of X's split is allowed, and the same rule
holds in the state after it.
"""

from __future__ import annotations

import numpy as np

from ramet.grammar.machine import walker
from ramet.grammar.machine.automaton import Machine
from ramet.grammar.machine.bitmask import are_allowed
from ramet.grammar.machine.mask_rows import Row
from ramet.grammar.machine.masks import MaskMaker
from ramet.grammar.machine.splits import Splits, is_text, whole_characters

MAX_CHOICES = 8  # bytes; where more may follow (strings, numbers), the texts that are looked at end
MAX_FORCED = 32  # bytes that are looked at after a choice
_MAX_TEXTS = 24  # texts from one state
_MAX_TRIED = 512  # tokens that may go past the end of a text, and are tried one by one

Ways = tuple[tuple[int, int], ...]  # (byte, state after it)


class CanonicalTokens:
    """Finds the tokens that are refused in a state of a machine. Owned by a CompiledGrammar, which locks."""

    def __init__(self, machine: Machine, masks: MaskMaker, splits: Splits) -> None:
        self.machine = machine
        self.vocabulary = machine.vocabulary
        self.splits = splits
        self._masks = masks
        self._ways: dict[int, Ways | None] = {}
        self._runs: dict[int, tuple[bytes, int]] = {}
        self._scratch = np.zeros(8, dtype=np.int64)
        self._text = np.zeros(MAX_FORCED, dtype=np.uint8)
        self._following = np.zeros((MAX_CHOICES, 2), dtype=np.int64)

    def narrow(self, packed: int, row: Row, prefix: bytes = b"") -> Row:
        """Return the mask row of a state without the refused tokens. `row`: all tokens that the automaton allows.

        prefix: text before the state that the token writes, too.
        """
        refused = self.refused(packed, prefix)
        if not refused:
            return row
        row = row.copy()
        walker.clear(row, np.array(refused, dtype=np.int64))
        return row

    def refused(self, packed: int, prefix: bytes = b"") -> list[int]:
        """Return the tokens that the automaton allows in a state, and that no split of the text there begins with."""
        vocabulary = self.vocabulary
        shorter: dict[int, None] = {}
        firsts: set[int] = set()
        for text in self._texts(packed) if is_text(prefix) else ():
            text = prefix + text
            longest = min(vocabulary.longest_like(text), len(text) - 1)
            ends = range(max(len(prefix), 1), longest + 1)
            inside = [token for end in ends for token in vocabulary.tokens_with_text(text[:end])]
            shorter |= dict.fromkeys(inside)
            if inside:
                firsts |= self._firsts(packed, text, len(prefix)) or {*inside}
            firsts.update(vocabulary.tokens_with_text(text))
        return [token for token in shorter if token not in firsts]

    def joined(self, packed: int, token: int, after: int) -> int:
        """Return the longer token that the tokenizer writes for `token` and the bytes that must follow it.

        after: the state after `token`, which is allowed in the state `packed`. Return `token` itself if there is no
        longer token, if bytes that are not known yet may be a part of it, or if the mask of `packed` has decided: then
        `token` begins a text that it knows.
        """
        own = self.vocabulary.token_bytes[token]
        forced, end = self._forced(after)
        if not forced or any(text.startswith(own) for text in self._texts(packed)):
            return token
        text = own + forced
        tokens = self.splits.tokens(text) if is_text(text) else ()
        size = len(self.vocabulary.token_bytes[tokens[0]]) if tokens else 0
        is_whole = size == len(text) and not (self.machine.accepts(end) and self._ways_of(end) == ())
        return tokens[0] if size > len(own) and not is_whole else token

    def _texts(self, packed: int) -> list[bytes]:
        """Return the texts that may follow a state, each as far as few are possible. One may begin another."""
        if self._ways_of(packed) is None:  # most states: in a string, in a number
            return []
        out: list[bytes] = []
        waiting = [(b"", packed)]
        while waiting:
            text, state = waiting.pop(0)
            forced, state = self._forced(state)
            text += forced
            is_end = len(waiting) + len(out) >= _MAX_TEXTS or 0 < len(text) >= self.vocabulary.longest_like(text)
            ways = () if is_end else self._ways_of(state) or ()
            if not ways or self.machine.accepts(state):
                out.append(whole_characters(text))
            waiting += [(text + bytes((byte,)), following) for byte, following in ways]
        return [text for text in out if text]

    def _firsts(self, packed: int, text: bytes, num_before: int) -> set[int]:
        """Return the tokens with which a split of a text may begin; none if the split is not known.

        The first `num_before` bytes of the text stand before the state, and in the first token.
        """
        token_bytes = self.vocabulary.token_bytes
        firsts = {token for token in self.splits.firsts(text) if len(token_bytes[token]) >= num_before}
        own = [len(token_bytes[token]) for token in self.splits.tokens(text)[:2]]
        for cut in range(max(num_before, 1), min(sum(own), len(text))):
            head, rest = text[:cut], text[cut:]
            if cut == own[0] or self.vocabulary.longest_like(rest) <= len(rest) or whole_characters(head) != head:
                continue
            tokens = self.splits.tokens(head)
            if tokens and tokens[0] not in firsts and self._is_cut(packed, head, rest, num_before):
                firsts.add(tokens[0])
        return firsts

    def _is_cut(self, packed: int, head: bytes, rest: bytes, num_before: int) -> bool:
        """Tell whether a split may cut between `head` and `rest` because a token goes on past the end of `rest`."""
        tokens = self.vocabulary.longer_with_prefix(rest)
        if len(tokens) <= _MAX_TRIED:
            tokens = self.splits.going_on(head, rest, tokens)
        if not len(tokens):
            return False
        tokens = tokens[are_allowed(self._masks.make(self.machine.run_bytes(packed, head[num_before:])), tokens)]
        return len(tokens) > _MAX_TRIED or any(self.splits.goes_on(head, token) for token in tokens.tolist())

    def _forced(self, packed: int) -> tuple[bytes, int]:
        """Return the bytes that must follow, at most MAX_FORCED, and the state after them."""
        found = self._runs.get(packed)
        if found is not None:
            return found
        machine, scratch, text = self.machine, self._scratch, self._text
        scratch[:] = (0, 0, 0, packed, 0, -1, -1, 0)
        while True:
            status = walker.follow(machine.pool, machine.instances, machine.exits, text, scratch, MAX_FORCED)
            if status == -2:
                machine.exit_target(int(scratch[1]), int(scratch[2]))
            elif status == -4 and not machine.accepts(int(scratch[3])):
                scratch[5] = scratch[3]
            else:
                break
        found = self._runs[packed] = text[: int(scratch[4])].tobytes(), int(scratch[3])
        return found

    def _ways_of(self, packed: int) -> Ways | None:
        """Return the bytes that may follow with the states after them; None if there are too many."""
        if packed in self._ways:
            return self._ways[packed]
        machine, scratch, following = self.machine, self._scratch, self._following
        scratch[0] = scratch[3] = 0
        while True:
            found = walker.choices(
                machine.pool, machine.instances, machine.exits, packed, scratch, following, MAX_CHOICES
            )
            if found != -2:
                break
            machine.exit_target(int(scratch[1]), int(scratch[2]))
        rows: list[list[int]] = following[: int(scratch[3])].tolist()
        ways = None if found == -3 else tuple((byte, after) for byte, after in rows)
        self._ways[packed] = ways
        return ways
