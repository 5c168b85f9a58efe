"""What fits on which cards, from a model's configuration alone: no weights, no GPU.

The rules are those of an engine that starts: the tensors of a model (`weights.expected_tensors`), a rank's share of
them (`parallel.share`), and how memory is divided (`steps.memory.plan_memory`). What an engine measures at its start is
assumed here: see `ASSUMED_BYTES` and `workspace_bytes`.

Not here: the command line (`ramet.cli.size`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ramet.errors import BrokenModelFile, ConfigError, OutOfMemory, UnsupportedArchitecture
from ramet.kernels.grammar.arena import STATE_BYTES, arena_sizes
from ramet.kernels.layers.kv_fp8 import FP8
from ramet.runtime.engine.config import DEFAULT_PAGE_SIZE, EngineConfig
from ramet.runtime.models.config import Fields, ModelConfig
from ramet.runtime.models.config_files import config_from_hf
from ramet.runtime.models.weights import expected_tensors
from ramet.runtime.parallel.share import Share, check_size, fits
from ramet.runtime.steps.kv_cache import bytes_per_token
from ramet.runtime.steps.logit_edits import NUM_EDIT_ROWS
from ramet.runtime.steps.memory import MemoryPlan, MemoryReading, logits_bytes, plan_memory

GIB = 2**30
_MIB = 2**20
# Taken without a measurement: the driver's and the libraries' part of a card, what each further rank's communication
# adds, and all CUDA graphs.
ASSUMED_BYTES = {"driver": 600 * _MIB, "communication": 400 * _MIB, "graphs": 700 * _MIB}
# Bits of a weight of a layer's matrices. 4 bits: a 16-bit scale and a 4-bit zero point for 128 weights beside. Token
# table, head and norms stay at 16 bits.
WEIGHT_BITS = {"none": 16.0, "fp8": 8.0, "int8": 8.0, "int4": 4 + 20 / 128}
_USEFUL_TOKENS = 4096  # of KV, below which nobody would serve the model
_MAX_TP = 8


@dataclass(frozen=True, slots=True)
class GpuModel:
    """A GPU by its data sheet. gigabytes: as in its name. total: bytes, as the driver reports them.

    flops, fp8_flops: dense, a second.
    """

    name: str
    gigabytes: int
    total: int
    bytes_per_s: float
    flops: float
    fp8_flops: float | None = None


CARDS = {
    card.name: card
    for card in (
        GpuModel("l4", 24, 23034 * _MIB, 0.300e12, 121e12, 242e12),
        GpuModel("rtx4090", 24, 24564 * _MIB, 1.008e12, 165e12, 330e12),
        GpuModel("a100-40gb", 40, 40960 * _MIB, 1.555e12, 312e12),
        GpuModel("a100", 80, 81920 * _MIB, 2.039e12, 312e12),
        GpuModel("h100", 80, 81559 * _MIB, 3.35e12, 989e12, 1979e12),
        GpuModel("h100-nvl", 94, 95830 * _MIB, 3.9e12, 835e12, 1671e12),
        GpuModel("h200", 141, 143771 * _MIB, 4.8e12, 989e12, 1979e12),
        GpuModel("b200", 192, 183359 * _MIB, 8.0e12, 2250e12, 4500e12),
    )
}
TABLE_CARDS = ("rtx4090", "a100-40gb", "h100", "h200", "b200")  # 24, 40, 80, 141, 192 GB


def read_config(name: str, fields: Fields) -> ModelConfig:
    """Read a parsed `config.json`, without its quantisation. Raises: UnsupportedArchitecture, BrokenModelFile."""
    fields = {key: value for key, value in fields.items() if key != "quantization_config"}  # --quantization says it
    try:
        return config_from_hf(fields)
    except UnsupportedArchitecture:
        raise
    except (TypeError, ValueError, AttributeError) as error:  # includes BrokenModelFile; others: wrong types
        raise BrokenModelFile(f"config.json of {name}: {error}") from error


def why_not_on_gpus(config: ModelConfig) -> str | None:
    """Why Ramet's own layers cannot run a model on a GPU, if so."""
    if config.experts is None:
        return None
    return "on a GPU, only transformers runs experts (--model-impl transformers)"


