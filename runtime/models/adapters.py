"""Adapters (LoRA): read from PEFT folders, kept in tables, and applied to the tokens of requests that chose them.

`Adapters` makes a second decoder on the same weights, whose products add those of each token's adapter; the plain one
serves steps without adapters. Not here: adapters of embeddings, output layers and experts, DoRA, biases, which are
refused.
Source of the file format: PEFT's `LoraConfig` and its `save_pretrained`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import secrets
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ramet.errors import BrokenModelFile, ConfigError, InvalidRequest
from ramet.kernels.layers.adapters import AdapterTable
from ramet.kernels.slots.tables import upload
from ramet.runtime.models.config import ModelConfig
from ramet.runtime.models.decoder import Decoder
from ramet.runtime.models.families import family_named
from ramet.runtime.models.json_file import read_json
from ramet.runtime.models.layers import DecoderLayer, FeedForward
from ramet.runtime.models.linear import Linear, LinearMethod
from ramet.runtime.models.linear_gpu import FoldedLayer
from ramet.runtime.models.weights import expected_tensors
from ramet.runtime.types import Adapter, Sequence

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_TENSOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.(?:default\.)?weight")
_UNSUPPORTED = ("use_dora", "fan_in_fan_out", "modules_to_save", "lora_bias", "trainable_token_indices", "use_qalora")
_PLAIN = re.compile(r"[\w.]+")
_MAX_NAME = 200  # characters
_MAX_TOKENS = 1 << 22  # of a step

# An adapter's matrices (A [r, K], B [N, r], scaled) by the matrix of the model that they change.
Matrices = Mapping[str, tuple[Tensor, Tensor]]


class Adapters:
    """The adapters of one engine, which may change while it runs. The engine's thread owns it; `find` is thread-safe.

    decoder: the adapted decoder; `choose` says for which tokens, before each of its steps. An adapter that was removed
    keeps its place in the tables until the last sequence that uses it has ended.
    """

    def __init__(self, decoder: Decoder, max_adapters: int, max_rank: int) -> None:
        """Make room for adapters, in the decoder's memory. Raises ConfigError for layers that take none."""
        self.max_adapters, self.max_rank = max_adapters, max_rank
        self.config = decoder.config
        # On a CPU at one address, because recorded steps read it; pages that no step fills take no memory.
        self._chosen = torch.from_numpy(np.zeros(_MAX_TOKENS, dtype=np.int32))
        self._num_chosen = 0
        self._add = decoder.ops.add_adapters
        self._device = decoder.device
        self._dtype = decoder.dtype
        self._loaded: dict[str, Adapter] = {}
        self._users: dict[int, set[Sequence]] = {index: set() for index in range(1, max_adapters + 1)}
        self._free = list(range(max_adapters, 0, -1))
        self._places: dict[str, tuple[AdapterTable, int]] = {}
        self._shapes = expected_tensors(decoder.config)
        self.decoder = dataclasses.replace(decoder, layers=[self._adapted_layer(layer) for layer in decoder.layers])

    # -- requests

    @property
    def names(self) -> list[str]:
        """Names of the adapters that requests may choose."""
        return list(self._loaded)

    def find(self, name: str) -> Adapter:
        """Return the adapter of this name. Raises InvalidRequest."""
        adapter = self._loaded.get(name)
        if adapter is None:
            known = ", ".join(self._loaded) or "none"
            raise InvalidRequest(f"no adapter {name[:_MAX_NAME]!r} is loaded; loaded are: {known}", param="adapter")
        return adapter

    def check(self, adapter: Adapter) -> None:
        """Raise InvalidRequest if the adapter of a new request was removed meanwhile."""
        if self._loaded.get(adapter.name) is not adapter:
            raise InvalidRequest(f"the adapter {adapter.name!r} was unloaded; load it again", param="adapter")

    def acquire(self, sequence: Sequence) -> None:
        """Keep a sequence's adapter until `release`."""
        adapter = sequence.request.adapter
        if adapter is not None:
            self._users[adapter.index].add(sequence)

    def release(self, sequence: Sequence) -> None:
        """Undo `acquire`. Calling it again does nothing."""
        adapter = sequence.request.adapter
        if adapter is not None and sequence in self._users[adapter.index]:
            self._users[adapter.index].remove(sequence)
            self._free_unused(adapter)

    @property
    def is_used(self) -> bool:
        """Whether a live sequence has an adapter."""
        return any(self._users.values())

    def choose(self, chosen: NDArray[np.int32]) -> None:
        """Set the adapters of the next step's tokens: int32 [T], 0 for none."""
        if self._device.type != "cpu":
            (self._chosen,) = upload([chosen], self._device)
            return
        assert len(chosen) <= _MAX_TOKENS, len(chosen)
        self._chosen[: self._num_chosen] = 0  # a recorded step may be larger than this one
        self._chosen[: len(chosen)] = torch.from_numpy(chosen)
        self._num_chosen = len(chosen)

    # -- loading

    def check_name(self, name: str) -> None:
        """Raise InvalidRequest for a name that a new adapter cannot have, or if there is no room for one."""
        if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME or not name.isprintable():
            raise InvalidRequest(
                f"an adapter's name is {str(name)[:_MAX_NAME]!r} but must be printable text of 1 to {_MAX_NAME} "
                "characters",
                param="lora_name",
            )
        if name in self._loaded:
            raise InvalidRequest(
                f"an adapter {name!r} is loaded; unload it first, or choose another name", param="lora_name"
            )
        if not self._free:
            raise InvalidRequest(
                f"{self.max_adapters} adapters are loaded or still in use, and --max-loras is {self.max_adapters}; "
                "unload one, or raise --max-loras",
                param="lora_name",
            )

    def read(self, path: Path) -> Matrices:
        """Read a PEFT folder and check it against the model. Changes nothing; from any thread.

        Raises: BrokenModelFile, ConfigError for what PEFT can do and Ramet cannot.
        """
        shapes = {name: self._shapes[name] for name in self._places}
        return self.sendable(read_adapter(path, self.config, shapes, self.max_rank))

    def sendable(self, matrices: Matrices) -> Matrices:
        """Return matrices that `add` copies to a GPU without waiting for its steps."""
        return {name: (self._sendable(a), self._sendable(b)) for name, (a, b) in matrices.items()}

    def _sendable(self, half: Tensor) -> Tensor:
        half = half.to(self._dtype)
        return half.pin_memory() if self._device.type == "cuda" else half

    def add(self, name: str, matrices: Matrices) -> Adapter:
        """Let requests choose an adapter. Raises as `check_name`."""
        self.check_name(name)
        index = self._free.pop()
        for matrix, (a, b) in matrices.items():
            table, part = self._places[matrix]
            first, stop, rank = table.bounds[part], table.bounds[part + 1], a.shape[0]
            table.a[index, part, :rank] = a.to(self._device, self._dtype, non_blocking=True)
            table.b[index, first:stop, :rank] = b.to(self._device, self._dtype, non_blocking=True)
            table.ranks[index, part] = rank
        # Prefixes of another model, or of an adapter that had this name before, have other keys and values.
        adapter = Adapter(name, index, f"\0{secrets.token_hex(16)}\0")
        self._loaded[name] = adapter
        return adapter

    def remove(self, name: str) -> None:
        """Let no new request choose an adapter; live ones keep it. Raises InvalidRequest if there is none."""
        adapter = self.find(name)
        del self._loaded[name]
        self._free_unused(adapter)

    def _free_unused(self, adapter: Adapter) -> None:
        if self._users[adapter.index] or self._loaded.get(adapter.name) is adapter:
            return
        for table in {id(table): table for table, _ in self._places.values()}.values():
            table.a[adapter.index] = 0
            table.b[adapter.index] = 0
            table.ranks[adapter.index] = 0
        self._free.append(adapter.index)

    # -- the adapted decoder

    def _adapted_layer(self, layer: object) -> DecoderLayer:
        if isinstance(layer, FoldedLayer):
            layer = layer.plain
        if not isinstance(layer, DecoderLayer):
            raise ConfigError(
                "adapters need Ramet's own layers, but transformers computes those of this model; leave out --lora "
                "and --max-loras"
            )
        attention, feed_forward = layer.attention, layer.feed_forward
        attention = dataclasses.replace(attention, qkv=self._adapted(attention.qkv), o=self._adapted(attention.o))
        if isinstance(feed_forward, FeedForward):
            feed_forward = dataclasses.replace(
                feed_forward, gate_up=self._adapted(feed_forward.gate_up), down=self._adapted(feed_forward.down)
            )
        return dataclasses.replace(layer, attention=attention, feed_forward=feed_forward)

    def _adapted(self, linear: Linear) -> Linear:
        rows = [self._shapes[name][0] for name in linear.names]
        bounds = (0, *itertools.accumulate(rows))
        count, parts = self.max_adapters + 1, len(rows)
        a = self._zeros(count, parts, self.max_rank, linear.in_features)
        b = self._zeros(count, linear.out_features, self.max_rank)
        table = AdapterTable(a, b, bounds, torch.zeros((count, parts), dtype=torch.int32))
        self._places.update({name: (table, part) for part, name in enumerate(linear.names)})
        return dataclasses.replace(linear, method=partial(self._product, linear.method, table))

    def _product(self, method: LinearMethod, table: AdapterTable, x: Tensor, bias: Tensor | None) -> Tensor:
        """A product, and the products of the adapters that the step's tokens chose."""
        return self._add(method(x, bias), x, table, self._chosen[: x.shape[0]])

    def _zeros(self, *shape: int) -> Tensor:
        """Zeros on the device. On a CPU, pages that no adapter fills take no memory."""
        if self._device.type == "cpu":
            return torch.from_numpy(np.zeros(shape, dtype=np.float32)).to(self._dtype)
        return torch.zeros(shape, device=self._device, dtype=self._dtype)


