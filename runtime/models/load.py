"""`load_model`: from a model's name to the decoder, the tokenizer and the configuration that the engine needs."""

from __future__ import annotations

import logging
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.filesize import decimal

from ramet.errors import ConfigError, UnsupportedArchitecture
from ramet.runtime.models.build import build_decoder
from ramet.runtime.models.catalog import resolve_model
from ramet.runtime.models.config import ModelConfig
from ramet.runtime.models.decoder import Decoder
from ramet.runtime.models.description import (
    GenerationDefaults,
    ModelDescription,
    describe_folder,
    describe_gguf,
    load_gguf_config,
    load_hf_config,
)
from ramet.runtime.models.gguf_file import GgufFile
from ramet.runtime.models.json_file import read_json
from ramet.runtime.models.loader_gguf import load_gguf
from ramet.runtime.models.loader_safetensors import load_safetensors
from ramet.runtime.models.transformers_model import import_transformers, load_transformers, transformers_decoder
from ramet.runtime.models.weights import Weights, expected_tensors
from ramet.runtime.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

ModelImpl = Literal["auto", "ramet", "transformers"]
_TELL_S = 2.0  # between two reports of progress
_READERS, _CHUNK_BYTES = 4, 8 << 20
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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


def open_model(path: Path) -> tuple[ModelDescription, Weights]:
    """Open a GGUF file or a Hugging Face folder. Raises: BrokenModelFile, UnsupportedArchitecture."""
    if path.is_dir():
        described = describe_folder(path, load_hf_config(path))
        return described, load_safetensors(path, described.config)
    file = GgufFile(path)
    described = describe_gguf(file)
    return described, load_gguf(file, described.config)


def load_model(
    name_or_path: str | os.PathLike[str] | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = "auto",
    quantization: str | None = None,
    model_impl: ModelImpl = "auto",
    on_stage: Callable[[str], None] | None = None,
) -> LoadedModel:
    """Find (or download) a model, read it and put it on a device.

    `dtype` and `quantization`: as in `build_decoder`. model_impl: who computes the layers; "auto" is Ramet where it has
    the model's family, else transformers. on_stage: is told every two seconds how much is read. Raises: ModelNotFound,
    DownloadFailed, BrokenModelFile, UnsupportedArchitecture, ConfigError.
    """
    start_s = time.monotonic()
    name = os.fspath(name_or_path) if name_or_path is not None else None
    path = resolve_model(name)
    if is_for_transformers(path, model_impl, device):
        return _load_by_transformers(name or path.stem, path, torch.device(device), parse_dtype(dtype), quantization)
    described, weights = open_model(path)
    config, chosen = described.config, parse_dtype(dtype)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    with read_ahead(files):
        weights = weights.watched(_progress(config, files, on_stage or logger.info))
        decoder = build_decoder(config, weights, device=device, dtype=chosen, quantization=quantization)
    seconds = time.monotonic() - start_s
    rate = decimal(int(sum(file.stat().st_size for file in files) / max(seconds, 1e-3)))
    logger.info("loaded %s from %s in %.1f s, %s/s", config.architecture, path, seconds, rate)
    return LoadedModel(name or path.stem, decoder, described.tokenizer, config, described.generation)


def _progress(config: ModelConfig, files: Sequence[Path], tell: Callable[[str], None]) -> Callable[[str], None]:
    """Return what is to be called with the name of each tensor that is read."""
    left = {name: math.prod(shape) for name, shape in expected_tensors(config).items()}
    num_bytes, num_values = sum(file.stat().st_size for file in files), sum(left.values())
    start_s = told_s = time.monotonic()
    done = 0

    def on_read(name: str) -> None:
        nonlocal done, told_s
        done += left.pop(name, 0)
        now_s = time.monotonic()
        if now_s - told_s >= _TELL_S:
            told_s, read = now_s, num_bytes * done // num_values
            rate = decimal(int(read / max(now_s - start_s, 1e-3)))
            tell(f"reading weights: {decimal(read)} of {decimal(num_bytes)}, {rate}/s")

    return on_read


