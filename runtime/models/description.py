"""A model's files without the weights: configuration, tokenizer and generation defaults.

For servers and planners; no torch. Not here: the weights (`load.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ramet.errors import BrokenModelFile, UnsupportedArchitecture
from ramet.runtime.models.config import ModelConfig, token_ids
from ramet.runtime.models.config_files import config_from_gguf, config_from_hf
from ramet.runtime.models.gguf_file import GgufFile
from ramet.runtime.models.json_file import read_json
from ramet.runtime.models.tokenizer_files import tokenizer_from_folder, tokenizer_from_gguf
from ramet.runtime.text.tokenizer import Tokenizer
from ramet.runtime.types import Pooling

# What reading a value of the wrong type, or an impossible one, raises.
_WRONG_VALUES = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError)


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """A model's own sampling defaults, from `generation_config.json`.

    The values that the model's authors recommend; None if the file has no value. Requests override them.

    `eos_ids`: only those of the file; the tokenizer's `eos_ids` include them. `pooling`: of an
    embedding model, as sentence-transformers writes it.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    eos_ids: tuple[int, ...] = ()
    pooling: Pooling = "last"

    @classmethod
    def from_folder(cls, folder: Path) -> GenerationDefaults:
        """Read the folder's file. Without the file there are no defaults. `do_sample: false` means temperature 0.

        Raises: BrokenModelFile.
        """
        path, pooling = folder / "generation_config.json", _pooling(folder / "1_Pooling" / "config.json")
        if not path.is_file():
            return cls(pooling=pooling)
        fields = read_json(path)

        def number(name: str) -> Any:  # int or float, as the file has it
            value = fields.get(name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise BrokenModelFile(f"{path}: {name} is {value!r} but must be a number")
            return value

        try:
            eos_ids = token_ids(fields.get("eos_token_id"))
        except (TypeError, ValueError) as error:
            raise BrokenModelFile(f"{path}: eos_token_id is {fields.get('eos_token_id')!r}") from error
        # Files of base models often leave out do_sample, whose default is false; only an explicit false counts here.
        greedy = fields.get("do_sample") is False
        return cls(
            temperature=0.0 if greedy else number("temperature"),
            top_k=number("top_k"),
            top_p=number("top_p"),
            min_p=number("min_p"),
            repetition_penalty=number("repetition_penalty"),
            eos_ids=eos_ids,
            pooling=pooling,
        )


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


def _pooling(path: Path) -> Pooling:
    """The pooling that a file of sentence-transformers says; the last token without it. Raises BrokenModelFile."""
    if not path.is_file():
        return "last"
    fields = read_json(path)
    known: dict[str, Pooling] = {
        "pooling_mode_lasttoken": "last",
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_cls_token": "cls",
    }
    chosen = [name for name, value in fields.items() if name.startswith("pooling_mode_") and value is True]
    if len(chosen) != 1 or chosen[0] not in known:
        raise BrokenModelFile(f"{path}: the poolings are {chosen} but must be one of {', '.join(known)}")
    return known[chosen[0]]


def _check_token_ids(path: Path, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Check that every token of the tokenizer has an embedding; otherwise a look-up would read past the table."""
    if tokenizer.vocab_size > config.vocab_size:
        raise BrokenModelFile(
            f"{path}: the tokenizer has {tokenizer.vocab_size:,} tokens but the model embeds {config.vocab_size:,}"
        )
    wrong = sorted(token for token in tokenizer.eos_ids if not 0 <= token < config.vocab_size)
    if wrong:
        raise BrokenModelFile(f"{path}: the end tokens {wrong} are outside the vocabulary of {config.vocab_size:,}")
