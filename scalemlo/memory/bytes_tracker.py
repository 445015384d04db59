"""Bytes alive, by what they are, while anything runs: on real tensors and on fake ones alike.

A dispatch mode sees every operation's outputs. Each storage is counted once, from its first output until it is freed,
so views and in-place operations cost nothing. What an operation allocates for itself and frees before it returns is
not seen.
"""

import weakref
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from .phases import StateName

PERSISTENT = ("weights", "optimizer", "estimator", "engine")
"""Kinds that live from one outer iteration to the next: weights and buffers, optimizer states, what estimators keep
between solves, gradient buckets of the engine."""

KINDS = (*PERSISTENT, "carried", "gathered", "working")
"""All kinds on the device: beside the persistent ones, what an earlier phase left for later ones (gradients, adjoints,
batches), weights gathered for the moment, and everything else the phase in hand has made."""

KIND_OF_STATE = {"weights": "weights", "optimizer": "optimizer", "memory": "estimator", "trajectory": "estimator"}
"""By the kinds of :class:`~.phases.StateName`."""

HOST = "host"
"""Kind of what lies in the host's memory where there is an accelerator; no part of the totals."""


@dataclass
class PhaseUse:
    """What one phase of one outer iteration used on this rank.

    Attributes:
        name: ``"<level>/<phase>"``.
        peaks: Bytes by kind at the moment with the most bytes, by what allocated at that moment: an operation and the
            size of its output.
        num_collectives: By kind of collective.
        sent_bytes: What this rank sends, ring algorithms: ``(W-1)/W`` of the gathered or scattered tensor, twice that
            of an all-reduced one.
        flops: Of matrix products and attention, multiplications and additions counted apart.
        moved_bytes: Of states that a memory budget moves onto the device and off it, for the phase and before it.
        away: Bytes by state of those that a memory budget has off the device meanwhile.
    """

    name: str
    peaks: dict[str, dict[str, float]] = field(default_factory=dict)
    num_collectives: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    sent_bytes: float = 0.0
    flops: float = 0.0
    moved_bytes: float = 0.0
    away: dict[StateName, float] = field(default_factory=dict)

    @property
    def peak(self) -> dict[str, float]:
        """Bytes by kind at the peak."""
        return max(self.peaks.values(), key=total, default={})

    @property
    def peak_bytes(self) -> float:
        """Bytes at the peak."""
        return total(self.peak)

    @property
    def persistent_bytes(self) -> float:
        """Of the peak, what outlives the iteration."""
        return sum(self.peak.get(kind, 0) for kind in PERSISTENT)

    @property
    def gathered_bytes(self) -> float:
        """The most gathered at any peak of an operation."""
        return max((peak.get("gathered", 0) for peak in self.peaks.values()), default=0)

    @property
    def transient_bytes(self) -> float:
        """Of the peak, what does not outlive the iteration and is not gathered."""
        return self.peak_bytes - self.persistent_bytes - self.peak.get("gathered", 0)


def total(peak: dict[str, float]) -> float:
    """Bytes on the device of a peak."""
    return sum(peak.get(kind, 0) for kind in KINDS)


@dataclass(slots=True)
class _Storage:
    nbytes: int
    kind: str
    phase: int
    reference: Any


