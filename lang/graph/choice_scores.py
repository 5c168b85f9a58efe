"""Scores of choices, their probabilities, and the selected choice, from the log-probabilities of the choices' tokens.

`likelihood`        log P(the choice's tokens | the prompt). Normalised, these give the exact probabilities.
`token_normalized`  the mean log-probability of a token. Favours long choices with a predictable end.
`greedy`            prefers the choice that greedy decoding restricted to the choices would write.
`unconditional`     the likelihood minus the likelihood of the same tokens without the prompt.
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
    """Return one score for each choice; higher is better.

    `logprobs[c][i]`: the log-probability of `tokens[c][i]` after the prompt and the choice's earlier tokens.
    """
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
    """Walk the trie of the choices along the likeliest token.

    A choice's score is the number of its tokens on that walk plus the probability of the last of them.

    If one choice is a prefix of another, the walk follows the longer one, because its next token is allowed.
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
    """Return the softmax of the scores; it sums to one."""
    top = max(values)
    weights = [math.exp((value - top) / temperature) for value in values]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def choose(values: Sequence[float], temperature: float, seed: int | None) -> int:
    """Return the index of the best score, the first of equals. Above temperature 0, draw it from `probabilities`."""
    if temperature == 0:
        return max(range(len(values)), key=lambda c: values[c])
    weights = probabilities(values, temperature)
    return random.Random(seed).choices(range(len(values)), weights)[0]
