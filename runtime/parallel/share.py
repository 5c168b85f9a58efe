"""`Share`: the part of a model that one rank of a tensor-parallel engine holds.

The part is a smaller model of the same kind: some of the heads, some of the feed-forward's inner features, some rows of
the token table. So `build_decoder` makes it from a smaller configuration and parts of the tensors, whatever their
storage, and `apply_tensor_parallel` then makes the parts one model.

A rank holds whole heads. If there are fewer KV heads than ranks, several ranks hold the same KV head. Rows of the token
table are dealt out in equal shares, the last ones padded with zeros.
Source: Megatron-LM, Shoeybi et al. 2019 (arXiv:1909.08053), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ramet.errors import ConfigError
from ramet.runtime.models.config import Experts, ModelConfig
from ramet.runtime.models.weights import Part

_VOCAB_ROWS = 64  # a share of the token table is a multiple of this: compiled products take whole tiles of rows


@dataclass(frozen=True, slots=True)
class Share:
    """One rank of `size`. Make it only for sizes that `check_size` accepts."""

    rank: int
    size: int

    def config(self, whole: ModelConfig) -> ModelConfig:
        """The configuration of the part."""
        return replace(
            whole,
            num_heads=whole.num_heads // self.size,
            num_kv_heads=max(whole.num_kv_heads // self.size, 1),
            intermediate_size=whole.intermediate_size // self.size,
            experts=None if whole.experts is None else self._experts(whole.experts),
            vocab_size=self.vocab_rows(whole),
        )

    def _experts(self, whole: Experts) -> Experts:
        """Every rank holds a part of each expert, so all ranks compute the same tokens."""
        return replace(whole, size=whole.size // self.size, shared_size=whole.shared_size // self.size)

    def vocab_rows(self, whole: ModelConfig) -> int:
        """Rows of the token table that every rank holds, padding included."""
        each = -(-whole.vocab_size // self.size)
        return -(-each // _VOCAB_ROWS) * _VOCAB_ROWS

    def parts(self, whole: ModelConfig) -> dict[str, Part]:
        """The parts of tensors, by their names. Other tensors (norms, biases after a sum) are held by every rank."""
        part = self.config(whole)
        query = part.num_heads * whole.head_dim
        key_value = part.num_kv_heads * whole.head_dim
        first_kv_head = self.rank * whole.num_kv_heads // self.size
        query_rows = self._range(0, query)
        kv_rows = Part(0, first_kv_head * whole.head_dim, first_kv_head * whole.head_dim + key_value)
        rows = {
            "self_attn.q_proj": query_rows,
            "self_attn.k_proj": kv_rows,
            "self_attn.v_proj": kv_rows,
        }
        columns = {"self_attn.o_proj": self._range(1, query)}
        blocks = {"mlp.": part.intermediate_size}
        if part.experts is not None:
            blocks |= {f"mlp.experts.{index}.": part.experts.size for index in range(part.experts.count)}
            blocks |= {"mlp.shared_expert.": part.experts.shared_size}
        for prefix, inner in blocks.items():
            rows |= {prefix + name: self._range(0, inner) for name in ("gate_proj", "up_proj")}
            columns |= {prefix + "down_proj": self._range(1, inner)}
        vocab = self._vocab_part(whole)
        parts = {"model.embed_tokens.weight": vocab, "lm_head.weight": vocab}
        for layer in range(whole.num_layers):
            prefix = f"model.layers.{layer}."
            for name, where in rows.items():
                parts[f"{prefix}{name}.weight"] = parts[f"{prefix}{name}.bias"] = where
            for name, where in columns.items():
                parts[f"{prefix}{name}.weight"] = where
        return parts

    def _range(self, axis: int, count: int) -> Part:
        return Part(axis, self.rank * count, (self.rank + 1) * count)

    def _vocab_part(self, whole: ModelConfig) -> Part:
        each, size = self.vocab_rows(whole), whole.vocab_size
        start, stop = min(self.rank * each, size), min((self.rank + 1) * each, size)
        return Part(0, start, stop, padding=each - (stop - start))


def fits(config: ModelConfig, size: int) -> bool:
    """Return True if a model can be divided among `size` ranks."""
    heads, kv_heads = config.num_heads, config.num_kv_heads
    kv_fits = kv_heads % size == 0 or size % kv_heads == 0
    experts = config.experts
    inner = [config.intermediate_size, *([] if experts is None else [experts.size, experts.shared_size])]
    return heads % size == 0 and kv_fits and all(one % size == 0 for one in inner)


def check_size(config: ModelConfig, size: int) -> None:
    """Raise ConfigError with the numbers of ranks that work unless the model can be divided among `size` ranks."""
    if config.qk_norm == "all" and size > 1:
        raise ConfigError(
            f"tp is {size}, but {config.architecture} normalises queries and keys over all heads, which no rank has; "
            "leave out --tp"
        )
    if not fits(config, size):
        works = [str(n) for n in range(1, config.num_heads + 1) if fits(config, n)]
        raise ConfigError(
            f"tp is {size}, but the model has {config.num_heads} heads, {config.num_kv_heads} KV heads and "
            f"{config.intermediate_size:,} inner features, which cannot be divided among {size} ranks; "
            f"--tp may be {' or '.join(filter(None, (', '.join(works[:-1]), works[-1])))}"
        )
