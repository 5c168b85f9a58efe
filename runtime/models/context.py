"""`ForwardContext`: the inputs of a forward pass besides token ids: positions, cache slots, attention plans.

The model runner makes one for each step; the decoder only reads it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ramet.kernels.attention.decode import DecodeMetadata
from ramet.kernels.attention.extend import ExtendMetadata


@dataclass(slots=True)
class ForwardContext:
    """One step. Tokens [0, num_decode) are decode rows, one token each; [extend_start, T) are extend rows.

    Padded decode rows may overlap extend rows. Extend attention then begins at the token that `extend` names, and
    overwrites their results.
    positions, kv_slots: int32 [T]. kv_caches: (k, v) of each layer, [N, K, P, D] in the model's dtype. `decode` is None
    exactly when `num_decode` is 0; `extend` is None exactly when there is no other token.
    """

    positions: Tensor
    kv_slots: Tensor
    num_decode: int
    decode: DecodeMetadata | None
    extend: ExtendMetadata | None
    kv_caches: list[tuple[Tensor, Tensor]]
    extend_start: int

    def __post_init__(self) -> None:
        assert (self.decode is None) == (self.num_decode == 0), "decode metadata exactly where there are decode rows"
        assert self.decode is not None or self.extend is not None, "a step without tokens"
