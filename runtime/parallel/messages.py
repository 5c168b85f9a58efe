"""What the first rank tells the others: a step as the bytes of its arrays, tokens to replace, the end.

Masks and edits of logits are not sent: the first rank alone samples.
"""

from __future__ import annotations

from dataclasses import fields
from operator import attrgetter

import msgspec
import numpy as np
from numpy.typing import NDArray

from ramet.kernels.attention.tree import ITEM_FIELDS, TreeWork
from ramet.runtime.steps.inputs import ExtendArrays, Step

_EXTEND = [field.name for field in fields(ExtendArrays)]
_WORK = [field.name for field in fields(TreeWork)]
_Int32 = NDArray[np.int32]


class StepMessage(msgspec.Struct, tag="step", array_like=True, frozen=True):
    """A step. extend, work: the fields of `ExtendArrays`, and of a new `TreeWork`; or empty."""

    decode: list[bytearray]  # decode_rows, new_pages, kv_lens, page_copies, logprob_rows
    extend: list[bytearray]
    work: list[bytearray]
    uses_tree: bool
    num_tops: int
    num_score_tops: int
    needs_host: bool

    @classmethod
    def of(cls, step: Step, work: TreeWork | None) -> StepMessage:
        decode = step.decode_rows, step.new_pages, step.kv_lens, step.page_copies, step.logprob_rows
        return cls(
            [_bytes(array) for array in decode],
            [] if step.extend is None else [_bytes(array) for array in attrgetter(*_EXTEND)(step.extend)],
            [] if work is None else [_bytes(array) for array in attrgetter(*_WORK)(work)],
            step.uses_tree,
            step.num_tops,
            step.num_score_tops,
            step.needs_host,
        )

    def step(self) -> Step:
        """The step, with arrays of this process that may be changed."""
        decode_rows, new_pages, kv_lens, page_copies, logprob_rows = map(_array, self.decode)
        extend = dict(zip(_EXTEND, map(_array, self.extend), strict=False))
        if extend:
            extend["updates"] = extend["updates"].reshape(-1, 3)
        return Step(
            decode_rows,
            new_pages,
            kv_lens,
            page_copies.reshape(-1, 3),
            ExtendArrays(**extend) if extend else None,
            self.uses_tree,
            logprob_rows,
            self.num_tops,
            self.num_score_tops,
            self.needs_host,
        )

    def tree_work(self) -> TreeWork | None:
        """The new plan for shared prefixes; None if the last one holds."""
        if not self.work:
            return None
        arrays = dict(zip(_WORK, map(_array, self.work), strict=True))
        arrays["items"] = arrays["items"].reshape(-1, ITEM_FIELDS)
        return TreeWork(**arrays)


class TokensMessage(msgspec.Struct, tag="tokens", array_like=True, frozen=True):
    """Tokens to store: pairs (slot, token)."""

    tokens: list[tuple[int, int]]


class EndMessage(msgspec.Struct, tag="end", array_like=True, frozen=True):
    """The rank must end."""


Message = StepMessage | TokensMessage | EndMessage
encoder = msgspec.msgpack.Encoder()
decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def _bytes(array: _Int32) -> bytearray:
    return bytearray(array.tobytes())


def _array(data: bytearray) -> _Int32:
    return np.frombuffer(data, dtype=np.int32)