def read_adapter(path: Path, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], max_rank: int) -> Matrices:
    """Read a PEFT folder. shapes: those of the model's matrices that adapters may change.

    Raises: BrokenModelFile for files that are damaged or belong to another model, ConfigError for what Ramet cannot do.
    """
    if not path.is_dir():
        raise BrokenModelFile(f"{path} is no folder; an adapter is a PEFT folder with {_CONFIG} and {_WEIGHTS}")
    settings = read_json(path / _CONFIG)
    _refuse_unsupported(path / _CONFIG, settings)
    file = path / _WEIGHTS
    if not file.is_file():
        hint = (
            "; pickled weights can run code and are not read: save them as safetensors"
            if any(path.glob("*.bin"))
            else ""
        )
        raise BrokenModelFile(f"{path} lacks {_WEIGHTS}{hint}")
    halves: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(file, framework="pt") as opened:
            for stored in opened.keys():  # noqa: SIM118 - no mapping
                module, half = _module_of(file, stored)
                for name, rows in _own_matrices(module, config, shapes):
                    if name not in shapes:
                        raise BrokenModelFile(
                            f"{file}: {stored} changes {name.removesuffix('.weight')}, which is no matrix of this "
                            "model that an adapter can change; is it an adapter of another model?"
                        )
                    tensor = opened.get_tensor(stored)
                    halves.setdefault(name, {})[half] = tensor if half == "A" else tensor[rows]
    except (SafetensorError, OSError) as error:
        raise BrokenModelFile(f"{file} cannot be read, it may be cut off: {error}") from error
    if not halves:
        raise BrokenModelFile(f"{file} has no tensors of an adapter")
    return {name: _checked(file, name, pair, shapes[name], settings, max_rank) for name, pair in halves.items()}


