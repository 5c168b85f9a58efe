"""Where there is no GPU, Triton kernels run in Triton's interpreter; it is chosen before any kernel is defined."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from ramet.runtime.models.load import LoadedModel

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The SmolLM2-135M-Instruct file; fetched on first use. Tests that take it are marked `model`."""
    from ramet.runtime.models.catalog import resolve_model

    return resolve_model("smollm2-135m")


@pytest.fixture(scope="session")
def tiny_model() -> LoadedModel:
    """Two layers of random weights over bytes, context 512: a real engine in milliseconds."""
    from ramet.runtime.byte_tokenizer import ByteTokenizer
    from ramet.runtime.models.config import ModelConfig
    from ramet.runtime.models.dummy import dummy_decoder
    from ramet.runtime.models.generation import GenerationDefaults
    from ramet.runtime.models.load import LoadedModel

    tokenizer = ByteTokenizer()
    config = ModelConfig.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": tokenizer.vocab_size,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
        }
    )
    decoder = dummy_decoder(config, "cpu", torch.float32, seed=3)
    return LoadedModel("tiny", decoder, tokenizer, config, GenerationDefaults())
