"""The tokens of one vocabulary as bytes, and as a trie in a flat array.

The trie is stored depth first: the subtree of a node is the nodes up to its `skip`. Special tokens and empty tokens are
not in it, so no mask allows them. End tokens are the exception: masks allow them in accepting states.
"""

from __future__ import annotations

import bisect
import copy
import hashlib
import random
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ramet.grammar.machine.bitmask import num_words, pack
from ramet.grammar.machine.splits import Beginning, Cut, Splits, Splitter, is_text
from ramet.grammar.machine.walker import count_plain_chars, next_not_deeper

SLICE_SIZES = (4, 8, 16, 32)
NUM_KINDS = 3
MAX_PREFIXES = 1 << 16
MAX_TRIES = 64
MAX_BEGINNINGS = 1 << 13
MAX_UNSURE = 512  # tokens behind a cut of a text that are tried; a tokenizer is taken to cut before all others
_GAP = rb'[ \t\n\r]*,?[ \t\n\r]*"'
_HEAD = 4  # bytes of a text by which the longest token that may start there is looked up


class Vocabulary:
    """Token ids and their bytes.

    vocab_size: size of the model's (padded) vocabulary, at least len(token_bytes). Ids beyond `token_bytes`, ids in
    `special_ids` and empty tokens are never allowed. `eos_ids` are allowed exactly where the text may end.
    splitter: the tokenizer, for masks that allow its own tokens alone where bytes are forced (canonical.py). None:
    masks allow every token that the grammar allows.
    """

    def __init__(
        self,
        token_bytes: Sequence[bytes],
        eos_ids: Iterable[int],
        special_ids: Iterable[int] = (),
        vocab_size: int | None = None,
        splitter: Splitter | None = None,
    ) -> None:
        self.token_bytes = list(token_bytes)
        self.eos_ids = tuple(sorted(set(eos_ids)))
        self.special_ids = frozenset(special_ids) | frozenset(self.eos_ids)
        self.vocab_size = max(len(self.token_bytes), vocab_size or 0, *(e + 1 for e in self.eos_ids), 1)
        self.num_words = num_words(self.vocab_size)
        self.splits = None if splitter is None else Splits(splitter, self.token_bytes, self.special_ids)
        self._loops: dict[Hashable, tuple[NDArray[np.int32], list[int]]] = {}
        self._by_prefix: dict[bytes, list[int]] = {}
        self._longer: dict[bytes, NDArray[np.int64]] = {}
        self._plain_rows: dict[tuple[int, int], NDArray[np.int32]] = {}
        self._rest_tries: dict[tuple[int, int], TextTrie] = {}
        self._tries_after: dict[bytes, TextTrie] = {}
        self._beginnings: dict[tuple[bytes, int], Beginning] = {}
        self._settled: dict[bytes, bool] = {}

    @cached_property
    def key(self) -> str:
        """A digest. Vocabularies with equal digests give equal masks."""
        digest = hashlib.sha256(f"{self.vocab_size} {self.eos_ids} {sorted(self.special_ids)} ".encode())
        for token in self.token_bytes:
            digest.update(len(token).to_bytes(4, "little"))
            digest.update(token)
        if self.splits is not None:
            digest.update(repr([self.splits.tokens(text) for text in self._sample_texts]).encode())
        return digest.hexdigest()

    @cached_property
    def _sample_texts(self) -> list[bytes]:
        """Texts by whose splits two tokenizers with the same tokens differ: tokens from all over the table, joined."""
        ids = [i for i in self.content_tokens if len(self.token_bytes[i]) > 1 and is_text(self.token_bytes[i])]
        rng = random.Random(1)
        return [b"".join(map(self.token_bytes.__getitem__, rng.sample(ids, min(len(ids), 256)))) for _ in range(8)]

    @cached_property
    def without_splits(self) -> Vocabulary:
        """The same tokens with masks that allow every token that the grammar allows. Shares what is made already."""
        if self.splits is None:
            return self
        other = copy.copy(self)
        other.splits = None
        other.__dict__.pop("key", None)  # the one property that depends on splits
        return other

    @cached_property
    def content_tokens(self) -> list[int]:
        """Ids of the tokens that can be part of a text, ordered by their bytes."""
        ids = [i for i, b in enumerate(self.token_bytes) if b and i not in self.special_ids]
        ids.sort(key=self.token_bytes.__getitem__)
        return ids

    @cached_property
    def trie(self) -> TextTrie:
        return TextTrie(self.flat, *self._sorted_spans, self._sorted_ids)

    @cached_property
    def _sorted_ids(self) -> NDArray[np.int32]:
        return np.array(self.content_tokens, dtype=np.int32)

    @cached_property
    def _sorted_spans(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(first byte in `flat`, length) of the content tokens, ordered by their bytes."""
        offsets = np.array(self.offsets, dtype=np.int64)
        ids = self._sorted_ids
        return offsets[ids], offsets[ids + 1] - offsets[ids]

    # --- slices: masks of the plain tokens, and tries of the tokens that are still to be walked

    @cached_property
    def _plain_chars(self) -> NDArray[np.int32]:
        """int32 [4, number of content tokens]. Rows 0-2: the characters of a token that is plain of that kind, else 0.
        Row 3: how many bytes of plain text (kind 2) a token begins with.

        Plain of kind 0: ASCII letters and digits. Kind 1: printable ASCII except the quote and the backslash. Kind 2:
        as kind 1, and whole characters beyond ASCII.
        """
        begins, lengths = self._sorted_spans
        found: NDArray[np.int32] = count_plain_chars(self.flat, begins, lengths)
        return found

    def plain_row(self, kind: int, size: int) -> NDArray[np.int32]:
        """Return the mask row of the plain tokens of at most `size` characters. It is shared: do not write to it."""
        found = self._plain_rows.get((kind, size))
        if found is None:
            count = self._plain_chars[kind]
            found = pack(self._sorted_ids[(count > 0) & (count <= size)], self.vocab_size)
            self._plain_rows[kind, size] = found
        return found

    def slice(self, kind: int, size: int) -> tuple[NDArray[np.int32], TextTrie]:
        """Return (mask row of the plain tokens of at most `size` characters, trie of all other tokens).

        Made once and kept.
        """
        trie = self._rest_tries.get((kind, size))
        if trie is None:
            count = self._plain_chars[kind]
            rest = (count == 0) | (count > size)
            begins, lengths = self._sorted_spans
            trie = TextTrie(self.flat, begins[rest], lengths[rest], self._sorted_ids[rest])
            self._rest_tries[kind, size] = trie
        return self.plain_row(kind, size), trie

    @cached_property
    def slice_sizes(self) -> list[int]:
        """The sizes for which slices are made, ascending. The last one covers every plain token."""
        longest = int(self._plain_chars[:3].max(initial=1))
        return [*(n for n in SLICE_SIZES if n < longest), longest]

    @cached_property
    def remainders(self) -> tuple[TextTrie, NDArray[np.int32], NDArray[np.int32]]:
        """The distinct remainders of tokens: what follows the plain text (kind 2) at their beginning.

        Returns (trie of the remainders with their numbers as values, starts int32 [n + 1], tokens). The tokens with
        remainder r are tokens[starts[r] : starts[r + 1]]. For example, `abc"` and `x"` have the remainder `"`.
        """
        begins, lengths = self._sorted_spans
        plain = self._plain_chars[3]
        which = np.flatnonzero(plain < lengths)
        texts = [
            self.flat[b:e].tobytes()
            for b, e in zip(begins[which] + plain[which], (begins + lengths)[which], strict=True)
        ]
        distinct = sorted(set(texts))
        number = {t: i for i, t in enumerate(distinct)}
        sizes = np.array([len(t) for t in distinct], dtype=np.int64)
        flat = np.frombuffer(b"".join(distinct), dtype=np.uint8)
        trie = TextTrie(flat, np.cumsum(sizes) - sizes, sizes, np.arange(len(distinct), dtype=np.int32))
        group = np.array([number[t] for t in texts], dtype=np.int32)
        starts = np.searchsorted(np.sort(group), np.arange(len(distinct) + 1)).astype(np.int32)
        return trie, starts, self._sorted_ids[which][np.argsort(group, kind="stable")]

    def warm_up(self) -> None:
        """Make everything that is otherwise made when it is first needed."""
        _ = self.remainders, self.quoted, self.offsets, self._twins, self._longest_by_head
        _ = self._by_last_byte, self.token_ends, self._lengths
        for size in range(1, self.slice_sizes[-1] + 1):
            self.plain_row(2, size)
        for kind in range(NUM_KINDS):
            for size in self.slice_sizes:
                self.slice(kind, size)

    @cached_property
    def flat(self) -> NDArray[np.uint8]:
        """The bytes of all tokens, one after the other. Token t is flat[offsets[t] : offsets[t + 1]]."""
        return np.frombuffer(b"".join(self.token_bytes), dtype=np.uint8)

    @cached_property
    def offsets(self) -> list[int]:
        return [0, *np.cumsum([len(b) for b in self.token_bytes]).tolist()]

    @cached_property
    def tokens_of_bytes(self) -> dict[bytes, int]:
        """The lowest id of each distinct token text."""
        out: dict[bytes, int] = {}
        for i in self.content_tokens:
            out.setdefault(self.token_bytes[i], i)
        return out

    @cached_property
    def quoted(self) -> frozenset[bytes]:
        """All beginnings of content tokens that end with a quote."""
        out: set[bytes] = set()
        for i in self.content_tokens:
            token = self.token_bytes[i]
            at = token.find(b'"')
            while at >= 0:
                out.add(token[: at + 1])
                at = token.find(b'"', at + 1)
        return frozenset(out)

    @cached_property
    def gaps(self) -> frozenset[bytes]:
        """Those of `quoted` that can stand before a JSON key: white space, a comma, and an opening quote."""
        return frozenset([text for text in self.quoted if re.fullmatch(_GAP, text)])

    @cached_property
    def gaps_before(self) -> dict[bytes, list[bytes]]:
        """Those of `gaps` that stand before a text, by the text, if `quoted` has both together."""
        out: dict[bytes, list[bytes]] = {}
        for text in self.quoted:
            found = re.fullmatch(_GAP + rb'(.*")', text, re.DOTALL)
            if found is not None:
                out.setdefault(found[1], []).append(text[: found.start(1)])
        return out

    @cached_property
    def key_starts(self) -> bytes:
        """The bytes that follow a comma and a quote in some content token."""
        return bytes(sorted({m[1][0] for m in re.finditer(rb'(?=,[ \t\0\r]*"([^\n]))', self._quoting)}))

    @cached_property
    def reads_past_values(self) -> bool:
        """Tell whether a content token holds the end of a key, a value (or its beginning), and more text after that."""
        return bool(re.search(rb'"[ \t\0\r]*:[ \t\0\r]*(?:[-0-9tfn].|".|[\[{].*["\]}].)', self._quoting))

    @cached_property
    def _quoting(self) -> bytes:
        """The content tokens that hold a quote, one per line. A line end inside a token is replaced by a null byte."""
        texts = (self.token_bytes[i] for i in self.content_tokens)
        return b"\n".join(t.replace(b"\n", b"\0") for t in texts if b'"' in t)

    def loop(
        self, key: Hashable, make: Callable[[], tuple[NDArray[np.int32], list[int]]]
    ) -> tuple[NDArray[np.int32], list[int]]:
        """Return the mask of a loop state that is the same in all grammars, and the tokens that must be run from there.

        key: see Frame.loop_key. make: computes both when they are first asked for.
        """
        found = self._loops.get(key)
        if found is None:
            found = self._loops[key] = make()
        return found

    def tokens_with_prefix(self, prefix: bytes) -> list[int]:
        """Return the content tokens that begin with these bytes. Answers are kept."""
        found = self._by_prefix.get(prefix)
        if found is None:
            if len(self._by_prefix) > MAX_PREFIXES:
                self._by_prefix.clear()
            found = self._by_prefix[prefix] = self.content_tokens[slice(*self._span(prefix))]
        return found

    def longer_with_prefix(self, prefix: bytes) -> NDArray[np.int64]:
        """Return the content tokens that begin with these bytes and are longer. Answers are kept."""
        found = self._longer.get(prefix)
        if found is None:
            if len(self._longer) > MAX_PREFIXES:
                self._longer.clear()
            ids = self._sorted_ids[slice(*self._span(prefix))]
            found = self._longer[prefix] = ids[self._lengths[ids] > len(prefix)].astype(np.int64)
        return found

    def goes_past(self, text: bytes) -> bool:
        """Tell whether some content token begins with these bytes and is longer."""
        if self.longest_like(text) <= len(text):
            return False
        ids = self.content_tokens
        at = bisect.bisect_right(ids, text, key=self.token_bytes.__getitem__)
        return at < len(ids) and self.token_bytes[ids[at]].startswith(text)

    def tokens_with_text(self, text: bytes) -> list[int]:
        """Return the content tokens that stand for exactly these bytes, ascending."""
        twins = self._twins.get(text)
        if twins is not None:
            return list(twins)
        token = self.tokens_of_bytes.get(text)
        return [] if token is None else [token]

    @cached_property
    def _twins(self) -> dict[bytes, list[int]]:
        """The content tokens of each text that several tokens stand for."""
        found: dict[bytes, list[int]] = {}
        for token in self.content_tokens:
            text = self.token_bytes[token]
            if self.tokens_of_bytes[text] != token:
                found.setdefault(text, [self.tokens_of_bytes[text]]).append(token)
        return found

    def beginning(self, text: bytes, num_before: int = 0) -> Beginning:
        """Return how the tokens of a text begin that follows other text. Answers are kept. Needs `splits`.

        num_before: bytes of the text that the first token holds in any case.
        """
        found = self._beginnings.get((text, num_before))
        if found is None:
            if len(self._beginnings) > MAX_BEGINNINGS:
                self._beginnings.clear()
            found = self._beginnings[text, num_before] = self._find_beginning(text, num_before)
        return found

    def _find_beginning(self, text: bytes, num_before: int) -> Beginning:
        splits = self.splits
        assert splits is not None
        longest, size, begin = self.longest_like(text), len(text), max(num_before, 1)
        shorter = [t for end in range(begin, min(longest, size - 1) + 1) for t in self.tokens_with_text(text[:end])]
        whole = self.tokens_with_text(text)
        firsts: set[int] = set()
        cuts: list[Cut] = []
        if is_text(text):
            firsts = {token for token in splits.firsts(text) if len(self.token_bytes[token]) >= num_before}
            for at in self._places_to_cut(text, begin):
                head, rest = text[:at], text[at:]
                tokens = splits.tokens(head) if is_text(head) else ()
                if tokens and tokens[0] not in firsts and tokens[0] in shorter:
                    longer = self.longer_with_prefix(rest)
                    cuts.append(Cut(tokens[0], head, rest, longer[MAX_UNSURE:], longer[:MAX_UNSURE]))
        return Beginning(tuple(shorter), tuple(whole), frozenset(firsts), tuple(cuts))

    def is_settled(self, text: bytes) -> bool:
        """Tell whether no token that begins inside of the first two tokens of a text's split, and changes the first,
        goes past the text's end. Answers are kept. Needs `splits`.
        """
        found = self._settled.get(text)
        if found is None:
            if len(self._settled) > MAX_BEGINNINGS:
                self._settled.clear()
            found = self._settled[text] = self._find_settled(text)
        return found

    def _find_settled(self, text: bytes) -> bool:
        splits = self.splits
        assert splits is not None
        if self.goes_past(text) or not is_text(text) or not splits.tokens(text):
            return False
        for at in self._places_to_cut(text, 1):
            tokens = splits.tokens(text[:at]) if is_text(text[:at]) else ()
            if not tokens or (tokens[0] != splits.tokens(text)[0] and tokens[0] not in splits.firsts(text)):
                return False
        return True

    def _places_to_cut(self, text: bytes, begin: int) -> Iterator[int]:
        """Yield the places from `begin` on, inside of the first two tokens of a text's split, from which a token may go
        past its end.
        """
        assert self.splits is not None
        own = [len(self.token_bytes[token]) for token in self.splits.tokens(text)[:2]]
        for at in range(begin, min(sum(own), len(text))):
            if at != own[0] and self.goes_past(text[at:]):
                yield at

    def tokens_with_suffix(self, suffix: bytes) -> list[int]:
        """Return the content tokens that end with these bytes."""
        ids = self._by_last_byte.get(suffix[-1])
        if ids is None:
            return []
        ends = self.token_ends
        for back, byte in enumerate(reversed(suffix), 1):
            ids = ids[self._lengths[ids] >= back]
            ids = ids[self.flat[ends[ids] - back] == byte]
        found: list[int] = ids.tolist()
        return found

    @cached_property
    def token_ends(self) -> NDArray[np.int64]:
        """Where the bytes of each token end in `flat`."""
        return np.array(self.offsets[1:], dtype=np.int64)

    @cached_property
    def _lengths(self) -> NDArray[np.int64]:
        return self.token_ends - np.array(self.offsets[:-1], dtype=np.int64)

    @cached_property
    def _by_last_byte(self) -> dict[int, NDArray[np.int32]]:
        last = self.flat[self.token_ends[self._sorted_ids] - 1]
        return {int(byte): self._sorted_ids[last == byte] for byte in np.unique(last)}

    def trie_after(self, prefix: bytes) -> TextTrie:
        """Return the trie of what follows `prefix` in the content tokens that begin with it and go on. It is kept."""
        found = self._tries_after.get(prefix)
        if found is None:
            if len(self._tries_after) >= MAX_TRIES:
                self._tries_after.clear()
            begins, lengths = self._sorted_spans
            part = slice(*self._span(prefix))
            goes_on = lengths[part] > len(prefix)
            begins, lengths = begins[part][goes_on] + len(prefix), lengths[part][goes_on] - len(prefix)
            found = TextTrie(self.flat, begins, lengths, self._sorted_ids[part][goes_on])
            self._tries_after[prefix] = found
        return found

    def _span(self, prefix: bytes) -> tuple[int, int]:
        """Return where the tokens that begin with these bytes stand among the content tokens: [first, end)."""
        ids, key = self.content_tokens, self.token_bytes.__getitem__
        stem = prefix.rstrip(b"\xff")
        begin = bisect.bisect_left(ids, prefix, key=key)
        return begin, bisect.bisect_left(ids, stem[:-1] + bytes((stem[-1] + 1,)), key=key) if stem else len(ids)

    def fewest_tokens(self, text: bytes) -> list[int] | None:
        """Return the fewest tokens that write `text`; None if the vocabulary cannot write it."""
        best: list[tuple[int, int] | None] = [None] * (len(text) + 1)  # (tokens so far, last token)
        count = [0] + [1 << 30] * len(text)
        index, longest = self.tokens_of_bytes, self._longest_by_head
        for begin in range(len(text)):
            if count[begin] == 1 << 30:
                continue
            limit = longest.get(text[begin : begin + _HEAD], _HEAD)
            for end in range(begin + 1, min(begin + limit, len(text)) + 1):
                token = index.get(text[begin:end])
                if token is not None and count[begin] + 1 < count[end]:
                    count[end] = count[begin] + 1
                    best[end] = (begin, token)
        if count[-1] == 1 << 30:
            return None
        out, end = [], len(text)
        while end:
            step = best[end]
            assert step is not None
            out.append(step[1])
            end = step[0]
        return out[::-1]

    def longest_like(self, text: bytes) -> int:
        """Return an upper bound of the bytes of a token that begins with `text`, or that `text` begins with."""
        head = text[:_HEAD]
        found = self._longest_by_head.get(head)
        if found is None:
            return max(len(head) - 1, 0)
        return found

    @cached_property
    def _longest_by_head(self) -> dict[bytes, int]:
        """For the first 1 to `_HEAD` bytes of tokens, the bytes of the longest token that begins with them."""
        longest: dict[bytes, int] = {}
        for text in self.tokens_of_bytes:
            for size in range(1, min(len(text), _HEAD) + 1):
                longest[text[:size]] = max(longest.get(text[:size], 0), len(text))
        return longest

    @cached_property
    def eos_row(self) -> NDArray[np.int32]:
        """The mask row that allows only the end tokens, int32 [W]."""
        row = np.zeros(self.num_words, dtype=np.int32)
        for e in self.eos_ids:
            row.view(np.uint32)[e >> 5] |= np.uint32(1 << (e & 31))
        return row


class TextTrie:
    """A trie of texts with values, in a flat array. The texts are given in the order of their bytes: the text
    flat[begins[i] : begins[i] + lengths[i]] has the value values[i].

    nodes: int32 [num_nodes + 1, 4], depth first. Columns: byte, skip (the first node after the subtree), first entry,
    depth (from 1). The values of node i are values[first entry of i : first entry of i + 1].
    """

    def __init__(
        self, flat: NDArray[np.uint8], begins: NDArray[np.int64], lengths: NDArray[np.int64], values: NDArray[np.int32]
    ) -> None:
        common = _common_prefixes(flat, begins, lengths)
        self.values = values
        self.max_depth = int(lengths.max(initial=0))
        self.nodes = _build_nodes(flat, begins, lengths, common)


def _common_prefixes(
    flat: NDArray[np.uint8], begins: NDArray[np.int64], lengths: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the length of the prefix that each text shares with the text before it."""
    n = len(begins)
    common = np.zeros(n, dtype=np.int64)
    alive = np.arange(1, n)
    depth = 0
    while len(alive):
        alive = alive[(lengths[alive] > depth) & (lengths[alive - 1] > depth)]
        alive = alive[flat[begins[alive] + depth] == flat[begins[alive - 1] + depth]]
        depth += 1
        common[alive] = depth
    return common


def _build_nodes(
    flat: NDArray[np.uint8], begins: NDArray[np.int64], lengths: NDArray[np.int64], common: NDArray[np.int64]
) -> NDArray[np.int32]:
    """Lay out the new bytes of each text one after the other: that is depth-first order."""
    fresh = lengths - common
    num_nodes = int(fresh.sum())
    owner = np.repeat(np.arange(len(lengths)), fresh)
    first = np.cumsum(fresh) - fresh
    depth = common[owner] + 1 + (np.arange(num_nodes) - first[owner])
    nodes = np.empty((num_nodes + 1, 4), dtype=np.int32)
    nodes[:num_nodes, 0] = flat[begins[owner] + depth - 1]
    nodes[:num_nodes, 3] = depth
    # a text ends at its last node; a text equal to the one before has no node of its own and ends at the same node
    counts = np.bincount(np.cumsum(fresh) - 1, minlength=num_nodes) if num_nodes else np.zeros(0, dtype=np.int64)
    nodes[:num_nodes, 2] = np.cumsum(counts) - counts
    nodes[num_nodes] = (0, num_nodes + 1, len(lengths), 0)
    next_not_deeper(nodes)
    return nodes
