"""Load the weights of a Hugging Face model folder: safetensors, one file, or shards with an index.

Tensors are memory-mapped and read on access. Nothing in the folder is executed; pickled weights (.bin) are refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ramet.errors import BrokenModelFile, UnsupportedArchitecture
from ramet.runtime.models.config import ModelConfig
from ramet.runtime.models.config_files import scheme_of
from ramet.runtime.models.families import Family, family_named
from ramet.runtime.models.gguf_file import GgufEntry
from ramet.runtime.models.json_file import read_json
from ramet.runtime.models.loader_gguf import as_stored
from ramet.runtime.models.quantized_files import StoredMatrix, stored_matrices
from ramet.runtime.models.weights import Part, Reader, Weights, check_names, check_shapes

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"

# Checkpoint tensors that the decoder does not read.
_IGNORED_SUFFIXES = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias")
# Multimodal Gemma 3: the text model's prefixes (transformers 4 and 5), and those of the image parts.
_TEXT_PREFIXES = (
    ("language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("embed_tokens.", "model.embed_tokens."),  # of a base model alone, as files of embedding models are
    ("layers.", "model.layers."),
    ("norm.", "model.norm."),
)
_IMAGE_PREFIXES = (
    "vision_tower.",
    "multi_modal_projector.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
)


def load_safetensors(folder: Path, config: ModelConfig) -> Weights:
    """Open the folder's weights. Names, shapes and completeness are checked now; bytes are read on access.

    Raises: BrokenModelFile naming the tensors that are missing, unknown or of a wrong shape.
    """
    files = _weight_files(folder)
    family = family_named(config.architecture)
    scheme = scheme_of(read_json(folder / "config.json"))
    if scheme is not None and family.fused:
        raise UnsupportedArchitecture(f"{folder}: quantised {family.name} checkpoints are not supported; use 16 bits")
    stored: dict[str, tuple[Path, str, tuple[int, ...], str]] = {}
    for path, wanted in files.items():
        try:
            with safe_open(path, framework="pt") as file:
                for name in wanted if wanted is not None else list(file.keys()):
                    mapped = _text_model_name(name, family)
                    if mapped is not None:
                        part = file.get_slice(name)
                        stored[mapped] = path, name, tuple(part.get_shape()), part.get_dtype()
        except (SafetensorError, OSError) as error:
            raise BrokenModelFile(f"{path} cannot be read: {error}") from error
    num_drafting = read_json(folder / "config.json").get("num_nextn_predict_layers") or 0  # see `speculation/heads.py`
    for name in [
        name for name in stored if _layer_of(name) in range(config.num_layers, config.num_layers + num_drafting)
    ]:
        del stored[name]
    if config.tie_word_embeddings:  # some checkpoints store the shared matrix twice
        stored.pop("lm_head.weight", None)
    matrices: dict[str, StoredMatrix] = {}
    if scheme is not None:
        readable = {
            mapped: (partial(_read, path, name, None, None), shape, dtype)
            for mapped, (path, name, shape, dtype) in stored.items()
        }
        matrices, taken = stored_matrices(scheme, readable, folder)
        stored = {name: where for name, where in stored.items() if name not in taken}
    readers: dict[str, Reader] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for mapped, (path, name, shape, _) in stored.items():
        for own_name, rows in _own_tensors(mapped, shape, family, config):
            shapes[own_name] = shape if rows is None else (rows[1] - rows[0], *shape[1:])
            readers[own_name] = partial(_read, path, name, rows)
    for name, matrix in matrices.items():
        shapes[name] = matrix.shape
        readers[name] = partial(_dense, matrix)
    check_names(config, readers, folder)
    check_shapes(config, shapes, folder)
    is_fp8 = scheme is not None and scheme.kind == "fp8"
    return Weights(
        readers,
        {} if is_fp8 else {name: partial(_blocks, matrix) for name, matrix in matrices.items()},
        scaled={name: matrix.scaled for name, matrix in matrices.items()} if is_fp8 else {},
    )


def _dense(matrix: StoredMatrix, part: Part | None) -> Tensor:
    return matrix.dense() if part is None else part.of(matrix.dense())


def _blocks(matrix: StoredMatrix, part: Part | None) -> GgufEntry | None:
    blocks = matrix.blocks()
    return None if blocks is None else as_stored(blocks, 0, part)


def _read(path: Path, name: str, rows: tuple[int, int] | None, part: Part | None) -> Tensor:
    """Read a tensor, or a range of its rows, or a part of that."""
    with safe_open(path, framework="pt") as file:
        if rows is not None:
            stored, (first, last) = file.get_slice(name), rows
            if part is None:
                return Part(0, first, last).of(stored)
            if part.axis == 0:
                return Part(0, first + part.start, first + part.stop).of(stored)
            return part.of(Part(0, first, last).of(stored))
        if part is not None:
            return part.of(file.get_slice(name))
        tensor: Tensor = file.get_tensor(name)
        return tensor


def _own_tensors(
    name: str, shape: tuple[int, ...], family: Family, config: ModelConfig
) -> list[tuple[str, tuple[int, int] | None]]:
    """Our tensors that a stored one holds, and their rows in it; None: all of them."""
    for fused, parts in family.fused.items():
        if f".{fused}." not in name:
            continue
        names = [name.replace(fused, part) for part in parts]
        query, key_value = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        sizes = [query, key_value, key_value] if len(parts) == 3 else [config.intermediate_size] * 2
        stops = list(itertools.accumulate(sizes))
        if shape[0] == stops[-1]:  # else the check of names and shapes reports it
            return list(zip(names, itertools.pairwise([0, *stops]), strict=True))
    return [(name, None)]


def _layer_of(name: str) -> int | None:
    """The number of the layer to which a tensor belongs; None: to none."""
    prefix, _, rest = name.partition("model.layers.")
    number = rest.partition(".")[0]
    return int(number) if not prefix and number.isdecimal() else None


def _weight_files(folder: Path) -> dict[Path, Iterable[str] | None]:
    """The weight files, and the tensors that the index lists for each (None: there is no index)."""
    index = folder / _INDEX
    if not index.is_file():
        if (folder / _SINGLE).is_file():
            return {folder / _SINGLE: None}
        hint = ""
        if any(folder.glob("*.bin")) or any(folder.glob("*.pth")):
            hint = "; pickled weights can run code and are not read: convert them to safetensors"
        raise BrokenModelFile(f"{folder} holds neither {_SINGLE} nor {_INDEX}{hint}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise BrokenModelFile(f"{index} lacks a weight_map")
    files: dict[Path, list[str]] = {}
    for name, file_name in weight_map.items():
        # A shard lies in the folder itself: an index must not reach for other files of the machine.
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise BrokenModelFile(f"{index}: the shard of {name} is {file_name!r}, which is no plain file name")
        files.setdefault(folder / file_name, []).append(name)
    missing = sorted(path.name for path in files if not path.is_file())
    if missing:
        raise BrokenModelFile(f"{folder} lacks {len(missing)} of {len(files)} shards: {', '.join(missing[:5])}")
    return dict(files)


def _text_model_name(name: str, family: Family) -> str | None:
    """Ramet's name for a stored tensor; None if the text model does not read it."""
    if name.startswith(_IMAGE_PREFIXES) or name.endswith(_IGNORED_SUFFIXES):
        return None
    for prefix, replacement in _TEXT_PREFIXES:
        if name.startswith(prefix):
            name = replacement + name.removeprefix(prefix)
            break
    for theirs, ours in family.renames.items():
        name = name.replace(theirs, ours)
    return name
