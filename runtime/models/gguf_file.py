"""Parse a GGUF file: the metadata and the location of each tensor. Memory-mapped; tensor bytes are not read.

The `gguf` package's reader takes 2.3 s for SmolLM2 and 9.8 s for Gemma 3 270M, because it builds one array view for
each string of the vocabulary. This parser reads the same values directly from the mapping. The `gguf` package still
dequantises. Supports little-endian files of version 2 and 3.
Source: the GGUF specification (ggml/docs/gguf.md).
"""

from __future__ import annotations

import itertools
import mmap
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from ramet.errors import BrokenModelFile

_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
_LENGTH = struct.Struct("<Q")
_SCALARS: dict[int, str] = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_MAX_DIMENSIONS = 4
_MAX_METADATA_BYTES = 256 << 20
_MAX_ITEMS = 1 << 22  # of all arrays: a vocabulary of 262k tokens has 1.3 million tokens, types, scores and merges
_MAX_ALIGNMENT = 1 << 20
_CHUNK_BLOCKS = 16_384  # 2 MiB of float32 for blocks of 32: bounds the intermediate arrays
_PLAIN = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}


@dataclass(frozen=True, slots=True, eq=False)
class GgufEntry:
    """One stored tensor. `shape`: slowest dimension first, as in torch. `stored`: uint8, its bytes in the file."""

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    stored: NDArray[np.uint8]

    def dequantised(self) -> NDArray[np.float32]:
        """float32 of `shape`, freshly allocated. Raises: NotImplementedError for a type that gguf cannot read."""
        plain = _PLAIN.get(self.kind.name)
        if plain is not None:
            return self.stored.view(plain).astype(np.float32, copy=True).reshape(self.shape)
        # The package handles sixteen rows at a time, which is slow for short rows; a long row is one vector operation.
        block_size, type_size = gguf.GGML_QUANT_SIZES[self.kind]
        values = np.empty(self.stored.size // type_size * block_size, dtype=np.float32)
        for start in range(0, self.stored.size, _CHUNK_BLOCKS * type_size):
            chunk = self.stored[start : start + _CHUNK_BLOCKS * type_size]
            first = start // type_size * block_size
            values[first : first + chunk.size // type_size * block_size] = gguf.dequantize(chunk[None], self.kind)[0]
        return values.reshape(self.shape)

    def by_row(self) -> NDArray[np.uint8]:
        """The bytes of a matrix, uint8 [rows, bytes per row]: each row is a run of blocks."""
        block_size, type_size = gguf.GGML_QUANT_SIZES[self.kind]
        return self.stored.reshape(self.shape[0], self.shape[1] // block_size * type_size)

    def rows(self, start: int, stop: int) -> GgufEntry:
        """The rows [start, stop) of the first axis; of a vector, its elements. No bytes are read."""
        stored = self.stored.reshape(self.shape[0], -1)[start:stop].reshape(-1)
        return replace(self, shape=(stop - start, *self.shape[1:]), stored=stored)

    def columns(self, start: int, stop: int) -> GgufEntry | None:
        """The columns [start, stop) of a matrix, copied; None if this range cuts through blocks."""
        block_size, type_size = gguf.GGML_QUANT_SIZES[self.kind]
        if start % block_size or stop % block_size:
            return None
        blocks = self.stored.reshape(self.shape[0], -1, type_size)[:, start // block_size : stop // block_size]
        return replace(self, shape=(self.shape[0], stop - start), stored=np.ascontiguousarray(blocks).reshape(-1))


class GgufFile:
    """An open GGUF file: `metadata` by key (arrays as lists) and `tensors` by name.

    The mapping lives as long as any of its entries.
    Raises: BrokenModelFile if the file is not GGUF, truncated or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                magic = file.read(4)
                self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if magic == _MAGIC else None
        except OSError as error:
            raise BrokenModelFile(f"{path} cannot be read: {error}") from error
        if self._mapped is None:
            raise BrokenModelFile(f"{path} is no GGUF file: it starts with {magic!r} instead of {_MAGIC!r}")
        self._position = 4
        self._num_items = 0
        try:
            self.metadata, self.tensors = self._parse()
        except (struct.error, ValueError, LookupError, ArithmeticError, MemoryError) as error:
            if isinstance(error, BrokenModelFile):
                raise
            raise BrokenModelFile(f"{path} is truncated or damaged at byte {self._position}: {error}") from error

    def _parse(self) -> tuple[dict[str, Any], dict[str, GgufEntry]]:
        version, num_tensors, num_keys = self._unpack("<IQQ")
        if version not in (2, 3):
            big_endian = version in (2 << 24, 3 << 24)
            raise BrokenModelFile(
                f"{self.path} is {'big-endian' if big_endian else f'GGUF version {version}'}; "
                "little-endian files of version 2 and 3 can be read"
            )
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._string()
            if key in metadata:
                raise ValueError(f"the key {key[:80]!r} is there twice")
            (kind,) = self._unpack("<I")
            metadata[key] = self._value(kind)
        infos = [self._tensor_info() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
            raise ValueError(f"general.alignment is {alignment!r} but must be a power of two up to {_MAX_ALIGNMENT:,}")
        start = -(-self._position // alignment) * alignment
        tensors: dict[str, GgufEntry] = {}
        places: list[tuple[int, int, str]] = []
        for name, shape, kind, offset in infos:
            if name in tensors:
                raise ValueError(f"the tensor {name[:80]!r} is there twice")
            if offset % alignment:
                raise ValueError(f"the tensor {name[:80]!r} begins at {offset}, which is no multiple of {alignment}")
            tensors[name] = self._entry(name, shape, kind, start + offset)
            places.append((offset, offset + tensors[name].stored.size, name))
        places.sort()
        for (_, end, name), (begin, _, other) in itertools.pairwise(places):
            if begin < end:
                raise ValueError(f"the tensors {name[:80]!r} and {other[:80]!r} overlap")
        return metadata, tensors

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(layout, self._bytes, self._position)
        self._advance(struct.calcsize(layout))
        return values

    def _advance(self, num_bytes: int) -> None:
        self._position += num_bytes
        if self._position > _MAX_METADATA_BYTES:
            raise ValueError(f"the metadata are longer than {_MAX_METADATA_BYTES:,} bytes")

    def _count(self, num_items: int, num_bytes: int) -> None:
        """Count an array's items, of so many bytes each at least, before any is read."""
        if num_items * num_bytes > len(self._bytes) - self._position:
            raise ValueError(f"an array of {num_items:,} items passes the end of the file")
        self._num_items += num_items
        if self._num_items > _MAX_ITEMS:
            raise ValueError(f"the metadata have more than {_MAX_ITEMS:,} items in arrays")

    @property
    def _bytes(self) -> mmap.mmap:
        assert self._mapped is not None
        return self._mapped

    def _string(self) -> str:
        mapped = self._bytes
        (length,) = _LENGTH.unpack_from(mapped, self._position)
        start = self._position + 8
        end = start + length
        if end > len(mapped):
            raise ValueError(f"a string of {length} bytes passes the end of the file")
        self._advance(end - self._position)
        # A vocabulary may hold broken UTF-8; the bytes must survive.
        return mapped[start:end].decode("utf-8", "surrogateescape")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            item_kind, length = self._unpack("<IQ")
            if item_kind in _SCALARS:
                self._count(length, np.dtype(_SCALARS[item_kind]).itemsize)
                return self._scalars(item_kind, length).tolist()
            if item_kind == _ARRAY:
                raise ValueError("an array holds arrays, which no model's metadata do")
            self._count(length, 8)
            read = self._string if item_kind == _STRING else lambda: self._value(item_kind)
            return [read() for _ in range(length)]
        if kind in _SCALARS:
            return self._scalars(kind, 1)[0].item()
        raise ValueError(f"unknown metadata type {kind}")

    def _scalars(self, kind: int, length: int) -> NDArray[Any]:
        layout = np.dtype(_SCALARS[kind])
        if self._position + length * layout.itemsize > len(self._bytes):
            raise ValueError(f"an array of {length} numbers passes the end of the file")
        values = np.frombuffer(self._bytes, dtype=layout, count=length, offset=self._position)
        self._advance(length * layout.itemsize)
        return values.copy()

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        (num_dimensions,) = self._unpack("<I")
        if num_dimensions > _MAX_DIMENSIONS:
            raise ValueError(f"the tensor {name!r} has {num_dimensions} dimensions")
        fastest_first = self._unpack(f"<{num_dimensions}Q")
        kind, offset = self._unpack("<IQ")
        return name, tuple(reversed(fastest_first)), kind, offset

    def _entry(self, name: str, shape: tuple[int, ...], kind_id: int, start: int) -> GgufEntry:
        try:
            kind = gguf.GGMLQuantizationType(kind_id)
        except ValueError as error:
            raise BrokenModelFile(f"{self.path}: the tensor {name!r} has the unknown type {kind_id}") from error
        block_size, type_size = gguf.GGML_QUANT_SIZES[kind]
        num_values = 1
        for size in shape:
            if size < 1:
                raise BrokenModelFile(f"{self.path}: {name!r} has the shape {list(shape)}; sizes must be at least 1")
            num_values *= size
        if num_values % block_size or (shape and shape[-1] % block_size):
            raise BrokenModelFile(f"{self.path}: rows of {name!r} ({list(shape)}) are no whole {kind.name} blocks")
        num_bytes = num_values // block_size * type_size
        if start + num_bytes > len(self._bytes):
            raise BrokenModelFile(
                f"{self.path} is truncated: {name!r} ends at byte {start + num_bytes:,} but the file has "
                f"{len(self._bytes):,}"
            )
        stored = np.frombuffer(self._bytes, dtype=np.uint8, count=num_bytes, offset=start)
        return GgufEntry(name, shape, kind, stored)
