"""How a token mask is made: texts of the vocabulary's trie are walked through the machine, as few as will do.

A walk from a state gives the tokens that it allows, and those that must be run one by one from the state itself, since
their verdict depends on more text than the walk knows (NEEDS_RUN). What saves walking:

- A state with a mask twin (Frame.mask_twin) takes the walk of its twin, which many states share.
- In the content of a string, *plain* tokens, which hold no quote, backslash or control character, are allowed or
  refused by their number of characters, so that only the other tokens are walked.
- In a loop state, which plain text does not leave, a token is allowed where the rest after its plain text is allowed,
  and many tokens have the same rest.
- A state beside a loop state in its frame (as in a string that may become a named key) has the mask of the loop but for
  few tokens, so that only what differs is walked.
"""

from __future__ import annotations

import numpy as np

from ramet.grammar.machine import walker
from ramet.grammar.machine.automaton import Machine
from ramet.grammar.machine.frame import LOCAL_BITS, LOCAL_MASK, target
from ramet.grammar.machine.mask_rows import MaskRows, Row, Walked
from ramet.grammar.machine.vocabulary import SLICE_SIZES, TextTrie


class MaskMaker:
    """Makes the masks of one machine's configurations. Owned by a CompiledGrammar, which locks.

    rows: where walks are kept.
    """

    def __init__(self, machine: Machine, rows: MaskRows) -> None:
        self.machine = machine
        self.vocabulary = vocabulary = machine.vocabulary
        self.rows = rows
        self._scratch = np.zeros(4 + vocabulary.trie.max_depth, dtype=np.int64)
        self._unsure = np.empty(1 + len(vocabulary.trie.values), dtype=np.int32)  # zeros would be written: 60 µs
        self._other = np.zeros(2 + vocabulary.trie.max_depth, dtype=np.int64)

    def make(self, packed: int) -> Row:
        """Return the mask row of a configuration, int32 [W]; it may be shared."""
        local = packed & LOCAL_MASK
        row, unsure = self._twin_row(self.machine.mask_twin(packed))
        refused = self.machine.frames[packed >> LOCAL_BITS].refused_prefixes(local)
        if not refused and not len(unsure):
            return row
        row = row.copy()
        for prefix in refused:
            for token in self.vocabulary.tokens_with_prefix(prefix):
                row.view(np.uint32)[token >> 5] &= np.uint32(~(1 << (token & 31)) & 0xFFFFFFFF)
        for token in unsure:
            begin, end = self.vocabulary.offsets[token], self.vocabulary.offsets[token + 1]
            if self.machine.run(packed, self.vocabulary.flat, begin, end, self._scratch) >= 0:
                row.view(np.uint32)[token >> 5] |= np.uint32(1 << (token & 31))
        return row

    def _twin_row(self, packed: int) -> Walked:
        """What a walk from a state finds that is its own mask twin."""
        found = self.rows.twin(packed)
        return self.rows.keep_twin(packed, *self._walked_row(packed)) if found is None else found

    def _walked_row(self, packed: int) -> Walked:
        """Choose among the ways of the module's docstring."""
        instance, local = packed >> LOCAL_BITS, packed & LOCAL_MASK
        frame = self.machine.frames[instance]
        table = frame.table
        if table.loop >= 0 and table.depths is not None and table.depths[2, local] >= walker.MANY:
            loop = target(instance, table.loop)
            twin = frame.loop_twin()
            alike = loop if twin is None else twin
            if packed == alike:
                return self._loop_row(packed)
            return self._twin_row(alike) if local == table.loop else self._near_loop_row(packed, loop, alike)
        row, trie = self._first_row(packed)
        self._walk(packed, trie, row)
        return row, self._unsure_tokens()

    def _unsure_tokens(self) -> list[int]:
        """The tokens that must be run, as the last walk found."""
        count = int(self._unsure[0])
        unsure: list[int] = self._unsure[1 : 1 + count].tolist() if count else []
        return unsure

    def _walk(self, packed: int, trie: TextTrie, row: Row) -> None:
        """Set in `row` the bits of the values whose texts are accepted from a state."""
        machine, scratch, unsure = self.machine, self._scratch, self._unsure
        scratch[0] = 0
        scratch[3] = packed
        unsure[0] = 0
        nodes, values = trie.nodes, trie.values
        while walker.walk(machine.pool, machine.instances, machine.exits, nodes, values, row, scratch, unsure) >= 0:
            machine.exit_target(int(scratch[1]), int(scratch[2]))

    def _loop_row(self, packed: int) -> Walked:
        """For a loop state."""
        key = self.machine.frames[packed >> LOCAL_BITS].loop_key
        if key is None:
            return self._walked_loop(packed)
        return self.vocabulary.loop(key, lambda: self._walked_loop(packed))

    def _walked_loop(self, packed: int) -> Walked:
        """All plain tokens are allowed; another token is allowed where the rest of it after its plain text is."""
        vocabulary = self.vocabulary
        row = vocabulary.plain_row(2, vocabulary.slice_sizes[-1]).copy()
        trie, starts, tokens = vocabulary.remainders
        bits = np.zeros(len(trie.values) // 32 + 1, dtype=np.int32)
        self._walk(packed, trie, bits)
        walker.expand(bits, starts, tokens, row)
        return row, [t for r in self._unsure_tokens() for t in tokens[starts[r] : starts[r + 1]].tolist()]

    def _near_loop_row(self, packed: int, loop: int, alike: int) -> Walked:
        """For a state beside the loop state `loop` of its frame, whose mask the state `alike` has."""
        machine, scratch, unsure, trie = self.machine, self._scratch, self._unsure, self.vocabulary.trie
        loop_row, unsure_there = self._twin_row(alike)
        row = loop_row.copy()
        scratch[0] = 0
        scratch[3] = packed
        self._other[0] = loop
        unsure[0] = 0
        while (
            walker.walk_difference(
                machine.pool,
                machine.instances,
                machine.exits,
                trie.nodes,
                trie.values,
                row,
                scratch,
                self._other,
                unsure,
            )
            >= 0
        ):
            machine.exit_target(int(scratch[1]), int(scratch[2]))
        # a token that needs a run from the loop only is run from here, too, which does no harm
        return row, [*dict.fromkeys([*unsure_there, *self._unsure_tokens()])]

    def _first_row(self, packed: int) -> tuple[Row, TextTrie]:
        """(a new row of the tokens that are known to be allowed, the tokens that must be walked)."""
        vocabulary, machine = self.vocabulary, self.machine
        frame, local = machine.frames[packed >> LOCAL_BITS], packed & LOCAL_MASK
        depths = frame.table.depths
        if depths is not None:
            longest = vocabulary.slice_sizes[-1]
            left = frame.characters_left(local)
            if left is None and depths[2, local] == depths[3, local] > 0:
                left = int(depths[3, local])
            if left is not None:
                # plain tokens that fit are allowed, longer ones refused: only the others are walked
                return vocabulary.plain_row(2, min(left, longest)).copy(), vocabulary.slice(2, longest)[1]
            for kind in (2, 1, 0):
                depth = int(depths[kind, local])
                if depth >= SLICE_SIZES[0] or depth >= longest:
                    size = max(n for n in vocabulary.slice_sizes if n <= depth)
                    row, trie = vocabulary.slice(kind, size)
                    return row.copy(), trie
        if machine.accepts(packed):
            return vocabulary.eos_row.copy(), vocabulary.trie
        return np.zeros(vocabulary.num_words, dtype=np.int32), vocabulary.trie
