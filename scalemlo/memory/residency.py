"""Moving states off a rank's device and back, so that what is on it stays within a budget.

A state is the set of storages under some tensors. It is evicted by copying their bytes away and resizing them to
nothing, and fetched by the reverse: every view and alias (parameters, DTensors, FSDP's shards, DeepSpeed's flat
masters, optimizer states) stays the same object and has the same bits afterwards.
"""

import errno
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, UntypedStorage

from .budget import Memory
from .phases import StateName
from .sizes import format_bytes
from .slots import DiskSlot, HostSlot, Slot

SMALLEST_BYTES = 1024
"""Storages below this size stay on the device: moving one costs more than it frees."""


@dataclass
class Moves:
    """What was moved for one phase, both ways together."""

    num_bytes: int = 0
    seconds: float = 0.0


class State:
    """One thing that is moved as a whole.

    Args:
        name: Its name.
        tensors: Gives its live tensors.
        device: Where they are used; tensors elsewhere (on the host already) are no part of it.
        on_move: Told whether the state is resident whenever that changes.
    """

    def __init__(
        self,
        name: StateName,
        tensors: Callable[[], Iterable[Tensor]],
        device: torch.device,
        on_move: Callable[[bool], None] = lambda is_resident: None,
    ):
        self.name = name
        self.num_bytes = 0
        """That can be moved, wherever they are now."""
        self.fixed_bytes = 0
        """That stay on the device: small storages, and memory that torch does not own."""
        self.foreign_bytes = 0
        """Of the fixed ones, those in memory that torch does not own."""
        self.slot: Slot | None = None
        self.arrival: Any = None
        """Event of a copy to the device that is still under way."""
        self.tensors, self._device, self._on_move = tensors, device, on_move
        self._evicted: list[tuple[UntypedStorage, int]] = []

    @property
    def is_resident(self) -> bool:
        """Whether it is on the device."""
        return not self._evicted

    def scan(self, taken: Iterable[int] = ()) -> list[UntypedStorage]:
        """Find its storages anew: optimizers and estimators make and drop tensors. Only while it is resident.

        Args:
            taken: Identities of storages that belong to another state.

        Returns:
            Those that can be moved. They are not kept here: a tensor that is dropped must be freed.
        """
        movable: dict[int, UntypedStorage] = {}
        fixed: dict[int, int] = {}
        self.foreign_bytes = 0
        for tensor in self.tensors():
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if tensor.device.type != self._device.type or key in movable or key in fixed or key in taken:
                continue
            if size >= SMALLEST_BYTES and _is_owned(storage):
                movable[key] = storage
                continue
            fixed[key] = size
            self.foreign_bytes += size if size >= SMALLEST_BYTES else 0
        self.fixed_bytes = sum(fixed.values())
        self.num_bytes = sum(storage.nbytes() for storage in movable.values())
        return list(movable.values())

    def evict(self, storages: Sequence[UntypedStorage], slot: Slot) -> None:
        """Copy to a slot, and free.

        Args:
            storages: From :meth:`scan`.
            slot: Of the size of the state.
        """
        slot.write(storages)
        self.slot, self._evicted = slot, [(storage, storage.nbytes()) for storage in storages]
        for storage in storages:
            storage.resize_(0)
        self._on_move(False)

    def fetch(self, side: "torch.Stream | None" = None) -> None:
        """Put everything back, into memory of the current stream.

        Args:
            side: Stream to copy on instead of the current one, which has to wait for ``arrival`` then.
        """
        assert self.slot is not None and self.arrival is None
        for storage, size in self._evicted:
            storage.resize_(size)
        if side is not None:
            side.wait_stream(torch.accelerator.current_stream(self._device))  # what it had there may still be in use
        with nullcontext() if side is None else side:
            self.slot.read([storage for storage, _ in self._evicted])
            self.arrival = None if side is None else side.record_event()
        self._evicted = []
        self._on_move(True)


