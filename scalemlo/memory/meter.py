"""What phases take beside the states, measured while they run.

That is what a phase allocates for itself, and what earlier ones left for later ones (gradients, adjoints), at its peak.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from ..engines.kept import KeptWeights
from ..history import peak_bytes
from .bytes_tracker import KIND_OF_STATE, PERSISTENT, MemoryTracker, PhaseUse, total
from .phases import Phase
from .residency import Residency


class Meter(ABC):
    """Measures phases.

    Args:
        residency: Of the states, which do not count.
    """

    def __init__(self, residency: Residency):
        self.taken: dict[Phase, int] = {}
        """Bytes by phase: the most of all that was measured."""
        self.residency = residency

    @property
    def is_watching(self) -> bool:
        """Whether phases that are known already are measured again just now, and may turn out to take more."""
        return False

    def run(self, *, once: bool = False) -> AbstractContextManager[None]:
        """Context of phases that run one after the other.

        Args:
            once: Whether this is no outer iteration, of which the next one can be measured instead.
        """
        return nullcontext()

    def paused(self) -> AbstractContextManager[None]:
        """Context of what is no part of the budget: batches that a data loader makes."""
        return nullcontext()

    @abstractmethod
    def phase(self, phase: Phase) -> AbstractContextManager[None]:
        """Context of one phase, its states resident; what it made of states is found at its end."""

    def forget(self) -> dict[Phase, int]:
        """Measure everything anew: phases have changed places, and find other things left for them.

        Returns:
            What was known, to be put back where they change back.
        """
        known, self.taken = self.taken, {}
        return known

    def _note(self, phase: Phase, num_bytes: float) -> None:
        self.taken[phase] = max(int(num_bytes), self.taken.get(phase, 0))


class AllocatorMeter(Meter):
    """Of an accelerator, by its allocator: every call.

    Args:
        residency: Of the states.
        device: Whose allocator.
        kept: Weights that stay gathered, which do not count either.
    """

    def __init__(self, residency: Residency, device: torch.device, kept: KeptWeights):
        super().__init__(residency)
        self._device, self._kept = device, kept

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Take the peak that the run's history started anew."""
        yield
        self.residency.rescan_made(phase.uses)
        self._note(phase, peak_bytes(self._device) - self.residency.resident_bytes - self._kept.num_bytes)


class TrackingMeter(Meter):
    """Of the CPU, by tracking every operation.

    What earlier phases left is seen only if they were tracked too. So outer iterations are tracked from end to end
    until one of them has shown no phase that was new; one that turns up later is measured by itself at first, and with
    everything around it in the next iteration. What was made before does not count: nothing but states lasts from one
    iteration to the next, and the rest is the caller's.

    Args:
        residency: Of the states.
    """

    def __init__(self, residency: Residency):
        super().__init__(residency)
        self._tracker = MemoryTracker()
        self._is_watching, self._has_new, self._is_settled = False, False, False
        self._last: tuple[Phase, PhaseUse] | None = None  # and what has run since it ended

    @property
    def is_watching(self) -> bool:
        """Whether this iteration is tracked from end to end."""
        return self._is_watching

    @contextmanager
    def run(self, *, once: bool = False) -> Iterator[None]:
        """Track it from end to end, where the last iteration showed something new."""
        if self._is_settled and not once:
            yield
            return
        self._is_watching, self._has_new = True, False
        self._tracker = MemoryTracker()
        try:
            with self._tracker:
                yield
                self._end_last()
            self._is_settled = self._is_settled if once else not self._has_new
        finally:
            self._is_watching, self._last = False, None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let what runs inside be unseen."""
        if not self._is_watching:
            yield
            return
        self._tracker.__exit__(None, None, None)
        try:
            yield
        finally:
            self._tracker.__enter__()

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Track it, where it is new or this iteration is tracked."""
        is_new = phase not in self.taken
        if not (is_new or self._is_watching):
            yield
            return
        self._has_new |= is_new
        self._is_settled &= self._is_watching
        self._end_last()
        before = self.residency.needed_bytes(self.residency.states)
        if not self._is_watching:
            self._tracker = MemoryTracker()
        self._tag_states()
        with nullcontext() if self._is_watching else self._tracker:
            with self._tracker.phase(f"{phase.level}/{phase.name}") as seen:
                yield
        self._tag_states()
        self.residency.rescan_made(phase.uses)
        grown = self.residency.needed_bytes(self.residency.states) - before
        self._note(phase, seen.peak_bytes - seen.persistent_bytes - max(grown, 0))
        if self._is_watching:
            self._last = phase, self._tracker.start(f"after {phase.level}/{phase.name}")

    def forget(self) -> dict[Phase, int]:
        """Track the next iteration from end to end again."""
        self._is_settled = False
        return super().forget()

    def _end_last(self) -> None:
        """What ran since the last phase ended had that phase's states beside it: it is charged to that phase."""
        if self._last is not None:
            phase, since = self._last
            self._note(phase, max(map(_transient, since.peaks.values()), default=0))
            self._last = None

    def _tag_states(self) -> None:
        """Tell the tracker what persists: what is there now, and what the phase has made, before it is evicted."""
        for state in self.residency.states.values():
            for tensor in state.tensors() if state.is_resident else ():
                self._tracker.tag(tensor, KIND_OF_STATE[state.name.kind])


def meter_of(residency: Residency, device: torch.device, kept: KeptWeights) -> Meter:
    """The one for a device."""
    return TrackingMeter(residency) if device.type == "cpu" else AllocatorMeter(residency, device, kept)


def _transient(peak: dict[str, float]) -> float:
    return total(peak) - sum(peak.get(kind, 0) for kind in PERSISTENT)
