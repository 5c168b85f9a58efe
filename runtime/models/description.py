"""A model's files without the weights: configuration, tokenizer and generation defaults.

For servers and planners; no torch. Not here: the weights (`load.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ramet.errors import BrokenModelFile, UnsupportedArchitecture
from ramet.runtime.models.config import ModelConfig
from ramet.runtime.models.config_files import config_from_gguf, config_from_hf
from ramet.runtime.models.generation import GenerationDefaults
from ramet.runtime.models.gguf_file import GgufFile
from ramet.runtime.models.json_file import read_json
from ramet.runtime.models.tokenizer_files import tokenizer_from_folder, tokenizer_from_gguf
from ramet.runtime.text.tokenizer import Tokenizer

# What reading a value of the wrong type, or an impossible one, raises.
_WRONG_VALUES = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError)


@dataclass(frozen=True, slots=True, eq=False)
class ModelDescription:
    """A model without its weights."""

    config: ModelConfig
    tokenizer: Tokenizer
    generation: GenerationDefaults


def describe_model(path: Path) -> ModelDescription:
    """Read a GGUF file's metadata, or a Hugging Face folder's. Raises: BrokenModelFile, UnsupportedArchitecture."""
    return describe_folder(path) if path.is_dir() else describe_gguf(GgufFile(path))


def describe_folder(path: Path, config: ModelConfig | None = None) -> ModelDescription:
    """`describe_model` for a folder. config: None reads it, by transformers if no family of ours has it."""
    if config is None:
        try:
            config = load_hf_config(path)
        except UnsupportedArchitecture as error:
            config = _described_by_transformers(path, error)
    generation = GenerationDefaults.from_folder(path)
    try:
        tokenizer = tokenizer_from_folder(path, config, eos_ids=generation.eos_ids)
    except _WRONG_VALUES as error:  # includes BrokenModelFile
        raise (
            error if isinstance(error, BrokenModelFile) else BrokenModelFile(f"{path}'s tokenizer: {error!r}")
        ) from error
    _check_token_ids(path, config, tokenizer)
    return ModelDescription(config, tokenizer, generation)


def describe_gguf(file: GgufFile) -> ModelDescription:
    """`describe_model` for an open file."""
    config = load_gguf_config(file)
    try:
        tokenizer = tokenizer_from_gguf(file, config)
    except _WRONG_VALUES as error:  # includes BrokenModelFile
        raise error if isinstance(error, BrokenModelFile) else BrokenModelFile(f"{file.path}: {error!r}") from error
    _check_token_ids(file.path, config, tokenizer)
    return ModelDescription(config, tokenizer, GenerationDefaults())


def load_hf_config(folder: Path) -> ModelConfig:
    """The folder's `config.json`. Raises: BrokenModelFile, UnsupportedArchitecture."""
    path = folder / "config.json"
    fields = read_json(path)
    try:
        return config_from_hf(fields)
    except UnsupportedArchitecture:
        raise
    except _WRONG_VALUES as error:  # includes BrokenModelFile
        raise BrokenModelFile(f"{path}: {error}") from error


def _described_by_transformers(path: Path, ours: UnsupportedArchitecture) -> ModelConfig:
    """The configuration of an architecture that only transformers has. Raises: UnsupportedArchitecture."""
    from ramet.runtime.models.transformers_model import describe_transformers  # brings torch

    if read_json(path / "config.json").get("quantization_config"):
        raise ours
    try:
        return describe_transformers(path)
    except UnsupportedArchitecture as error:
        raise UnsupportedArchitecture(f"{ours}; {error}") from ours


def load_gguf_config(file: GgufFile) -> ModelConfig:
    """The file's configuration. Raises: BrokenModelFile, UnsupportedArchitecture."""
    num_parts = file.metadata.get("split.count", 1)
    if num_parts not in (0, 1):
        raise BrokenModelFile(f"{file.path} is one of {num_parts} parts; join them with llama.cpp's gguf-split --merge")
    try:
        return config_from_gguf(file)
    except UnsupportedArchitecture:
        raise
    except _WRONG_VALUES as error:  # includes BrokenModelFile
        raise BrokenModelFile(f"{file.path}: {error}") from error


def _check_token_ids(path: Path, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Check that every token of the tokenizer has an embedding; otherwise a look-up would read past the table."""
    if tokenizer.vocab_size > config.vocab_size:
        raise BrokenModelFile(
            f"{path}: the tokenizer has {tokenizer.vocab_size:,} tokens but the model embeds {config.vocab_size:,}"
        )
    wrong = sorted(token for token in tokenizer.eos_ids if not 0 <= token < config.vocab_size)
    if wrong:
        raise BrokenModelFile(f"{path}: the end tokens {wrong} are outside the vocabulary of {config.vocab_size:,}")
