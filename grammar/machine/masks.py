"""Makes token masks: walks the texts of the vocabulary's trie through the machine, as few of them as possible.

A walk from a state finds two sets of tokens: those that are allowed, and those that must be run one by one. A token
must be run if the answer depends on earlier text, which the walk does not know (NEEDS_RUN). These rules save walking:

- A state with a mask twin (Frame.mask_twin) uses the walk of its twin, which many states share.
- A *plain* token holds no quote, backslash or control character. In the content of a string, the number of its
  characters decides whether it is allowed, so only the other tokens are walked.
- Plain text does not leave a loop state. So a token is allowed in a loop state if the rest after its plain text is
  allowed. Many tokens have the same rest, which is walked once.
- Another state in the frame of a loop state, as in a string that may become a named key, has almost the same mask as
  the loop state. So of the tokens that are not plain, only those that differ are walked.
"""

from __future__ import annotations

import numpy as np

from ramet.grammar.machine import walker
from ramet.grammar.machine.automaton import Machine
from ramet.grammar.machine.bitmask import pack
from ramet.grammar.machine.frame import LOCAL_BITS, LOCAL_MASK, target
from ramet.grammar.machine.mask_rows import MaskRows, Row, Walked
from ramet.grammar.machine.vocabulary import SLICE_SIZES, TextTrie


class MaskMaker:
    """Makes the masks of one machine's configurations. Owned by a CompiledGrammar, which locks.

    rows: keeps the results of walks.
    """

    def __init__(self, machine: Machine, rows: MaskRows) -> None:
        self.machine = machine
        self.vocabulary = vocabulary = machine.vocabulary
        self.rows = rows
        self._scratch = np.zeros(4 + vocabulary.trie.max_depth, dtype=np.int64)
        self._unsure = np.empty(1 + len(vocabulary.trie.values), dtype=np.int32)  # np.zeros would write it all: 60 µs
        self._other = np.zeros(2 + vocabulary.trie.max_depth, dtype=np.int64)

    def make(self, packed: int) -> Row:
        """Return the mask row of a configuration, int32 [W]. It may be shared."""
        local = packed & LOCAL_MASK
        row, unsure = self._twin_row(self.machine.mask_twin(packed))
        refused = self.machine.frames[packed >> LOCAL_BITS].refused_prefixes(local)
        if not refused and not len(unsure):
            return row
        row = row.copy()
        for prefix in refused:
            for token in self.vocabulary.tokens_with_prefix(prefix):
                row.view(np.uint32)[token >> 5] &= np.uint32(~(1 << (token & 31)) & 0xFFFFFFFF)
        self._run_unsure(packed, unsure, row)
        return row

    def after(self, packed: int, prefix: bytes) -> Row:
        """Return the row of the tokens that begin with `prefix`, which was read before, and whose rest is allowed."""
        vocabulary = self.vocabulary
        row = pack(vocabulary.tokens_with_text(prefix), vocabulary.vocab_size)
        self._walk(packed, vocabulary.trie_after(prefix), row)
        self._run_unsure(packed, self._unsure_tokens(), row, len(prefix))
        return row

    def _run_unsure(self, packed: int, tokens: list[int], row: Row, num_read: int = 0) -> None:
        """Run tokens one by one, and set the bits of those that are accepted. num_read: bytes that were read before."""
        if tokens:
            walker.mark(row, self.machine.run_all(packed, np.array(tokens, dtype=np.int64), num_read))

    def _twin_row(self, packed: int) -> Walked:
        """Return the result of a walk from a state that is its own mask twin."""
        found = self.rows.twin(packed)
        return self.rows.keep_twin(packed, *self._walked_row(packed)) if found is None else found

    def _walked_row(self, packed: int) -> Walked:
        """Choose among the rules of the module's docstring."""
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
        """Return the tokens that must be run, from the last walk."""
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
        """Return the walk of a loop state; shared between grammars if the frame has a `loop_key`."""
        key = self.machine.frames[packed >> LOCAL_BITS].loop_key
        if key is None:
            return self._walked_loop(packed)
        return self.vocabulary.loop(key, lambda: self._walked_loop(packed))

    def _walked_loop(self, packed: int) -> Walked:
        """Allow all plain tokens, and each other token if the rest after its plain text is allowed."""
        vocabulary = self.vocabulary
        row = vocabulary.plain_row(2, vocabulary.slice_sizes[-1]).copy()
        trie, starts, tokens = vocabulary.remainders
        bits = np.zeros(len(trie.values) // 32 + 1, dtype=np.int32)
        self._walk(packed, trie, bits)
        walker.expand(bits, starts, tokens, row)
        return row, [t for r in self._unsure_tokens() for t in tokens[starts[r] : starts[r + 1]].tolist()]

    def _near_loop_row(self, packed: int, loop: int, alike: int) -> Walked:
        """Walk what differs between a state and the loop state of its frame. `alike` has the mask of `loop`.

        Any plain text may follow both. So only the other tokens can differ.
        """
        machine, scratch, unsure = self.machine, self._scratch, self._unsure
        _, trie = self.vocabulary.slice(2, self.vocabulary.slice_sizes[-1])
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
        # a token that needs a run only from the loop state is also run from here: that is correct, though not needed
        return row, [*dict.fromkeys([*unsure_there, *self._unsure_tokens()])]

    def _first_row(self, packed: int) -> tuple[Row, TextTrie]:
        """Return (a new row of the tokens that are known to be allowed, the trie of the tokens that must be walked)."""
        vocabulary, machine = self.vocabulary, self.machine
        frame, local = machine.frames[packed >> LOCAL_BITS], packed & LOCAL_MASK
        depths = frame.table.depths
        if depths is not None:
            longest = vocabulary.slice_sizes[-1]
            left = frame.characters_left(local)
            if left is None and depths[2, local] == depths[3, local] > 0:
                left = int(depths[3, local])
            if left is not None:
                # plain tokens that are short enough are allowed, longer ones are refused: only the others are walked
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
