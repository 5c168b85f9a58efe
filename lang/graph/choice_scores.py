"""Scores of choices, their probabilities, and the selected choice, from the log-probabilities of the choices' tokens.

`calibrated`        the default: (log P(choice | prompt) - 1/2 log P(choice | "Answer:")) / sqrt(number of tokens).
                    Takes off half of what a choice owes to being common, and half of what a long one loses by its
                    length, so no choice is preferred for being short, frequent, or the beginning of another one.
`likelihood`        log P(the choice's tokens | the prompt). Normalised, these give the model's exact probabilities.
                    A choice that is the beginning of another one always beats it.
`token_normalized`  the mean log-probability of a token. Favours long choices with a predictable end.
`greedy`            prefers the choice that greedy decoding restricted to the choices would write.
`unconditional`     the likelihood minus the likelihood of the same tokens without the prompt.

Sources: the last three are the choice methods described by the SGLang frontend's documentation. `calibrated` mixes two
known corrections: the likelihood after a neutral text, by which domain-conditional PMI divides (Holtzman et al. 2021,
arXiv:2104.08315), and the length. benchmarks/bench_quality.py compares the scorers on four tasks.
"""

from __future__ import annotations

import math
import random
from collections.abc import Hashable, Sequence

# By scorer, the text before the choices where they are scored a second time, without the prompt; "": an opening token.
NEUTRAL_TEXT = {"calibrated": "Answer:", "unconditional": ""}


def num_shared(choices: Sequence[Sequence[Hashable]]) -> int:
    """Return how many leading tokens all choices share, which need no comparing.

    Each of several choices keeps a token of its own, also one that is the beginning of all others.
    """
    shortest = min(map(len, choices))
    found = next((i for i in range(shortest) if len({tokens[i] for tokens in choices}) > 1), shortest)
    return min(found, shortest - 1) if len(choices) > 1 else found


def scores(
    scorer: str,
    tokens: Sequence[Sequence[Hashable]],
    logprobs: Sequence[Sequence[float]],
    neutral: Sequence[Sequence[float]] | None = None,
) -> list[float]:
    """Return one score for each choice; higher is better.

    `logprobs[c][i]`: the log-probability of `tokens[c][i]` after the prompt and the choice's earlier tokens. `neutral`:
    the same after NEUTRAL_TEXT, for the scorers that have one.
    """
    sums = [math.fsum(row) for row in logprobs]
    if scorer == "likelihood":
        return sums
    if scorer == "token_normalized":
        return [total / max(1, len(row)) for total, row in zip(sums, logprobs, strict=True)]
    if scorer in NEUTRAL_TEXT:
        assert neutral is not None
        common = [math.fsum(row) for row in neutral]
        if scorer == "unconditional":
            return [total - taken for total, taken in zip(sums, common, strict=True)]
        lengths = [max(1, len(row)) for row in logprobs]
        return [(total - taken / 2) / math.sqrt(n) for total, taken, n in zip(sums, common, lengths, strict=True)]
    assert scorer == "greedy", scorer
    return _greedy_scores(tokens, logprobs)


def _greedy_scores(tokens: Sequence[Sequence[Hashable]], logprobs: Sequence[Sequence[float]]) -> list[float]:
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