class MemoryTracker(TorchDispatchMode):
    """Counts bytes alive, collectives and FLOPs while it is active; see the module's docstring.

    Tensors made before are counted from when :meth:`tag` or an operation's output first shows them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phases: list[PhaseUse] = []
        self.live: dict[str, int] = dict.fromkeys((*KINDS, HOST), 0)
        self.total = 0  # on the device
        self._storages: dict[int, _Storage] = {}
        self._current = PhaseUse("before")
        self._number = 0
        self._new_kind = "working"
        self._is_paused = False

    # ---- phases ----------------------------------------------------------------------------------------------------
    @contextmanager
    def phase(self, name: str) -> Iterator[PhaseUse]:
        """Charge what runs inside to a phase of this name; phases do not nest."""
        self._carry_over()
        before, self._current = self._current, PhaseUse(name)
        self._note_peak("start")
        self.phases.append(self._current)
        try:
            yield self._current
        finally:
            self._current = before

    def start(self, name: str) -> PhaseUse:
        """Charge what runs from here on, outside of phases, to what is returned."""
        self._current = PhaseUse(name)
        self._note_peak("start")
        return self._current

    @contextmanager
    def allocating(self, kind: str) -> Iterator[None]:
        """What is allocated inside is of a kind."""
        before, self._new_kind = self._new_kind, kind
        try:
            yield
        finally:
            self._new_kind = before

    @contextmanager
    def recording(self) -> Iterator[tuple[dict[str, float], PhaseUse]]:
        """What runs inside, to be counted again with :meth:`replay`: bytes by kind before it, and its use."""
        before, outer = self._alive, self._current
        self._current = use = PhaseUse(outer.name)
        try:
            yield before, use
        finally:
            self._current = outer
            self._count_use(before, use, before)

    def replay(self, before: dict[str, float], use: PhaseUse) -> None:
        """Count what was recorded once more, on top of what is alive now.

        Args:
            before: Bytes by kind alive when the recording began.
            use: What was recorded.
        """
        self._count_use(before, use, self._alive)

    def _count_use(self, before: dict[str, float], use: PhaseUse, now: dict[str, float]) -> None:
        for operation, peak in use.peaks.items():
            if self._is_peak(operation, now["total"] + peak["total"] - before["total"]):
                self._current.peaks[operation] = {kind: now[kind] + peak[kind] - before[kind] for kind in peak}
        for kind, number in use.num_collectives.items():
            self._current.num_collectives[kind] += number
        self._current.sent_bytes += use.sent_bytes
        self._current.flops += use.flops

    def tag(self, tensor: Tensor, kind: str) -> None:
        """Say what a tensor's storage is."""
        tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        self._add(tensor, "tag")
        held = self._storages.get(tensor.untyped_storage()._cdata)
        if held is not None and held.kind != kind:
            self._count(held, -1)
            held.kind = kind
            self._count(held, 1)

    def _carry_over(self) -> None:
        self.live["carried"] += self.live["working"]
        self.live["working"] = 0
        self._number += 1

    # ---- every operation -------------------------------------------------------------------------------------------
    def __enter__(self):
        """Start. FSDP frees and refills gathered weights by resizing storages, which no operation shows.

        And DTensor runs each new operation on fake tensors of the whole shape, which takes no memory.
        """
        resize, propagate = torch.UntypedStorage.resize_, ShardingPropagator._propagate_tensor_meta_non_cached
        tracker = self

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            tracker._resized(storage)
            return result

        def propagate_tensor_meta(*args: Any, **kwargs: Any) -> Any:
            before, tracker._is_paused = tracker._is_paused, True
            try:
                return propagate(*args, **kwargs)
            finally:
                tracker._is_paused = before

        self._patches = ExitStack()
        self._patches.enter_context(mock.patch.object(torch.UntypedStorage, "resize_", resize_))
        name = "_propagate_tensor_meta_non_cached"
        self._patches.enter_context(mock.patch.object(ShardingPropagator, name, propagate_tensor_meta))
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        """Stop."""
        self._patches.close()
        super().__exit__(*exception)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run one operation and count what it made."""
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # its operations on local tensors come here instead
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self._is_paused:
            return out
        if func.namespace == "c10d":
            self._note_collective(func, args)
        name = func._schema.name
        for t in tree_iter(out):
            if isinstance(t, Tensor):
                self._add(t, name)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self._current.flops += formula(*args, **kwargs, out_val=out)
        return out

    def _note_collective(self, func: Any, args: tuple) -> None:
        name = func._schema.name.removeprefix("c10d::").strip("_")
        size = max(t.numel() * t.element_size() for t in tree_iter(args[:2]) if isinstance(t, Tensor))
        part = (dist.get_world_size() - 1) / dist.get_world_size()
        self._current.num_collectives[_READABLE.get(name, name)] += 1
        self._current.sent_bytes += size * part * (2 if name == "allreduce" else 1)
        if name == "allgather_base":
            self.tag(args[0], "gathered")

    # ---- storages ----------------------------------------------------------------------------------------------------
    def _add(self, tensor: Tensor, operation: str) -> None:
        if tensor.device.type == "meta" or isinstance(tensor, DTensor) or tensor._is_zerotensor():  # of no memory
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        held = _Storage(storage.nbytes(), self._new_kind, self._number, weakref.ref(storage, lambda _: self._free(key)))
        self._storages[key] = held
        self._count(held, 1)
        self._note_peak(f"{operation} of {held.nbytes} bytes")

    def _free(self, key: int) -> None:
        held = self._storages.pop(key, None)
        if held is not None:
            self._count(held, -1)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        held = self._storages.get(storage._cdata)
        if held is not None and held.nbytes != storage.nbytes():
            self._count(held, -1)
            held.nbytes = storage.nbytes()
            if held.kind == "working":
                held.kind = "gathered"
            self._count(held, 1)
            self._note_peak("resize")

    def _count(self, held: _Storage, sign: int) -> None:
        kind = "carried" if held.kind == "working" and held.phase < self._number else held.kind
        self.live[kind] += sign * held.nbytes
        if kind != HOST:
            self.total += sign * held.nbytes

    def _note_peak(self, operation: str) -> None:
        if self._is_peak(operation, self.total):
            self._current.peaks[operation] = self._alive

    def _is_peak(self, operation: str, total: float) -> bool:
        peak = self._current.peaks.get(operation)
        return peak is None or total > peak["total"]

    @property
    def _alive(self) -> dict[str, float]:
        """Bytes by kind, and in all on the device."""
        return {**self.live, "total": self.total}


_READABLE = {
    "allgather_base": "all-gather",
    "allgather": "all-gather",
    "reduce_scatter_base": "reduce-scatter",
    "reduce_scatter": "reduce-scatter",
    "allreduce": "all-reduce",
}