def _module_of(file: Path, stored: str) -> tuple[str, str]:
    found = _TENSOR.fullmatch(stored)
    if found is None:
        raise ConfigError(f"{file}: {stored[:200]!r} is no A or B of a linear layer; other adapters are not read")
    return found[1], found[2]


def _own_matrices(
    module: str, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, slice]]:
    """Our matrices that a module of the checkpoint holds, and their rows in it."""
    for fused, parts in family_named(config.architecture).fused.items():
        names = [module.removesuffix(fused) + part + ".weight" for part in parts]
        if module.endswith(f".{fused}") and all(name in shapes for name in names):
            starts = [0, *itertools.accumulate(shapes[name][0] for name in names[:-1])]
            yield from zip(names, map(slice, starts, [*starts[1:], None]), strict=True)
            return
    yield f"{module}.weight", slice(None)


def _checked(
    file: Path,
    name: str,
    pair: Mapping[str, Tensor],
    shape: tuple[int, ...],
    settings: Mapping[str, Any],  # Any: JSON
    max_rank: int,
) -> tuple[Tensor, Tensor]:
    """An adapter's A and scaled B of one matrix, in fp32, checked."""
    module = name.removesuffix(".weight")
    if len(pair) != 2:
        raise BrokenModelFile(f"{file}: {module} has a lora_{min(pair)} but no lora_{'B' if 'A' in pair else 'A'}")
    a, b = pair["A"], pair["B"]
    is_right = a.ndim == b.ndim == 2 and a.shape[1] == shape[1] and b.shape == (shape[0], a.shape[0])
    if not is_right or not a.shape[0] or not (a.is_floating_point() and b.is_floating_point()):
        raise BrokenModelFile(
            f"{file}: {module} has A {list(a.shape)} and B {list(b.shape)}, but the model's matrix is {list(shape)}, "
            f"for which they must be [rank, {shape[1]}] and [{shape[0]}, rank]; is it an adapter of another model?"
        )
    rank = a.shape[0]
    if rank > max_rank:
        raise ConfigError(f"{file}: {module} has rank {rank}, but --max-lora-rank is {max_rank}; raise it")
    if not (bool(torch.isfinite(a).all()) and bool(torch.isfinite(b).all())):
        raise BrokenModelFile(f"{file}: {module} has numbers that are not finite")
    if not settings.get("rank_pattern") and rank != settings["r"]:
        raise BrokenModelFile(f"{file}: {module} has rank {rank}, but {_CONFIG} says {settings['r']!r}")
    alpha = _alpha(file.parent / _CONFIG, settings, module)
    return a.float(), b.float() * (alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank))


