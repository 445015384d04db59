"""Evicting and fetching where tensors have no bytes: a budget's decisions, their moves counted and not made.

The decisions are those of :class:`~.memory.scheduler.Scheduler` and :class:`~.memory.residency.Residency`, which run as
they are. Slots copy nothing, and where the plan is for accelerators, what they ask of one is answered from the tracker.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor, UntypedStorage

from ..memory import meter, residency, scheduler
from ..memory.budget import Memory
from ..memory.bytes_tracker import MemoryTracker
from ..memory.phases import tensors_of

if TYPE_CHECKING:
    from ..loop.program import Program


class _Slot:
    """Keeps no bytes."""

    def __init__(self, num_bytes: int):
        self.num_bytes = num_bytes

    def write(self, storages: Sequence[UntypedStorage]) -> None:
        return None

    def read(self, storages: Sequence[UntypedStorage]) -> None:
        return None


class _HostSlot(_Slot):
    def __init__(self, num_bytes: int, *, pinned: bool):
        super().__init__(num_bytes)


class _DiskSlot(_Slot):
    def __init__(self, num_bytes: int, folder: str | Path):
        super().__init__(num_bytes)


@contextmanager
def counted_moves(tracker: MemoryTracker, *, accelerator: bool) -> Iterator[None]:
    """While inside, programs with a memory budget decide on moves as in a run, and nothing is copied.

    Args:
        tracker: Of the simulation.
        accelerator: Whether states leave an accelerator for the host, then for a disk; else RAM for a disk.

    Yields:
        Nothing.
    """
    patches: list[Any] = [
        mock.patch.object(residency, "HostSlot", _HostSlot),
        mock.patch.object(residency, "DiskSlot", _DiskSlot),
    ]
    if accelerator:
        patches += [
            mock.patch.object(scheduler, "Residency", _OfAccelerator),
            mock.patch.object(scheduler, "meter_of", meter.AllocatorMeter),
            mock.patch.object(meter, "peak_bytes", lambda device: int(tracker.phases[-1].peak_bytes)),
            mock.patch.object(scheduler, "tensors_of", _on_accelerator),
            mock.patch.object(Memory, "of", classmethod(_of)),
        ]
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def note_away(program: "Program", tracker: MemoryTracker) -> None:
    """Keep with the phase in hand which states are off the device while it runs."""
    within = program.iteration.scheduler.residency
    if within is not None:
        away = {name: float(s.num_bytes) for name, s in within.states.items() if not s.is_resident}
        tracker.phases[-1].away = away


class _OfAccelerator(residency.Residency):
    def __init__(self, memory: Memory, device: torch.device, states: Any):
        super().__init__(memory, device, states)
        self._is_accelerator = True


def _on_accelerator(trainer: Any, kind: str) -> Iterable[Tensor]:
    """States on the device: recorded steps lie on the host anyway."""
    return () if kind == "trajectory" else tensors_of(trainer, kind)


def _of(cls: type[Memory], given: Memory | int | str, device: torch.device) -> Memory:
    return given if isinstance(given, Memory) else cls(device=given)
