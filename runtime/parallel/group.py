"""`Group`: the collectives of the ranks of one engine, by torch.distributed: gloo on CPUs, NCCL on GPUs.

All of them may be captured in a CUDA graph. On GPUs of one NVLink switch, sums of few tokens go through symmetric
memory, in which the switch adds.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ramet.errors import ConfigError

logger = logging.getLogger(__name__)

_INTERFACE = "GLOO_SOCKET_IFNAME"
_MEETING = timedelta(minutes=2)
_SYMMETRIC_BYTES = 8 << 20  # larger sums are bound by bandwidth, and NCCL's are as fast


class Group:
    """The ranks' collectives. All ranks must call them in the same order. One group in a process."""

    def __init__(self, rank: int, size: int, device: torch.device, folder: Path) -> None:
        """Wait for the other ranks, which find each other by a file in `folder`. device: this rank's.

        Raises: ConfigError if this process already uses torch.distributed.
        """
        check_unused()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        self.rank = rank
        self.size = size
        is_cuda = device.type == "cuda"
        store = dist.FileStore(str(folder / "ranks"), size)  # type: ignore[attr-defined]
        store.set_timeout(_MEETING)  # all ranks are there: they have loaded their parts
        with _on_loopback():
            dist.init_process_group(
                "nccl" if is_cuda else "gloo",
                store=store,
                rank=rank,
                world_size=size,
                device_id=device if is_cuda else None,
            )
        self._device = device
        self._symmetric = _SymmetricSums.make(device, self) if is_cuda else None

    def sum(self, x: Tensor) -> Tensor:
        """Add a tensor of all ranks, in place, and return it."""
        if self._symmetric is None or not self._symmetric.add(x):
            dist.all_reduce(x)
        return x

    def gather(self, x: Tensor, num_columns: int) -> Tensor:
        """Return the columns of all ranks, [R, num_columns], from [R, C] of each; padding beyond these is left out."""
        parts = list(x.new_empty((self.size, *x.shape)).unbind(0))
        dist.all_gather(parts, x.contiguous())
        each = x.shape[1]
        return torch.cat([part[:, : max(num_columns - i * each, 0)] for i, part in enumerate(parts)], dim=1)

    def share(self, x: Tensor) -> None:
        """Overwrite a tensor with the first rank's."""
        dist.broadcast(x, 0)

    def smallest(self, value: int) -> int:
        """The smallest value of all ranks."""
        found = torch.tensor([value], dtype=torch.int64, device=self._device)
        dist.all_reduce(found, dist.ReduceOp.MIN)
        return int(found)

    def abort(self) -> None:
        """End collectives that wait for a rank which is gone. They fail; the group is unusable. From any thread."""
        if self._device.type == "cuda" and dist.is_initialized():
            _world().abort()

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def check_unused() -> None:
    """Raise ConfigError if this process already uses torch.distributed."""
    if dist.is_initialized():
        raise ConfigError(
            "this process already has a torch.distributed group, of another engine with tp > 1 or of its own; shut it "
            "down first, or start this engine in another process"
        )


class _SymmetricSums:
    """Sums in a buffer that every rank's GPU can reach, added by the NVLink switch (Hopper and newer)."""

    def __init__(self, buffer: Tensor, group_name: str) -> None:
        self._buffer = buffer
        self._group_name = group_name

    @classmethod
    def make(cls, device: torch.device, group: Group) -> _SymmetricSums | None:
        """Make the buffer; None if some rank's GPU, driver or torch has no such memory."""
        has_switch = torch.cuda.get_device_capability(device) >= (9, 0) and all(
            torch.cuda.can_device_access_peer(device, other)
            for other in range(torch.cuda.device_count())
            if other != device.index
        )
        if not group.smallest(int(has_switch)):
            return None
        from torch.distributed import _symmetric_memory as symmetric  # torch's documented module for it

        buffer = None
        try:
            buffer = symmetric.empty(_SYMMETRIC_BYTES, dtype=torch.uint8, device=device)
            handle: Any = symmetric.rendezvous(buffer, _world())  # Any: the type has no stubs
            adds = int(handle.multicast_ptr != 0)
        except RuntimeError as error:
            logger.info("sums go through NCCL: %s", error)
            adds = 0
        if not group.smallest(adds) or buffer is None:
            return None
        return cls(buffer, _world().group_name)

    def add(self, x: Tensor) -> bool:
        """Add a contiguous tensor of all ranks in place. Returns False if its size or dtype does not allow it."""
        num_bytes = x.numel() * x.element_size()
        if x.dtype not in (torch.bfloat16, torch.float32) or num_bytes > _SYMMETRIC_BYTES or num_bytes % 16:
            return False
        shared = self._buffer[:num_bytes].view(x.dtype)
        shared.copy_(x.view(-1))
        torch.ops.symm_mem.multimem_all_reduce_(shared, "sum", self._group_name)
        x.view(-1).copy_(shared)
        return True


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Let gloo, which takes the host's own address otherwise, listen where no other machine reaches it."""
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if loopback is None or _INTERFACE in os.environ:  # whoever set it has chosen
        yield
        return
    os.environ[_INTERFACE] = loopback
    try:
        yield
    finally:
        del os.environ[_INTERFACE]


def _world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group
