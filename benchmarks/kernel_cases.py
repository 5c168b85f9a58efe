"""What the kernel checks and timings share: shapes, inputs, the tile sizes that are tried."""

from __future__ import annotations

from typing import Any

from rehearsal import DRY  # before the imports below

# isort: split
import numpy as np
import torch
from torch import Tensor
from vocabulary import make_vocabulary

from ramet.kernels.grammar.mask import AutomatonTables, TokenTable
from ramet.kernels.layers.gemv import GemvConfig
from ramet.kernels.sampling import sample as sampling

DEVICE = "cpu" if DRY else "cuda"
HIDDEN, INTER, HEADS, KV_HEADS, DIM, VOCAB, LAYERS = 4096, 14336, 32, 8, 128, 128_256, 32
if DRY:
    HIDDEN, INTER, HEADS, KV_HEADS, DIM, VOCAB, LAYERS = 64, 96, 4, 2, 16, 2_016, 2
DTYPE = torch.float16 if DRY else torch.bfloat16  # the interpreter has no bf16
QKV = (HEADS + 2 * KV_HEADS) * DIM
SHAPES = {"qkv": (QKV, HIDDEN), "o": (HIDDEN, HIDDEN), "gate_up": (2 * INTER, HIDDEN), "down": (HIDDEN, INTER)}
SHAPES["head"] = (VOCAB, HIDDEN)
BATCHES = [1, 2] if DRY else [1, 32, 64, 128, 256]
SUM_CONFIGS = [
    GemvConfig("sum", *cut)
    for cut in [
        (2, 2048, 3, 4), (4, 512, 4, 2), (4, 512, 4, 4), (4, 1024, 1, 4), (4, 1024, 2, 4), (4, 1024, 3, 4),
        (4, 1024, 4, 4), (4, 1024, 3, 8), (4, 2048, 3, 8), (8, 256, 4, 4), (8, 512, 1, 4), (8, 512, 3, 4),
        (8, 512, 4, 4), (8, 1024, 3, 8), (16, 256, 4, 4), (16, 256, 6, 4), (16, 512, 3, 8),
    ]
]  # fmt: skip
DOT_CONFIGS = [
    GemvConfig("dot", *cut)
    for cut in [
        (16, 256, 4, 4), (16, 256, 5, 2), (16, 512, 3, 4), (16, 512, 4, 4), (32, 128, 6, 4), (32, 256, 3, 4),
        (32, 256, 4, 4), (32, 256, 4, 8), (64, 128, 4, 4), (64, 128, 5, 4), (64, 256, 3, 4), (128, 64, 6, 4),
        (128, 128, 4, 4),
    ]
]  # fmt: skip
# Of products with the activation behind them: (rows, outputs of a half, depth) of a tile, tiles in flight, warps.
TILE_CONFIGS = [
    GemvConfig("tile", *cut, block_m=rows)
    for rows, *cut in [
        (64, 64, 64, 4, 4), (64, 64, 128, 3, 4), (64, 128, 64, 4, 8), (64, 32, 128, 4, 4), (128, 64, 64, 4, 8),
        (128, 64, 128, 3, 8), (128, 128, 64, 3, 8), (128, 128, 64, 4, 8),
    ]
]  # fmt: skip
GATE_ROWS = [2] if DRY else [32, 64, 128, 256, 384]
if DRY:
    TILE_CONFIGS = [GemvConfig("tile", 16, 32, 2, 2)]
    SUM_CONFIGS, DOT_CONFIGS = [GemvConfig("sum", 4, 64, 2, 2)], [GemvConfig("dot", 16, 32, 2, 2)]
Record = dict[str, Any]  # what json.dumps takes


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.float32 if DRY else DTYPE).to(DTYPE)


def integers(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape, dtype=torch.int32, device=DEVICE)


def difference(actual: Tensor, expected: Tensor) -> str:
    """Where a result is wrong: how much of it, from which index on, and the largest difference.

    Wrong are a NaN that is not expected, and what is off by more than a tenth of the expected values' size (their root
    mean square); of integers everything that differs.
    """
    is_exact = not expected.is_floating_point()
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    gap = (actual - expected).abs().nan_to_num(nan=torch.inf)
    wrong = gap > (0.0 if is_exact else 0.1 * float(expected.square().nanmean().sqrt()))
    largest = np.unravel_index(int(gap.argmax()), gap.shape)
    text = f"shape {list(gap.shape)}: {int(wrong.sum())} wrong, largest difference {float(gap.max()):.3g}"
    text += f" at {[int(i) for i in largest]}"
    if bool(wrong.any()):
        first = wrong.nonzero()[0].tolist()
        text += f", first wrong at {first}: {actual[tuple(first)]:.6g} instead of {expected[tuple(first)]:.6g}"
    return text


def rope_arguments(num_tokens: int) -> list[Any]:
    fused = randn(num_tokens, QKV)
    widths = [HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM]
    q, k, v = (part.view(num_tokens, -1, DIM) for part in fused.split(widths, dim=1))
    angles = torch.rand(8192, DIM // 2, device=DEVICE) * 6.28
    num_pages = num_tokens // 16 + 2
    slots = (16 + torch.randperm(num_tokens)).to(torch.int32).to(DEVICE)
    positions = integers(8192, num_tokens)
    caches = [torch.zeros(num_pages, KV_HEADS, 16, DIM, dtype=DTYPE, device=DEVICE) for _ in range(2)]
    return [q, k, v, angles.cos(), angles.sin(), positions, slots, *caches]


def sampling_tables(batch: int, **columns: float) -> sampling.SamplingTables:
    tables = sampling.SamplingTables.create(batch, DEVICE)
    for name, value in columns.items():
        getattr(tables, name)[:batch] = value
    tables.seed_low.random_()
    return tables


MODES: dict[str, dict[str, float]] = {
    "greedy": {},
    "temperature": {"temperature": 0.8},
    "top_p 0.9": {"temperature": 0.8, "top_p": 0.9},
    "top_k 50": {"temperature": 1.0, "top_k": 50},
    "top_k 20, top_p 0.8": {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    "min_p 0.05": {"temperature": 1.0, "min_p": 0.05},
}


def random_automaton(num_states: int) -> AutomatonTables:
    """About 30 byte classes, a third of the transitions refused: most tokens die early, some are read to their end."""
    generator = np.random.default_rng(num_states)
    byte_class = (np.arange(256) % 30).astype(np.uint8)
    transitions = generator.integers(0, num_states, size=(num_states, 30)).astype(np.int32)
    transitions[generator.random((num_states, 30)) < 0.35] = -1
    accepting = generator.choice(np.array([0, 1, 2], dtype=np.uint8), size=num_states, p=[0.8, 0.15, 0.05])
    return AutomatonTables(byte_class, transitions, accepting)


def token_table() -> TokenTable:
    pieces = make_vocabulary(VOCAB)
    return TokenTable.create(pieces, [VOCAB - 1], [], VOCAB, DEVICE)


def name_of(config: GemvConfig) -> str:
    cut = f"{config.block_n}x{config.block_k} s{config.num_stages} w{config.num_warps}"
    if config.kernel == "tile":
        cut = f"{config.block_m}x{cut}"
    return f"{config.kernel} {cut}{' early' if config.early_launch else ''}"
