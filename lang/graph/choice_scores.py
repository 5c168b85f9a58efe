"""From token log-probabilities of some choices to scores, probabilities and the one that is taken.

`likelihood`        log P(the choice's tokens | what precedes); the probabilities are these, normalised. Exact.
`token_normalized`  the mean log-probability of a token. Favours long choices with a predictable end.
`greedy`            what greedy decoding restricted to the choices would write.
`unconditional`     likelihood minus the likelihood of the same tokens without what precedes.
Source: the last three are the choice methods described by the SGLang frontend's documentation.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence


def scores(
    scorer: str,
    tokens: Sequence[Sequence[int]],
    logprobs: Sequence[Sequence[float]],
    unconditional: Sequence[Sequence[float]] | None = None,
) -> list[float]:
    """One score a choice, higher is better. `logprobs[c][i]` is that of `tokens[c][i]` after those before it."""
    sums = [math.fsum(row) for row in logprobs]
    if scorer == "likelihood":
        return sums
    if scorer == "token_normalized":
        return [total / max(1, len(row)) for total, row in zip(sums, logprobs, strict=True)]
    if scorer == "unconditional":
        assert unconditional is not None
        return [total - math.fsum(row) for total, row in zip(sums, unconditional, strict=True)]
    assert scorer == "greedy", scorer
    return _greedy_scores(tokens, logprobs)


def _greedy_scores(tokens: Sequence[Sequence[int]], logprobs: Sequence[Sequence[float]]) -> list[float]:
    """Walk the trie of the choices along the likeliest token; a choice scores how far it was followed.

    Where one choice is the beginning of another, the longer one is followed: its next token is one that is allowed.
    """
    alive, depth = list(range(len(tokens))), 0
    reached = [0.0] * len(tokens)
    while True:
        deeper = [c for c in alive if len(tokens[c]) > depth]
        if not deeper:
            break
        best = max(deeper, key=lambda c: logprobs[c][depth])
        alive = [c for c in deeper if tokens[c][depth] == tokens[best][depth]]
        depth += 1
        for c in alive:
            reached[c] = depth + math.exp(logprobs[c][depth - 1])
    return reached


def probabilities(values: Sequence[float], temperature: float = 1.0) -> list[float]:
    """The softmax of scores; sums to one."""
    top = max(values)
    weights = [math.exp((value - top) / temperature) for value in values]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def choose(values: Sequence[float], temperature: float, seed: int | None) -> int:
    """The index of the best score, the first of equals; with a temperature, one drawn by `probabilities`."""
    if temperature == 0:
        return max(range(len(values)), key=lambda c: values[c])
    weights = probabilities(values, temperature)
    return random.Random(seed).choices(range(len(values)), weights)[0]
