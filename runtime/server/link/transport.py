"""How the bytes of KV pages get from one engine process to another: one interface, an implementation for each way.

The server's process opens a transport for a move (`open_transport`) and tells both engines its address; they use it by
that (`transport_at`). One engine puts a part and the other one gets it, in turns. What `put` returns goes to the reader
over the link between the processes. Everything ends with the processes that have it open, however they end.

Not here: which pages move, and who may take them (`moving`).
"""

from __future__ import annotations

import mmap
import os
import secrets
import sys
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ramet.errors import InvalidRequest

PageBytes = NDArray[np.uint8]  # [n]
_NAME = "ramet-pages-"
_PART_BYTES = 32 << 20


class Transport(Protocol):
    """One way for the parts of a move. `part_bytes`: of a part, at most."""

    address: str
    part_bytes: int

    def put(self, pages: PageBytes) -> bytes:
        """Offer a part. Returns what the reader must be told of it."""

    def get(self, told: bytes, num_bytes: int) -> PageBytes:
        """Return the part that was put, of so many bytes. It is valid until another one is put.

        Raises: InvalidRequest, if it has another size.
        """

    def close(self) -> None:
        """Give up what this process holds of it."""


class LinkTransport:
    """The bytes go over the link itself, through the server's process: anywhere, encrypted between machines."""

    address = ""
    part_bytes = 4 << 20  # what else is said on the link waits for a part

    def put(self, pages: PageBytes) -> bytes:
        return pages.tobytes()

    def get(self, told: bytes, num_bytes: int) -> PageBytes:
        _check_size(len(told), num_bytes)
        return np.frombuffer(bytearray(told), dtype=np.uint8)

    def close(self) -> None:
        return


class MemoryTransport:
    """Memory that processes of one machine share. It has no name in a file system, so it ends with them."""

    def __init__(self, address: str, file: int) -> None:
        self.address = address
        self._file = file
        self.part_bytes = os.fstat(file).st_size
        self._bytes: PageBytes = np.frombuffer(mmap.mmap(file, self.part_bytes), dtype=np.uint8)  # unmapped with it

    @classmethod
    def create(cls, num_bytes: int) -> MemoryTransport:
        """Make the memory. Raises OSError if the system has not so much."""
        name = _NAME + secrets.token_hex(8)
        file = os.memfd_create(name)
        try:
            os.posix_fallocate(file, 0, num_bytes)  # now, not when a process first writes to it
            return cls(f"{os.getpid()}/{file}/{name}", file)
        except OSError:
            os.close(file)
            raise

    @classmethod
    def attach(cls, address: str) -> MemoryTransport:
        """Open what another process has made. Raises InvalidRequest if it has closed it."""
        owner, number, name = address.split("/")
        try:
            file = os.open(f"/proc/{owner}/fd/{number}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise InvalidRequest(f"the shared memory of this move is gone: {error}") from error
        if name not in os.readlink(f"/proc/self/fd/{file}"):  # the number stands for another file now
            os.close(file)
            raise InvalidRequest("the shared memory of this move is gone: its owner has closed it")
        return cls(address, file)

    def put(self, pages: PageBytes) -> bytes:
        _check_size(len(pages), min(len(pages), self.part_bytes))
        self._bytes[: len(pages)] = pages  # other threads run meanwhile
        return b""

    def get(self, told: bytes, num_bytes: int) -> PageBytes:
        _check_size(len(told), 0)
        _check_size(num_bytes, min(num_bytes, self.part_bytes))
        return self._bytes[:num_bytes]

    def close(self) -> None:
        os.close(self._file)


def open_transport(page_bytes: int, num_pages: int, *, is_local: bool) -> Transport:
    """Open a transport between two engines for so many pages, or for parts of them. Takes a few milliseconds.

    is_local: both run on this process's machine.
    """
    if is_local and sys.platform == "linux":
        try:
            return MemoryTransport.create(max(min(_PART_BYTES, num_pages * page_bytes), page_bytes))
        except OSError:  # no memory, or no file, is left for it: the link does it as well
            return LinkTransport()
    return LinkTransport()


def transport_at(address: str) -> Transport:
    """Return the transport that another process has opened. Raises InvalidRequest if that process has closed it."""
    return MemoryTransport.attach(address) if address else LinkTransport()


def _check_size(num_given: int, num_bytes: int) -> None:
    if num_given != num_bytes:
        raise InvalidRequest(f"a part of a move has {num_given:,} bytes instead of {num_bytes:,}")
