"""How tokens are chosen: the graph's form of it, its limits, and what a generation that failed its checks does next."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

RETRY_TEMPERATURE = 0.7  # of what was greedy: it would say the same again


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """How tokens are chosen; None leaves the choice to the engine. Ranges are those of the engine's parameters."""

    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: tuple[tuple[int, float], ...] | None = None
    seed: int | None = None
    stop: tuple[str, ...] | None = None
    stop_token_ids: tuple[int, ...] | None = None
    ignore_eos: bool | None = None
    logprobs: int | None = None


def sampling_problem(sampling: Sampling) -> str | None:
    """What is wrong with these values, or None."""
    limits: Sequence[tuple[str, float, float]] = (
        ("max_tokens", 1, math.inf),
        ("min_tokens", 0, math.inf),
        ("temperature", 0, 100),
        ("top_k", 0, 2**31 - 1),
        ("min_p", 0, 1),
        ("frequency_penalty", -2, 2),
        ("presence_penalty", -2, 2),
        ("logprobs", 0, 64),
    )
    for name, low, high in limits:
        value = getattr(sampling, name)
        if value is not None and not low <= value <= high:
            limit = f"at least {low}" if high == math.inf else f"in [{low}, {high}]"
            return f"{name} is {value!r}, but must be {limit}"
    for name, high in (("top_p", 1), ("repetition_penalty", 10)):
        value = getattr(sampling, name)
        if value is not None and not 0 < value <= high:
            return f"{name} is {value!r}, but must be in (0, {high}]"
    if sampling.max_tokens is not None and (sampling.min_tokens or 0) > sampling.max_tokens:
        return f"min_tokens is {sampling.min_tokens}, but max_tokens is {sampling.max_tokens}"
    if any(not text for text in sampling.stop or ()):
        return "a stop string is empty"
    if any(token < 0 for token in sampling.stop_token_ids or ()):
        return "a stop token id is negative"
    if any(token < 0 or not -100 <= bias <= 100 for token, bias in sampling.logit_bias or ()):
        return "logit_bias must map token ids >= 0 to values in [-100, 100]"
    return None


def retry_sampling(sampling: Sampling, attempt: int) -> Sampling:
    """The values of try number `attempt` (0: the first) of a generation whose value was refused so often.

    A seed moves on by one; what is greedy is drawn, with a seed of its own, so that runs repeat.
    """
    if attempt == 0:
        return sampling
    changes: dict[str, object] = {}
    if sampling.temperature == 0 or sampling.top_k == 1:
        changes = {"temperature": RETRY_TEMPERATURE, "top_k": None, "seed": (sampling.seed or 0) + attempt}
    elif sampling.seed is not None:
        changes = {"seed": sampling.seed + attempt}
    return msgspec.structs.replace(sampling, **changes)
