"""Quantised matrices in safetensors files, and their numbers: FP8, GPTQ, AWQ and compressed-tensors.

4-bit matrices become blocks of GGML's type Q4_1, so the products and the parts of GGUF files serve them. A block has
one scale and one minimum for 32 columns, both in 16 bits, which is what a group of at least 32 columns needs; only the
product of scale and zero point is rounded, by less than one percent of a step (symmetric matrices are exact). Where
groups are not runs of columns (GPTQ with act order), a matrix is dequantised to bfloat16.
Source: the formats as AutoGPTQ / GPTQModel, AutoAWQ, compressed-tensors and DeepSeek-V3's README_WEIGHTS document them.
Not here: which format a checkpoint has (`config_files.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import torch
from torch import Tensor

from ramet.errors import BrokenModelFile
from ramet.runtime.models.config_files import Scheme, SchemeKind
from ramet.runtime.models.gguf_file import GgufEntry

_BLOCK = 32  # columns of a block of Q4_1
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble of a word that holds each of its 8 columns
# The tensors that make up a matrix, by the ends of their names: those that it must have, and others.
_NEEDED: dict[SchemeKind, tuple[str, ...]] = {
    "fp8": ("weight",),
    "gptq": ("qweight", "qzeros", "scales"),
    "awq": ("qweight", "qzeros", "scales"),
    "packed": ("weight_packed", "weight_scale"),
}
_OTHERS: dict[SchemeKind, tuple[str, ...]] = {
    "fp8": ("weight_scale", "weight_scale_inv"),
    "gptq": ("g_idx",),
    "awq": (),
    "packed": ("weight_shape", "weight_zero_point", "weight_g_idx"),
}
_WORDS, _FLOATS, _INDICES = ("I32",), ("F32", "F16", "BF16"), ("I32", "I64")
_DTYPES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("qweight", "qzeros", "weight_packed", "weight_zero_point"), _WORDS),
    **dict.fromkeys(("scales", "weight_scale", "weight_scale_inv"), _FLOATS),
    **dict.fromkeys(("g_idx", "weight_g_idx"), _INDICES),
}
# Scales of activations and of the KV cache. Ours are computed for each token, and the cache has 16 or 32 bits.
_UNREAD = ("input_scale", "activation_scale", "k_scale", "v_scale", "output_scale")


@dataclass(frozen=True, slots=True, eq=False)
class StoredMatrix:
    """A quantised matrix in a file. `parts`: its tensors by the ends of their names, each read on access.

    shapes, dtypes: theirs, dtypes as safetensors names them.
    """

    name: str
    scheme: Scheme
    parts: Mapping[str, Callable[[], Tensor]]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the matrix, that is (out features, in features)."""
        if self.scheme.kind == "fp8":
            rows, columns = self.shapes["weight"]
        elif self.scheme.kind == "gptq":
            columns, rows = self.shapes["qweight"][0] * 8, self.shapes["qweight"][1]
        elif self.scheme.kind == "awq":
            columns, rows = self.shapes["qweight"][0], self.shapes["qweight"][1] * 8
        else:
            rows, columns = self.shapes["weight_packed"][0], self.shapes["weight_packed"][1] * 8
        return rows, columns

    def dense(self) -> Tensor:
        """The matrix in bfloat16, dequantised."""
        if self.scheme.kind == "fp8":
            weight, scale = self._fp8()
            return (weight.float() * scale).to(torch.bfloat16)
        values, zeros, scales = self._four_bits()
        group_of = self._group_of()
        return ((values.float() - zeros[:, group_of]) * scales[:, group_of]).to(torch.bfloat16)

    def scaled(self) -> tuple[Tensor, Tensor] | None:
        """An FP8 matrix and its scales, fp32 [rows], or [rows, groups] of blocks; None where groups differ in size."""
        if self.scheme.block is None:
            weight, scale = self._fp8()
            return weight, scale.expand(weight.shape[0], 1).reshape(-1).contiguous()
        if self.shape[1] % self.scheme.block[1]:
            return None
        weight, scale = self._fp8()
        return weight, scale[:, :: self.scheme.block[1]].contiguous()

    def blocks(self) -> GgufEntry | None:
        """A 4-bit matrix in blocks of Q4_1; None where its groups are not runs of whole blocks."""
        rows, columns = self.shape
        group = self.scheme.group or columns
        if self.scheme.kind == "fp8" or group % _BLOCK or columns % _BLOCK or not self._has_runs():
            return None
        values, zeros, scales = self._four_bits()
        scale, minimum = scales.half(), (-zeros * scales).half()
        if not torch.allclose(scale.float(), scales, rtol=1e-3, atol=0.0) or not bool(minimum.isfinite().all()):
            return None
        num_blocks = columns // _BLOCK
        group_of_block = torch.arange(num_blocks) * _BLOCK // group
        head = torch.stack((scale[:, group_of_block], minimum[:, group_of_block]), dim=2)  # [rows, blocks, 2]
        halves = values.view(rows, num_blocks, 2, _BLOCK // 2)
        nibbles = halves[:, :, 0] | (halves[:, :, 1] << 4)
        stored = torch.cat((head.view(torch.uint8), nibbles), dim=2).reshape(-1).numpy()
        return GgufEntry(self.name, (rows, columns), gguf.GGMLQuantizationType.Q4_1, stored)

    def _has_runs(self) -> bool:
        """Whether each group is a run of columns."""
        name = "g_idx" if self.scheme.kind == "gptq" else "weight_g_idx"
        if name not in self.parts:
            return True
        return torch.equal(self.parts[name]().long(), self._run_of())

    def _run_of(self) -> Tensor:
        """The group of each column where groups are runs of columns."""
        columns = self.shape[1]
        return torch.arange(columns) // (self.scheme.group or columns)

    def _group_of(self) -> Tensor:
        """The group of each column, int64 [columns]. Raises: BrokenModelFile."""
        name = "g_idx" if self.scheme.kind == "gptq" else "weight_g_idx"
        group_of = self.parts[name]().long() if name in self.parts else self._run_of()
        num_groups = self.shapes["scales" if "scales" in self.shapes else "weight_scale"]
        limit = num_groups[0] if "scales" in self.shapes else num_groups[1]
        if group_of.numel() and not 0 <= int(group_of.min()) <= int(group_of.max()) < limit:
            raise BrokenModelFile(f"{self.name}: a column's group is outside of its {limit} groups")
        return group_of

    def _fp8(self) -> tuple[Tensor, Tensor]:
        """The weight and its scales, fp32 [rows, columns], [rows, 1] or [1, 1]."""
        weight = self.parts["weight"]()
        name = "weight_scale_inv" if "weight_scale_inv" in self.parts else "weight_scale"
        scale = self.parts[name]().float()
        rows, columns = weight.shape
        if self.scheme.block is None:
            return weight, scale.reshape(-1, 1)
        high, wide = self.scheme.block
        return weight, scale.repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]

    def _four_bits(self) -> tuple[Tensor, Tensor, Tensor]:
        """Values uint8 [rows, columns], zero points and scales fp32 [rows, groups]."""
        kind = self.scheme.kind
        if kind == "packed":
            values = _nibbles(self.parts["weight_packed"]())
            scales = self.parts["weight_scale"]().float()
            zeros = torch.full_like(scales, 8.0)
            if "weight_zero_point" in self.parts:
                zeros = _nibbles(self.parts["weight_zero_point"]().t().contiguous()).t()[: scales.shape[0]].float()
            return values, zeros, scales
        words, zero_words = self.parts["qweight"](), self.parts["qzeros"]()
        scales = self.parts["scales"]().float().t().contiguous()
        if kind == "gptq":  # 8 rows of [columns, rows] in a word; zero points: 8 columns
            values, zeros = _nibbles(words.t().contiguous()), _nibbles(zero_words).t()
            return values, (zeros + self.scheme.zero_offset).float(), scales
        values, zeros = (_nibbles(part, _AWQ_ORDER).t().contiguous() for part in (words, zero_words))
        return values, zeros.float(), scales

    def check(self, source: Path) -> None:
        """Raise BrokenModelFile naming what is missing, or the tensor whose shape does not fit the others."""
        kind = self.scheme.kind
        missing = [name for name in _NEEDED[kind] if name not in self.parts]
        if kind == "fp8" and not any(name in self.parts for name in _OTHERS["fp8"]):
            missing.append("weight_scale")
        if missing:
            raise BrokenModelFile(f"{source}: the quantised {self.name} lacks {', '.join(missing)}")
        for name in ("weight", "qweight", "weight_packed"):
            if name in self.shapes and len(self.shapes[name]) != 2:
                raise BrokenModelFile(
                    f"{source}: {self.name}'s {name} has {len(self.shapes[name])} axes but must have 2"
                )
        for name, dtype in self.dtypes.items():
            if dtype not in _DTYPES.get(name, (dtype,)):
                raise BrokenModelFile(
                    f"{source}: {self.name}'s {name} is {dtype} but must be {' or '.join(_DTYPES[name])}"
                )
        for name, wanted in self._expected().items():
            found = self.shapes.get(name)
            if found is not None and found not in wanted:
                shown = " or ".join(str(list(one)) for one in wanted)
                raise BrokenModelFile(f"{source}: {self.name}'s {name} is {list(found)} but must be {shown}")

    def _expected(self) -> dict[str, list[tuple[int, ...]]]:
        """The shapes that each tensor beside the values may have."""
        rows, columns = self.shape
        group = self.scheme.group or columns
        groups = -(-columns // group)
        if self.scheme.kind == "fp8":
            if self.scheme.block is not None:
                high, wide = self.scheme.block
                scales: list[tuple[int, ...]] = [(-(-rows // high), -(-columns // wide))]
            else:
                scales = [(rows, 1), (rows,), (1,), (), (1, 1)]
            return {"weight_scale": scales, "weight_scale_inv": scales}
        if self.scheme.kind == "packed":
            return {
                "weight_scale": [(rows, groups)],
                "weight_zero_point": [(-(-rows // 8), groups)],
                "weight_g_idx": [(columns,)],
            }
        return {"scales": [(groups, rows)], "qzeros": [(groups, -(-rows // 8))], "g_idx": [(columns,)]}


def _nibbles(words: Tensor, order: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)) -> Tensor:
    """Unpack int32 [n, m] to uint8 [n, 8 m]; column i of a word is its nibble order[i], the lowest being 0."""
    shifts = torch.tensor([4 * nibble for nibble in order], dtype=torch.int32)
    return ((words.unsqueeze(2) >> shifts) & 15).to(torch.uint8).reshape(words.shape[0], -1)


def stored_matrices(
    scheme: Scheme, tensors: Mapping[str, tuple[Callable[[], Tensor], tuple[int, ...], str]], source: Path
) -> tuple[dict[str, StoredMatrix], set[str]]:
    """The quantised matrices of a checkpoint by their names, and the names of the tensors that belong to them.

    tensors: how each is read, its shape and its dtype as safetensors names it. Raises: BrokenModelFile.
    """
    ends = (*_NEEDED[scheme.kind], *_OTHERS[scheme.kind])
    grouped: dict[str, list[str]] = {}
    taken = {name for name in tensors if name.endswith(tuple(f".{end}" for end in _UNREAD))}
    for name, (_, _, dtype) in tensors.items():
        base, _, end = name.rpartition(".")
        if end in ends and (end != "weight" or dtype == "F8_E4M3"):
            grouped.setdefault(base, []).append(end)
            taken.add(name)
    found = {}
    for base, own in grouped.items():
        parts = {end: tensors[f"{base}.{end}"] for end in own}
        matrix = StoredMatrix(
            f"{base}.weight",
            scheme,
            {end: read for end, (read, _, _) in parts.items()},
            {end: shape for end, (_, shape, _) in parts.items()},
            {end: dtype for end, (_, _, dtype) in parts.items()},
        )
        matrix.check(source)
        found[matrix.name] = matrix
    return found, taken