def num_params(config: ModelConfig, *, is_active: bool = False) -> tuple[int, int]:
    """Return the weights in matrices of layers, and all others. is_active: only those that one token uses."""
    experts = config.experts
    if experts is not None:  # all experts of a layer are alike
        config = replace(config, experts=replace(experts, count=1, per_token=1))
    matrices = others = 0
    for name, shape in expected_tensors(config).items():
        count = math.prod(shape)
        if experts is not None and ".mlp.experts." in name:
            count *= experts.per_token if is_active else experts.count
        if experts is not None and name.endswith(".mlp.gate.weight"):  # the router
            others += count * experts.count
        elif ".layers." not in name or len(shape) == 1:
            others += count
        else:
            matrices += count
    return matrices, others


@dataclass(frozen=True, slots=True)
class Sizing:
    """What one replica of an engine holds and at best does. Bytes are of each card.

    decode_floor_s: reading a token's weights once. prefill_floor_s: a token's products at the card's peak.
    """

    card: GpuModel
    engine: EngineConfig
    plan: MemoryPlan
    kv_bytes_per_token: int
    num_kv_tokens: int
    context: int
    decode_floor_s: float
    prefill_floor_s: float

    def flags(self) -> list[str]:
        """The flags of `ramet serve` that differ from their defaults, of those that change what fits."""
        default = EngineConfig()
        names = (
            *("tp", "quantization", "context_length", "kv_cache_dtype", "mem_fraction_static"),
            *("chunked_prefill_size", "max_running_requests"),
        )
        changed = [name for name in names if getattr(self.engine, name) != getattr(default, name)]
        return [f"--{name.replace('_', '-')} {getattr(self.engine, name)}" for name in changed]

    def num_sequences(self, length: int) -> int:
        """How many sequences of so many tokens fit at once."""
        return min(self.num_kv_tokens // length, self.engine.max_running_requests)


def size(model: ModelConfig, card: GpuModel, engine: EngineConfig) -> Sizing:
    """Divide the memory of each card.

    Raises:
        OutOfMemory: it does not fit; the message has the parts. ConfigError: `tp` does not divide the model.
    """
    check_size(model, engine.tp)
    if engine.context_length is not None and engine.context_length > model.max_position_embeddings:
        raise ConfigError(
            f"context_length is {engine.context_length:,} but the model was trained for "
            f"{model.max_position_embeddings:,}; lower --context-length"
        )
    config = Share(0, engine.tp).config(model)
    matrices, others = num_params(config)
    bits = weight_bits(engine)
    weights = int(matrices * bits / 8) + others * 2
    outside = ASSUMED_BYTES["driver"] + (ASSUMED_BYTES["communication"] if engine.tp > 1 else 0)
    page_size = engine.page_size or DEFAULT_PAGE_SIZE
    kv_bytes = bytes_per_token(config, torch.bfloat16 if engine.kv_cache_dtype == "auto" else FP8)
    held = weights + tables_bytes(config, card, engine)
    reading = MemoryReading(card.total, card.total - outside - held, held, held)
    graphs = ASSUMED_BYTES["graphs"] if engine.cuda_graph else 0
    plan = plan_memory(
        reading,
        workspace=workspace_bytes(config, engine),
        graphs=graphs,
        fraction=engine.mem_fraction_static,
        page_bytes=kv_bytes * page_size,
    )
    num_tokens = (plan.num_pages - 1) * page_size
    active, _ = num_params(config, is_active=True)
    head = config.vocab_size * config.hidden_size
    read = active * bits / 8 + head * 2
    peak = card.fp8_flops if bits == 8 and card.fp8_flops else card.flops
    return Sizing(
        card,
        engine,
        plan,
        kv_bytes,
        num_tokens,
        min(num_tokens, engine.context_length or model.max_position_embeddings),
        read / card.bytes_per_s,
        2 * active / peak,
    )


def weight_bits(engine: EngineConfig) -> float:
    """Bits of a weight of a layer's matrices."""
    return WEIGHT_BITS[engine.quantization or "none"]


def tables_bytes(config: ModelConfig, card: GpuModel, engine: EngineConfig) -> int:
    """Bytes of a rank's tensors beside the weights: rotary angles, edits of logits, automata and their mask rows."""
    ropes = {config.layer_rope(layer) for layer in range(config.num_layers)}
    angles = len(ropes) * config.max_position_embeddings * config.head_dim * 4
    edits = 12 * (min(engine.max_running_requests, NUM_EDIT_ROWS) + 1) * config.vocab_size
    if not engine.grammar_on_device:
        return angles + edits
    sizes = arena_sizes(card.total, config.vocab_size)
    num_rows = sizes["max_mask_rows"] + engine.max_running_requests + 2
    return angles + edits + sizes["max_states"] * STATE_BYTES + 4 * num_rows * -(-config.vocab_size // 32)


def workspace_bytes(config: ModelConfig, engine: EngineConfig) -> int:
    """Estimate the largest step's memory of a rank: the residual and its copies, q, k, v, gate, up, and logits."""
    tokens = engine.chunked_prefill_size or 4096
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    experts = config.experts
    inner = config.intermediate_size if experts is None else experts.per_token * experts.size + experts.shared_size
    values = 4 * config.hidden_size + heads + 3 * inner
    return 2 * tokens * values + logits_bytes(engine.max_running_requests, config.vocab_size)


def fitting(model: ModelConfig, card: GpuModel, engine: EngineConfig) -> Sizing | None:
    """Find flags with which a model fits on such cards with KV for its context, or for a useful one.

    Of those, the first that is least unlike the defaults. None: nothing fits.
    """
    wanted = engine.context_length or min(model.max_position_embeddings, _USEFUL_TOKENS)
    for other in _engines(engine):
        try:
            found = size(model, card, other)
        except OutOfMemory:
            continue
        if found.num_kv_tokens >= wanted:
            return found
    return None


def _engines(engine: EngineConfig) -> Iterator[EngineConfig]:
    """Configurations that leave more and more room for KV."""
    yield engine
    for fraction, chunk, running in ((0.95, None, 256), (0.95, 2048, 128), (0.95, 1024, 64), (0.97, 512, 32)):
        yield replace(
            engine,
            mem_fraction_static=max(fraction, engine.mem_fraction_static),
            chunked_prefill_size=engine.chunked_prefill_size or chunk,
            max_running_requests=min(running, engine.max_running_requests),
        )


def smallest(model: ModelConfig, card: GpuModel, engine: EngineConfig, max_tp: int = _MAX_TP) -> Sizing | None:
    """Find the lowest `tp`, a power of two up to `max_tp`, with which a model fits on cards of this kind."""
    for tp in (2**n for n in range(max_tp.bit_length())):
        if tp <= max_tp and fits(model, tp):
            found = fitting(model, card, replace(engine, tp=tp))
            if found is not None:
                return found
    return None


def nearest(model: ModelConfig, card: GpuModel, engine: EngineConfig, max_tp: int = _MAX_TP) -> list[Sizing]:
    """What fits where an engine does not: more cards of the kind, fewer bits a weight, a shorter context, a larger
    card.
    """
    found = [smallest(model, card, engine, max_tp)]
    fewer = (name for name in ("fp8", "int4") if WEIGHT_BITS[name] < weight_bits(engine))
    found += [smallest(model, card, replace(engine, quantization=name), max_tp) for name in fewer]
    if engine.context_length is not None:
        shorter = fitting(model, card, replace(engine, context_length=None))
        if shorter is not None:
            length = shorter.num_kv_tokens // 1024 * 1024
            found.append(size(model, card, replace(shorter.engine, context_length=length)))
    larger = sorted((other for other in CARDS.values() if other.total > card.total), key=lambda other: other.total)
    on_larger = (smallest(model, other, replace(engine, tp=1), max_tp) for other in larger)
    found.append(next(filter(None, on_larger), None))
    return [one for one in found if one is not None]
