"""The workloads that engines are compared on, as token ids from a fixed seed.

A workload is a list of chains; a chain is a list of turns that run one after the other; a turn is (new tokens, number
of tokens to generate). A turn's prompt is the chain's history so far, generated tokens included, and its new tokens.
Exactly the stated number is generated (end of text ignored, temperature 0). Concurrency C: C chains are in flight.
`fork` differs: a parent runs first, alone, then every branch at once.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

LOW, HIGH = 1000, 120_000  # ids away from special tokens; HIGH is lowered for small vocabularies

JSON_SCHEMA: dict[str, Any] = {  # Any: JSON
    "type": "array",
    "minItems": 30,
    "items": {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "name": {"type": "string", "maxLength": 24},
            "age": {"type": "integer", "minimum": 0, "maximum": 999},
            "role": {"type": "string", "enum": ["admin", "user", "guest", "operator"]},
            "active": {"type": "boolean"},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 1, "maxItems": 4},
        },
        "required": ["name", "age", "role", "active", "tags"],
    },
}


@dataclass(frozen=True, slots=True)
class Turn:
    new: list[int]
    out: int


Chain = list[Turn]


@dataclass(frozen=True, slots=True)
class Workload:
    chains: list[Chain]
    parent: Chain | None = None


def _draw(rng: random.Random, count: int, high: int) -> list[int]:
    low = min(LOW, high // 2)  # a byte vocabulary has no ids above LOW
    return [rng.randrange(low, high) for _ in range(count)]


def unique(n: int, seed: int = 0, high: int = HIGH, prompt: int = 1024, out: int = 128) -> Workload:
    """Nothing is shared: n different prompts."""
    rng = random.Random(f"unique{seed}")
    return Workload([[Turn(_draw(rng, prompt, high), out)] for _ in range(n)])


def rag(n: int, seed: int = 0, high: int = HIGH, document: int = 2048, question: int = 128, out: int = 128) -> Workload:
    """One shared document of 2,048 tokens, questions of 128."""
    rng = random.Random(f"rag{seed}")
    shared = _draw(rng, document, high)
    return Workload([[Turn(shared + _draw(rng, question, high), out)] for _ in range(n)])


def multiturn(n: int, seed: int = 0, high: int = HIGH, turns: int = 4, question: int = 128, out: int = 128) -> Workload:
    """Conversations of four turns: 128 tokens from the user, 128 generated, each."""
    rng = random.Random(f"mt{seed}")
    return Workload([[Turn(_draw(rng, question, high), out) for _ in range(turns)] for _ in range(n)])


def agentic(
    n: int,
    seed: int = 0,
    high: int = HIGH,
    turns: int = 3,
    tools: int = 1024,
    memory: int = 512,
    question: int = 128,
    out: int = 128,
) -> Workload:
    """1,024 tokens of tool definitions shared by all, 512 of memory for each agent, three turns of 128 + 128."""
    rng = random.Random(f"ag{seed}")
    shared = _draw(rng, tools, high)
    chains = []
    for _ in range(n):
        own = _draw(rng, memory, high)
        chains.append([Turn((shared + own if t == 0 else []) + _draw(rng, question, high), out) for t in range(turns)])
    return Workload(chains)


def fork(n: int, seed: int = 0, high: int = HIGH, prefix: int = 8192, out: int = 256) -> Workload:
    """One long prefix, then n branches of one token of their own and 256 generated each."""
    rng = random.Random(f"fork{seed}")
    shared = _draw(rng, prefix, high)
    return Workload([[Turn([*shared, LOW + i], out)] for i in range(n)], parent=[Turn(shared, 1)])


def decode1(n: int, seed: int = 0, high: int = HIGH) -> Workload:
    """One sequence at a time: 512 in, 256 out."""
    rng = random.Random(f"d1{seed}")
    return Workload([[Turn(_draw(rng, 512, high), 256)] for _ in range(n)])


def mixed(n: int, seed: int = 0, high: int = HIGH, short: int = 500, long: int = 15_000, out: int = 256) -> Workload:
    """Every 64th prompt is 30 times as long as the others; nothing is shared."""
    rng = random.Random(f"mixed{seed}")
    return Workload([[Turn(_draw(rng, long if i % 64 == 32 else short, high), out)] for i in range(n)])


def json_workload(n: int, seed: int = 0, high: int = HIGH) -> Workload:
    """128 in, 128 out; `json` rows run it under JSON_SCHEMA, `jsonoff` rows without."""
    return unique(n, seed, high, prompt=128, out=128)


def shrunk(workload: Workload, divisor: int) -> Workload:
    """The same chains with every length divided; what they share they still share."""

    def shrink(chain: Chain) -> Chain:
        # With the last token, which may be the only one of its own.
        return [Turn(turn.new[:-1:divisor] + turn.new[-1:], max(turn.out // divisor, 1)) for turn in chain]

    if divisor == 1:
        return workload
    return Workload([shrink(chain) for chain in workload.chains], workload.parent and shrink(workload.parent))


def eighth(name: str, n: int, seed: int = 0, high: int = HIGH) -> Workload:
    """One of the four workloads of a server with every length divided by eight: what a CPU can do in seconds."""
    if name == "unique":
        return unique(n, seed, high, prompt=128, out=16)
    if name == "rag":
        return rag(n, seed, high, document=256, question=16, out=16)
    if name == "multiturn":
        return multiturn(n, seed, high, question=16, out=16)
    if name == "agentic":
        return agentic(n, seed, high, tools=128, memory=64, question=16, out=16)
    raise ValueError(f"the workload is {name!r} but must be one of unique, rag, multiturn, agentic")


MAKERS = {
    "unique": unique,
    "rag": rag,
    "multiturn": multiturn,
    "agentic": agentic,
    "fork": fork,
    "decode1": decode1,
    "mixed": mixed,
    "json": json_workload,
    "jsonoff": json_workload,
}

# (workload, concurrency, number of chains)
ROWS = [
    ("decode1", 1, 3),
    ("unique", 10, 60),
    ("unique", 50, 200),
    ("rag", 50, 200),
    ("multiturn", 50, 50),
    ("agentic", 50, 50),
    ("fork", 64, 64),
    ("mixed", 64, 128),
    ("unique", 256, 512),
    ("rag", 256, 512),
    ("multiturn", 256, 256),
    ("agentic", 256, 256),
    ("jsonoff", 1, 4),
    ("json", 1, 4),
    ("jsonoff", 32, 96),
    ("json", 32, 96),
    ("jsonoff", 128, 256),
    ("json", 128, 256),
]