class Residency:
    """Keeps the resident bytes of a rank's states within a budget. Local: ranks may decide differently.

    Args:
        memory: The budget.
        device: Of this rank.
        states: All of them.
    """

    def __init__(self, memory: Memory, device: torch.device, states: Mapping[StateName, State]):
        self.memory, self.states = memory, states
        self.peak_bytes = 0
        """The most resident bytes of states so far."""
        self._device = device
        self._is_accelerator = device.type != "cpu"
        self._side = torch.Stream(device) if self._is_accelerator else None  # none in a plan
        self._weights: set[int] = set()
        self.rescan(states)
        self._warn_of_foreign_memory()

    @property
    def resident_bytes(self) -> int:
        """Of all states on the device now."""
        return sum(s.fixed_bytes + (s.num_bytes if s.is_resident else 0) for s in self.states.values())

    def needed_bytes(self, names: Iterable[StateName]) -> int:
        """Of the device, for some states and for what never leaves it."""
        fixed = sum(state.fixed_bytes for state in self.states.values())
        return fixed + sum(self.states[name].num_bytes for name in names)

    def rescan(self, names: Iterable[StateName]) -> None:
        """Find the storages of some states anew, weights first: a memory that aliases them moves with them."""
        for name in sorted(names, key=lambda name: name.kind != "weights"):
            state = self.states[name]
            if state.is_resident:
                is_weights = name.kind == "weights"
                found = state.scan(() if is_weights else self._weights)
                self._weights |= {storage._cdata for storage in found} if is_weights else set()
        self.peak_bytes = max(self.peak_bytes, self.resident_bytes)

    def rescan_made(self, names: Iterable[StateName]) -> None:
        """:meth:`rescan` of what a phase that used these states may have made or dropped; storages of weights stay."""
        self.rescan([name for name in names if name.kind != "weights"])

    def bring(
        self,
        names: Sequence[StateName],
        room_bytes: float,
        next_use: Callable[[StateName], float],
        pinned: Iterable[StateName] = (),
    ) -> Moves:
        """Make some states resident, and evict others where the budget demands it: farthest next use first.

        A ``ValueError`` where a state has to go and there is no place for it: it stays where it is.

        Args:
            names: States that are needed.
            room_bytes: To be left beside the resident states; infinite evicts all that may be.
            next_use: Phases until a state is needed.
            pinned: States not to evict.

        Returns:
            What was moved.
        """
        start, moves = time.perf_counter(), Moves()
        missing = [name for name in names if not self.states[name].is_resident]
        missing_bytes = sum(self.states[name].num_bytes for name in missing)
        allowed = self.memory.device_bytes - missing_bytes - room_bytes
        if self.resident_bytes > allowed:
            kept = {*names, *pinned}
            victims = [s for s in self.states.values() if s.is_resident and s.num_bytes and s.name not in kept]
            victims.sort(key=lambda state: next_use(state.name))
            while victims and self.resident_bytes > allowed:
                moves.num_bytes += self._evict(victims.pop())
        for name in missing:
            self.states[name].fetch()
            moves.num_bytes += self.states[name].num_bytes
        for name in names:
            self._wait_for(self.states[name])
        self.peak_bytes = max(self.peak_bytes, self.resident_bytes)
        moves.seconds = time.perf_counter() - start
        return moves

    def prefetch(self, names: Sequence[StateName], room_bytes: float) -> int:
        """Start to fetch what the next phase needs beside the one in hand, where there is room for both.

        On an accelerator, on a stream of its own. Not run on a GPU yet.

        Args:
            names: States of the next phase.
            room_bytes: To be left beside the resident states, for either phase.

        Returns:
            Bytes under way.
        """
        missing = [self.states[name] for name in names if not self.states[name].is_resident]
        wanted = self.resident_bytes + sum(state.num_bytes for state in missing) + room_bytes
        if wanted > self.memory.device_bytes:
            return 0
        for state in missing:
            state.fetch(self._side)
        self.peak_bytes = max(self.peak_bytes, self.resident_bytes)
        return sum(state.num_bytes for state in missing)

    def _wait_for(self, state: State) -> None:
        if state.arrival is not None:
            torch.accelerator.current_stream(self._device).wait_event(state.arrival)
            state.arrival = None

    def _evict(self, state: State) -> int:
        self._wait_for(state)
        storages = state.scan(() if state.name.kind == "weights" else self._weights)
        if not storages:
            return 0
        try:
            state.evict(storages, self._slot_for(state))
        except OSError as error:
            why = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error)
            raise ValueError(
                f"memory={self.memory}: {state.name} ({format_bytes(state.num_bytes)}) cannot be moved to "
                f"{str(self.memory.disk)!r}: {why}. It stays on the device, and nothing is lost. Free space there, "
                "give another disk, or raise the budget."
            ) from error
        return state.num_bytes

    def _slot_for(self, state: State) -> Slot:
        """The slot it had, or a new one: of the host while its share lasts, else of the disk."""
        if state.slot is not None and state.slot.num_bytes == state.num_bytes:
            return state.slot
        state.slot = None
        on_host = sum(s.slot.num_bytes for s in self.states.values() if isinstance(s.slot, HostSlot))
        if self._is_accelerator and on_host + state.num_bytes <= self.memory.host_bytes:
            return HostSlot(state.num_bytes, pinned=True)
        if self.memory.disk is None:
            raise ValueError(
                f"memory={self.memory}: {state.name} ({format_bytes(state.num_bytes)}) has to leave the device, and "
                f"{format_bytes(on_host)} are on the host already. Raise host, or give a disk: "
                "Memory(device=..., disk='/scratch')."
            )
        return DiskSlot(state.num_bytes, self.memory.disk)

    def _warn_of_foreign_memory(self) -> None:
        foreign = [state for state in self.states.values() if state.foreign_bytes]
        if foreign:
            listed = ", ".join(f"{format_bytes(state.foreign_bytes)} of the {state.name}" for state in foreign)
            warnings.warn(
                f"{listed} stay on the device: they lie in memory that torch does not own (a mapped file, shared "
                "memory, an array). To let them move, copy them before the module is given to its level: "
                "p.data = p.data.clone().",
                stacklevel=2,
            )


def _is_owned(storage: UntypedStorage) -> bool:
    """Whether torch allocated it for this process alone."""
    return storage.resizable() and not (storage.device.type == "cpu" and storage.is_shared())
