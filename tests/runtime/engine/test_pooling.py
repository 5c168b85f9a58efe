"""Vectors of prompts: those of transformers' hidden states, however prompts are cut and whatever runs beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ramet.errors import BrokenModelFile, InvalidRequest
from ramet.runtime.engine.engine import Engine
from ramet.runtime.models.build import build_decoder
from ramet.runtime.models.description import GenerationDefaults
from ramet.runtime.models.load import LoadedModel, open_weights
from ramet.runtime.testing.byte_tokenizer import ByteTokenizer
from ramet.runtime.types import Pooling, SamplingParams

TOKENIZER = ByteTokenizer()
PROMPT = list(b"Once upon a time there was a small engine that made vectors of whole prompts.")
POOLINGS = list(get_args(Pooling))


class Served:
    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        config = transformers.Qwen3Config(
            vocab_size=TOKENIZER.vocab_size, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=512,
            tie_word_embeddings=True, initializer_range=0.2,
        )  # fmt: skip
        model = transformers.Qwen3Model(config).eval()
        model.save_pretrained(folder)
        self.folder = folder
        fields = json.loads((folder / "config.json").read_text()) | {"architectures": ["Qwen3ForCausalLM"]}
        (folder / "config.json").write_text(json.dumps(fields))
        # Files of embedding models are those of the base model alone.
        tensors = load_file(folder / "model.safetensors")
        save_file(
            {name.removeprefix("model."): tensor for name, tensor in tensors.items()}, folder / "model.safetensors"
        )
        with torch.no_grad():
            states = model(torch.tensor([PROMPT])).last_hidden_state[0]
        self.expected = {"last": states[-1], "mean": states.mean(0), "cls": states[0]}
        shapes, weights = open_weights(folder)
        decoder = build_decoder(shapes, weights, device="cpu", dtype=torch.float32)
        loaded = LoadedModel("tiny", decoder, TOKENIZER, shapes, GenerationDefaults(pooling="mean"))
        self.engine = Engine(loaded, num_kv_tokens=2048, chunked_prefill_size=16, max_running_requests=8)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    made = Served(tmp_path_factory.mktemp("model"))
    with made.engine:
        yield made
        made.engine.check_integrity()


def test_vectors_are_those_of_transformers_in_chunks_cached_and_beside_others(served: Served) -> None:
    engine = served.engine
    for _ in range(2):
        beside: Any = engine.submit(PROMPT[:20], SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True))
        handles = {name: engine.submit(PROMPT, pooling=name) for name in [*POOLINGS, "model"]}
        assert len(beside.result(timeout_s=60).token_ids) == 20
        for name, handle in handles.items():
            result = handle.result(timeout_s=60)
            assert (result.token_ids, result.usage.prompt_tokens) == ((), len(PROMPT))
            expected = served.expected["mean" if name == "model" else name].numpy()
            assert result.vector is not None
            np.testing.assert_allclose(result.vector, expected, atol=1e-4)
    assert engine.generate(PROMPT, pooling="last").usage.cached_tokens > len(PROMPT) // 2
    assert engine.generate(PROMPT, pooling="mean").usage.cached_tokens == 0  # every state is needed


def test_embed_gives_vectors_of_length_one(served: Served) -> None:
    vector = served.engine.embed(PROMPT, "last")
    expected = served.expected["last"]
    np.testing.assert_allclose(vector, (expected / expected.norm()).numpy(), atol=1e-4)
    assert float(np.linalg.norm(served.engine.embed("text"))) == pytest.approx(1.0, abs=1e-5)


def test_wrong_wishes_are_refused(served: Served) -> None:
    with pytest.raises(InvalidRequest, match="pooling is 'max', but must be model, last, mean, cls, or None"):
        served.engine.generate(PROMPT, pooling="max")
    with pytest.raises(InvalidRequest, match="score_from is 1, but must be None with pooling"):
        served.engine.generate(PROMPT, pooling="last", score_from=1)
    with pytest.raises(InvalidRequest, match="no tokens"):
        served.engine.generate([], pooling="last")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, "last"),
        ({"pooling_mode_mean_tokens": True, "word_embedding_dimension": 8}, "mean"),
        ({"pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode_max_tokens": True}, None),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, None),
    ],
)
def test_the_models_files_say_which_states_are_pooled(
    tmp_path: Path, fields: dict[str, Any], expected: Pooling | None
) -> None:
    assert GenerationDefaults.from_folder(tmp_path).pooling == "last"
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(fields))
    if expected is None:
        with pytest.raises(BrokenModelFile, match="must be one of"):
            GenerationDefaults.from_folder(tmp_path)
    else:
        assert GenerationDefaults.from_folder(tmp_path).pooling == expected
