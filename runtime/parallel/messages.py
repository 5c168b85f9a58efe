"""What the first rank tells the others: steps to run, as msgspec writes dataclasses, and tokens to replace.

Masks and edits of logits are not sent: the first rank alone samples.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import numpy as np

from ramet.kernels.attention.tree import TreeWork
from ramet.runtime.steps.inputs import LastToken, Step


class RankMessage(msgspec.Struct, array_like=True, frozen=True):
    """What a rank must do: run a step, by a new plan for shared prefixes if there is one; store slots' last tokens."""

    step: Step | None = None
    work: TreeWork | None = None
    last: list[LastToken] = []

    @classmethod
    def of(cls, step: Step, work: TreeWork | None) -> RankMessage:
        return cls(replace(step, masks=None, edited=None), work)


def _write_array(value: Any) -> list[Any]:  # Any: a field that msgspec does not know, which is an array
    return [*value.shape[1:], value.tobytes()]


def _read_array(kind: type, written: list[Any]) -> Any:
    *inner, data = written
    return np.frombuffer(bytearray(data), dtype=np.int32).reshape(-1, *inner)  # torch refuses memory that is read-only


encoder = msgspec.msgpack.Encoder(enc_hook=_write_array)
decoder: msgspec.msgpack.Decoder[RankMessage] = msgspec.msgpack.Decoder(RankMessage, dec_hook=_read_array)
