"""A decoder divided among ranks computes what the whole decoder computes. The ranks are threads here, for speed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from ramet.runtime.models.build import build_decoder
from ramet.runtime.models.decoder import Decoder
from ramet.runtime.models.load import open_weights
from ramet.runtime.parallel.group import Group
from ramet.runtime.parallel.sharded import apply_tensor_parallel
from ramet.runtime.parallel.share import Share
from ramet.runtime.testing.bare_cache import BareCache

TOLERANCE = 1e-4
TINY: dict[str, Any] = {
    "vocab_size": 261,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}
LAYERS = ["sliding_attention", "full_attention"]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "mistral": ("MistralConfig", {"sliding_window": 7, "num_key_value_heads": 1}),
    "qwen2": ("Qwen2Config", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": False}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "layer_types": LAYERS,
            "sliding_window": 7,
            "query_pre_attn_scalar": 24,
            "num_key_value_heads": 1,
            "final_logit_softcapping": 3.0,
        },
    ),
}


class Room:
    """Where ranks that are threads lay down a tensor each and read those of all."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._tensors: list[Tensor] = [torch.empty(0)] * size
        self._barrier = threading.Barrier(size, timeout=60)

    def all_of(self, rank: int, x: Tensor) -> list[Tensor]:
        self._tensors[rank] = x.clone()
        self._barrier.wait()
        found = list(self._tensors)
        self._barrier.wait()
        return found


class ThreadGroup(Group):
    """The group of one thread."""

    def __init__(self, rank: int, room: Room) -> None:
        self.rank, self.size, self._room = rank, room.size, room

    def sum(self, x: Tensor) -> Tensor:
        return x.copy_(torch.stack(self._room.all_of(self.rank, x)).sum(0))

    def gather(self, x: Tensor, num_columns: int) -> Tensor:
        return torch.cat(self._room.all_of(self.rank, x), dim=1)[:, :num_columns]


def write_model(name: str, folder: Path) -> None:
    class_name, fields = MODELS[name]
    torch.manual_seed(list(MODELS).index(name))
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, class_name)(**(TINY | fields)), dtype=torch.float32
    )
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(("norm.weight", "bias")):  # ones and zeros would hide a missing one
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)


@pytest.fixture(scope="module", params=list(MODELS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    write_model(request.param, path)
    return path


def logits_of(decoder: Decoder) -> Tensor:
    """Prompts in chunks, decode rows, and both in one step."""
    tokens = torch.randint(0, 261, (30,), generator=torch.Generator().manual_seed(1)).tolist()
    cache = BareCache(decoder, 3, 64, page_size=8)
    steps = [
        cache.step([], [(0, tokens[:9]), (1, tokens[:17])]),
        cache.step([(0, tokens[9])], [(1, tokens[17:20]), (2, tokens[3:8])]),
        cache.step([(0, 260), (1, 0), (2, tokens[8])], []),
    ]
    return torch.cat(steps)


def on_ranks(size: int, work: Callable[[int, Room], Tensor]) -> list[Tensor]:
    """Run `work(rank, room)` in one thread for each rank."""
    room, results, errors = Room(size), {}, []

    def run(rank: int) -> None:
        try:
            with torch.inference_mode():
                results[rank] = work(rank, room)
        except Exception as error:  # raised below, in the test's thread
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(size)]


@pytest.mark.parametrize("options", [{"dtype": torch.float32}, {"quantization": "int8"}], ids=["fp32", "int8"])
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_together_compute_the_logits_of_the_whole_model(folder: Path, size: int, options: dict[str, Any]) -> None:
    whole, weights = open_weights(folder)

    def work(rank: int, room: Room) -> Tensor:
        share = Share(rank, room.size)
        part = build_decoder(share.config(whole), weights.cut(share.parts(whole)), device="cpu", **options)
        decoder = apply_tensor_parallel(part, ThreadGroup(rank, room), whole.vocab_size)
        assert decoder.config.num_heads * size == whole.num_heads
        return logits_of(decoder)

    expected = logits_of(build_decoder(whole, weights, device="cpu", **options))
    assert float(expected.std()) > 0.1, "the logits are too flat to show a mistake"
    # Rounded activations differ where a sum of parts differs in its last bits.
    tolerance = TOLERANCE if "dtype" in options else 0.05 * float(expected.abs().max())
    for found in on_ranks(size, work):
        assert found.shape == expected.shape
        assert float((found - expected).abs().max()) < tolerance