@contextmanager
def read_ahead(files: Sequence[Path]) -> Iterator[None]:
    """Meanwhile, let threads read files into the system's cache, from which the tensors are then taken one by one.

    Nothing is read ahead of files that would fill more than half of the machine's memory.
    """
    if sum(file.stat().st_size for file in files) > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2:
        yield
        return
    chunks = iter([(file, start) for file in files for start in range(0, file.stat().st_size, _CHUNK_BYTES)])
    is_over = threading.Event()

    def read() -> None:
        buffer = bytearray(_CHUNK_BYTES)
        for path, start in chunks:
            if is_over.is_set():
                return
            try:
                with path.open("rb", buffering=0) as file:
                    file.seek(start)
                    file.readinto(buffer)
            except OSError:  # who reads the tensors says so
                return

    threads = [threading.Thread(target=read, daemon=True, name="ramet-read-ahead") for _ in range(_READERS)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        is_over.set()
        for thread in threads:
            thread.join()


def is_for_transformers(path: Path, model_impl: ModelImpl, device: torch.device | str = "cpu") -> bool:
    """Return whether transformers is to compute a model's layers on a device. Raises: ConfigError, BrokenModelFile."""
    if not path.is_dir():
        if model_impl == "transformers":
            raise ConfigError(f"model_impl is 'transformers' but {path} is a GGUF file; give a Hugging Face folder")
        return False
    if model_impl != "auto":
        return model_impl == "transformers"
    is_quantized = bool(read_json(path / "config.json").get("quantization_config"))
    try:
        config = load_hf_config(path)
    except UnsupportedArchitecture:
        return not is_quantized
    return torch.device(device).type == "cuda" and not config.runs_on_gpus and not is_quantized


def _load_by_transformers(
    name: str, path: Path, device: torch.device, dtype: torch.dtype | Literal["auto"], quantization: str | None
) -> LoadedModel:
    _refuse_quantization(quantization)
    described = describe_folder(path)
    default = torch.bfloat16 if device.type == "cuda" else torch.float32
    start_s = time.monotonic()
    decoder = load_transformers(path, device, default if dtype == "auto" else dtype)
    logger.info(
        "transformers loaded %s from %s in %.1f s", decoder.config.architecture, path, time.monotonic() - start_s
    )
    return LoadedModel(name, decoder, described.tokenizer, decoder.config, described.generation)


def model_in_memory(model: Any, tokenizer: Any, quantization: str | None = None) -> LoadedModel:  # Any: of transformers
    """Make a model of transformers in memory ready to run, on its device and in its dtype.

    tokenizer: a tokenizer of transformers or of ours. None: that of the folder that the model was loaded from.
    Raises: ConfigError, UnsupportedArchitecture.
    """
    transformers = import_transformers()
    if not isinstance(model, transformers.PreTrainedModel):
        raise ConfigError(f"model is a {type(model).__name__} but must be a name, a path or a model of transformers")
    _refuse_quantization(quantization)
    decoder = transformers_decoder(model)
    if tokenizer is None:
        folder = Path(model.name_or_path)
        if not (folder / "tokenizer.json").is_file():
            raise ConfigError(f"a {type(model).__name__} in memory has no tokenizer; give Engine its `tokenizer=`")
        described = describe_folder(folder, decoder.config)
    elif isinstance(tokenizer, transformers.PreTrainedTokenizerBase):
        with tempfile.TemporaryDirectory(prefix="ramet-tokenizer-") as temporary:
            tokenizer.save_pretrained(temporary)
            described = describe_folder(Path(temporary), decoder.config)
    else:
        described = ModelDescription(decoder.config, tokenizer, GenerationDefaults())
    return LoadedModel(type(model).__name__, decoder, described.tokenizer, decoder.config, described.generation)


def _refuse_quantization(quantization: str | None) -> None:
    if quantization is not None:
        raise ConfigError(f"quantization is {quantization!r} but models that transformers runs are not quantised")


def parse_dtype(dtype: torch.dtype | str) -> torch.dtype | Literal["auto"]:
    """Return the dtype of this name. `auto` is returned as it is, for `build_decoder`. Raises: ConfigError."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return "auto"
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype is {dtype!r} but must be auto, {', '.join(_DTYPES)}")
    return _DTYPES[dtype]