def _alpha(file: Path, settings: Mapping[str, Any], module: str) -> float:  # Any: JSON
    """lora_alpha of a module: that of the pattern that its name ends with, if there is one."""
    alpha, patterns = settings.get("lora_alpha", 8), settings.get("alpha_pattern") or {}
    for pattern, value in patterns.items() if isinstance(patterns, Mapping) else ():
        plain = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if not _PLAIN.fullmatch(plain):
            raise ConfigError(f"{file}: alpha_pattern has {pattern[:_MAX_NAME]!r}, but only names of modules are read")
        if f".{module}".endswith(f".{plain}"):
            alpha = value
            break
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise BrokenModelFile(f"{file}: the lora_alpha of {module} is {str(alpha)[:80]} but must be a number")
    return float(alpha)


def _refuse_unsupported(file: Path, settings: Mapping[str, Any]) -> None:  # Any: JSON
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise ConfigError(f"{file}: peft_type is {kind!r} but must be 'LORA'")
    rank = settings.get("r")
    if type(rank) is not int or rank < 1:
        raise BrokenModelFile(f"{file}: r is {rank!r} but must be an integer from 1")
    if settings.get("bias", "none") != "none":
        raise ConfigError(f"{file}: bias is {settings['bias']!r}; only adapters without biases are read")
    for field in (
        "use_dora",
        "fan_in_fan_out",
        "modules_to_save",
        "lora_bias",
        "trainable_token_indices",
        "use_qalora",
    ):
        if settings.get(field):
            raise ConfigError(f"{file}: {field} is {settings[field]!r}, which Ramet cannot apply; leave it out")
