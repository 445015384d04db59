"""Where the bytes of an evicted state lie: pinned host memory, or a file."""

import ctypes
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, UntypedStorage


class Slot(Protocol):
    """Keeps the bytes of some storages, in order."""

    num_bytes: int

    def write(self, storages: Sequence[UntypedStorage]) -> None:
        """Copy the storages' bytes in; when it returns they are there."""

    def read(self, storages: Sequence[UntypedStorage]) -> None:
        """Copy the bytes into storages that have their sizes back; on an accelerator, on the current stream."""


class HostSlot:
    """Host memory, pinned, so that an accelerator copies on a stream of its own. Not run on a GPU yet.

    Args:
        num_bytes: Its size.
        pinned: Whether to pin it, which takes an accelerator.
    """

    def __init__(self, num_bytes: int, *, pinned: bool):
        self.num_bytes = num_bytes
        self._buffer = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned)

    def write(self, storages: Sequence[UntypedStorage]) -> None:
        """See :meth:`Slot.write`."""
        for storage, part in self._pairs(storages):
            part.copy_(as_bytes(storage), non_blocking=True)
        _synchronize(storages)

    def read(self, storages: Sequence[UntypedStorage]) -> None:
        """See :meth:`Slot.read`."""
        for storage, part in self._pairs(storages):
            as_bytes(storage).copy_(part, non_blocking=True)

    def _pairs(self, storages: Sequence[UntypedStorage]) -> Iterator[tuple[UntypedStorage, Tensor]]:
        yield from zip(storages, self._buffer.split([s.nbytes() for s in storages]), strict=True)


class DiskSlot:
    """A file without a name, gone when the process is.

    It is written and read by system calls, not mapped: a mapped file counts as resident memory while it is copied, and
    a full disk kills the process (SIGBUS) instead of raising an error. Its blocks are allocated when it is made, so
    that later evictions of the state cannot find the disk full.

    Args:
        num_bytes: Its size.
        folder: Where the file is.

    Raises:
        OSError: If it cannot be made so large.
    """

    def __init__(self, num_bytes: int, folder: str | Path):
        self.num_bytes = num_bytes
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (closed with the slot)
        try:
            os.posix_fallocate(self._file.fileno(), 0, num_bytes)
        except OSError:
            self._file.close()
            raise

    def write(self, storages: Sequence[UntypedStorage]) -> None:
        """See :meth:`Slot.write`."""
        offset = 0
        for storage in storages:
            on_host = storage if storage.device.type == "cpu" else storage.cpu()
            offset = _move_all(os.pwrite, self._file.fileno(), on_host, offset)

    def read(self, storages: Sequence[UntypedStorage]) -> None:
        """See :meth:`Slot.read`."""
        offset = 0
        for storage in storages:
            is_on_host = storage.device.type == "cpu"
            on_host = storage if is_on_host else UntypedStorage(storage.nbytes())
            offset = _move_all(_pread, self._file.fileno(), on_host, offset)
            if not is_on_host:
                storage.copy_(on_host)

    def __del__(self) -> None:
        """Give the disk back."""
        if hasattr(self, "_file"):
            self._file.close()


def as_bytes(storage: UntypedStorage) -> Tensor:
    """A storage as a tensor ``[num_bytes]`` of uint8 that aliases it."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _pread(descriptor: int, view: memoryview, offset: int) -> int:
    return os.preadv(descriptor, [view], offset)


def _move_all(call, descriptor: int, storage: UntypedStorage, offset: int) -> int:
    """Write or read a storage on the host as a whole: one call moves 2 GiB at most. Returns the offset after it."""
    array = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    view = memoryview(array).cast("B")
    while view:
        num_moved = call(descriptor, view, offset)
        if num_moved == 0:
            raise OSError("the file of an evicted state is shorter than it was")
        view, offset = view[num_moved:], offset + num_moved
    return offset


def _synchronize(storages: Sequence[UntypedStorage]) -> None:
    if storages and storages[0].device.type != "cpu":
        torch.accelerator.synchronize(storages[0].device)
