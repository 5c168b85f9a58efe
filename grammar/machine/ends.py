"""The tokens that end a text: where it may end, those with which no longer text can go on.

A text may end in an accepting state. A model that wants a refused token there wants to write something after the text,
so the text ends. It does not end if the first bytes of that token lead to an accepting state again: then the text goes
on first. After `New` in the choices `New` and `New York`, for example, the tokens ` is` and `.` end the text, but
` Yorkers` does not. So a text is as long as the model means it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ramet.grammar.machine.vocabulary import Vocabulary
from ramet.grammar.machine.walker import ACCEPTED, UNASKED, mark_ends

_MAX_ASKED = 256  # beginnings of tokens; those of other tokens do not end the text


def end_tokens(
    vocabulary: Vocabulary, mask: NDArray[np.int32], read: Callable[[bytes], int]
) -> NDArray[np.int32] | None:
    """Return the mask row, int32 [W], of the tokens that end a text in an accepting state; None if there are none.

    mask: the state's mask row. read: returns how the grammar takes the first bytes of a token from this state: REFUSED,
    GOES_ON or ACCEPTED (see walker.py). It is asked seldom: the mask answers for beginnings that are tokens themselves,
    and for those that every token goes on from.
    """
    trie, texts = vocabulary.trie, vocabulary.token_bytes
    allowed, ends = mask.copy(), np.zeros(len(mask), dtype=np.int32)
    node, answer = 0, UNASKED
    for num_asked in range(len(trie.nodes)):
        node = mark_ends(trie.nodes, trie.values, allowed, ends, answer, node)
        if node < 0:
            break
        _, _, first, depth = trie.nodes[node].tolist()
        answer = ACCEPTED if num_asked >= _MAX_ASKED else read(texts[trie.values[first]][:depth])
    return ends if ends.any() else None


def is_end_only(vocabulary: Vocabulary, mask: NDArray[np.int32]) -> bool:
    """Tell whether a mask row allows end tokens and nothing else."""
    return bool((mask & ~vocabulary.eos_row == 0).all() and mask.any())


def refused_by_first_byte(vocabulary: Vocabulary, mask: NDArray[np.int32]) -> NDArray[np.int32] | None:
    """Do as `end_tokens`, for a grammar of which only the mask is known: it counts the bytes that are refused."""
    if not (mask & vocabulary.eos_row).any():
        return None
    return end_tokens(vocabulary, mask, lambda text: ACCEPTED)
