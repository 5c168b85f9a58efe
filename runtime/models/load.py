"""`load_model`: from a model's name to the decoder, the tokenizer and the configuration that the engine needs."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from ramet.errors import ConfigError
from ramet.runtime.models.catalog import resolve_model
from ramet.runtime.models.config import ModelConfig
from ramet.runtime.models.description import describe_folder, describe_gguf, load_gguf_config, load_hf_config
from ramet.runtime.models.generation import GenerationDefaults
from ramet.runtime.models.gguf_file import GgufFile
from ramet.runtime.models.loader_gguf import load_gguf
from ramet.runtime.models.loader_safetensors import load_safetensors
from ramet.runtime.models.weights import Weights
from ramet.runtime.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from ramet.runtime.models.decoder import Decoder

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, eq=False)
class ModelFiles:
    """A model's files, opened and checked. Weights are read on access."""

    path: Path
    config: ModelConfig
    tokenizer: Tokenizer
    generation: GenerationDefaults
    weights: Weights


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A model that is ready to run. `name`: the name or path under which it was requested."""

    name: str
    decoder: Decoder
    tokenizer: Tokenizer
    config: ModelConfig
    generation: GenerationDefaults


def open_weights(path: Path) -> tuple[ModelConfig, Weights]:
    """Open a GGUF file or a Hugging Face folder without its tokenizer. Raises the errors of `open_model`."""
    if path.is_dir():
        config = load_hf_config(path)
        return config, load_safetensors(path, config)
    file = GgufFile(path)
    config = load_gguf_config(file)
    return config, load_gguf(file, config)


def open_model(path: Path) -> ModelFiles:
    """Open a GGUF file or a Hugging Face folder. Raises: BrokenModelFile, UnsupportedArchitecture."""
    if path.is_dir():
        described = describe_folder(path)
        weights = load_safetensors(path, described.config)
    else:
        file = GgufFile(path)
        described = describe_gguf(file)
        weights = load_gguf(file, described.config)
    return ModelFiles(path, described.config, described.tokenizer, described.generation, weights)


def load_model(
    name_or_path: str | os.PathLike[str] | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = "auto",
    quantization: str | None = None,
) -> LoadedModel:
    """Find (or download) a model, read it and put it on a device.

    `dtype` and `quantization`: as in `build_decoder`. Raises: ModelNotFound, DownloadFailed, BrokenModelFile,
    UnsupportedArchitecture, ConfigError.
    """
    from ramet.runtime.models.build import build_decoder

    start_s = time.monotonic()
    name = os.fspath(name_or_path) if name_or_path is not None else None
    files = open_model(resolve_model(name))
    decoder = build_decoder(
        files.config, files.weights, device=device, dtype=parse_dtype(dtype), quantization=quantization
    )
    logger.info("loaded %s from %s in %.1f s", files.config.architecture, files.path, time.monotonic() - start_s)
    return LoadedModel(name or files.path.stem, decoder, files.tokenizer, files.config, files.generation)


def parse_dtype(dtype: torch.dtype | str) -> torch.dtype | Literal["auto"]:
    """Return the dtype of this name. `auto` is returned as it is, for `build_decoder`. Raises: ConfigError."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return "auto"
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype is {dtype!r} but must be auto, {', '.join(_DTYPES)}")
    return _DTYPES[dtype]
