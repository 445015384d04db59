"""Runs the phases of a program: notes their order, and has the states they need on the device within the budget."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch

from ..ranks import Ranks
from ..tracking import peak_bytes
from .interleaving import Interleaving, Order, Part, Sizes, interleave
from .memory import Memory
from .phases import Phase, StateName, Timeline, states_of, tensors_of, uses_of
from .residency import Moves, Residency, State
from .sizes import format_bytes
from .tracker import KIND_OF_STATE, MemoryTracker

if TYPE_CHECKING:
    from ..engines import Engine
    from ..training import LevelTrainer


_Key = tuple[int, str, tuple[str, ...]]  # tick, kind, and the levels of a part


class Scheduler:
    """Between two phases, decides what is on the device in the next one.

    Within a budget, a phase has the states it uses, and as many others as leave room for what it takes while it runs.
    That is measured: on an accelerator whenever it runs, by the allocator; on the CPU the first time, by tracking every
    operation. A phase that has not run yet has nothing but its own states on the device.

    Args:
        trainers: The levels.
        device: Of this rank.
        below: By level, those that its hypergradient goes through.
        memory: The budget; None moves nothing.
    """

    def __init__(
        self,
        trainers: Mapping[str, "LevelTrainer"],
        device: torch.device,
        below: Mapping[str, set[str]],
        memory: Memory | int | str | None = None,
    ):
        self.timeline = Timeline()
        self.transient_bytes: dict[Phase, int] = {}
        """What a phase takes beside the states, at its peak: its own, and what earlier phases left for later ones."""
        self.residency: Residency | None = None
        self.interleaving: Interleaving | None = None
        """The order of levels, once two outer iterations have shown what phases need; never without a budget."""
        self._trainers, self._device, self._below = trainers, device, below
        self._num_iterations = 0
        self._parts: dict[_Key, Part] = {}  # of the outer iteration in hand
        self._orders: dict[_Key, Order] = {}
        self._pinned: Counter[StateName] = Counter()
        self._tracker: MemoryTracker | None = None
        if memory is not None:
            self._tracker = MemoryTracker() if device.type == "cpu" else None
            self.residency = Residency(Memory.of(memory, device), device, self._states())

    def _states(self) -> dict[StateName, State]:
        found = {}
        for trainer in self._trainers.values():
            for name in states_of(trainer):
                on_move = partial(setattr, trainer.engine, "is_resident") if name.kind == "weights" else _ignore
                found[name] = State(name, partial(tensors_of, trainer, name.kind), self._device, on_move)
        return found

    # ---- order -------------------------------------------------------------------------------------------------------
    @contextmanager
    def iteration(self) -> Iterator[None]:
        """Context of one outer iteration. After the second one, the order of levels is chosen. Collective."""
        self._parts = {}
        with self.timeline.iteration():
            yield
        self._num_iterations += 1
        if self.residency is not None and self._num_iterations == 2:
            self._interleave(self.residency)

    def in_order(self, kind: str, trainers: Sequence["LevelTrainer"]) -> Iterator["LevelTrainer"]:
        """Some levels, one after the other, in the order that was chosen for them; else in the given one.

        Args:
            kind: What is done with each before the next one is asked for: ``"gradients"`` or ``"steps"``.
            trainers: The levels.

        Yields:
            Each level.
        """
        by_name = {trainer.name: trainer for trainer in trainers}
        key, work = (self.timeline.tick, kind, tuple(by_name)), {}
        for name in self._orders.get(key, tuple(by_name)):
            before = len(self.timeline.noted)
            yield by_name[name]
            work[name] = self.timeline.noted[before:]
        if work:
            self._parts[key] = Part(self.timeline.tick, kind, {name: work[name] for name in by_name})

    def _interleave(self, residency: Residency) -> None:
        fixed = sum(state.fixed_bytes for state in residency.states.values())
        states = {name: state.num_bytes for name, state in residency.states.items()}
        phases = [phase for part in self._parts.values() for work in part.work.values() for phase in work]
        room = {phase: self.transient_bytes.get(phase, 0) for phase in phases}
        parts = list(self._parts.values())
        found = interleave(parts, self._below, Sizes(states, room, residency.memory.device_bytes - fixed))
        self.interleaving = found = Ranks().from_main(found)  # sizes may differ by rank, orders must not
        self._orders = dict(zip(self._parts, found.orders, strict=True))
        for part, order in zip(parts, found.orders, strict=True):
            if order != tuple(part.work):  # what earlier phases leave for later ones is another: measured anew
                for phase in (phase for work in part.work.values() for phase in work):
                    self.transient_bytes.pop(phase, None)

    # ---- phases ----------------------------------------------------------------------------------------------------
    @contextmanager
    def phase(self, trainer: "LevelTrainer", name: str, asking: "LevelTrainer | None" = None) -> Iterator[Moves]:
        """Context of one phase: what it uses is resident inside.

        A ``ValueError`` where it does not fit the budget: on all ranks, where that is found when it first runs.

        Args:
            trainer: Whose phase it is.
            name: Of the phase.
            asking: In a phase that runs the level's estimator, the level whose gradient is being computed.

        Yields:
            What was moved for it.
        """
        phase = Phase(self.timeline.tick, trainer.name, name, uses_of(trainer, name, asking))
        self.timeline.note(phase)
        if self.residency is None or not phase.uses:
            yield Moves()
            return
        is_new = phase not in self.transient_bytes
        with self._holding(phase.uses):
            moves = Ranks().together(partial(self._enter_first, phase)) if is_new else self._enter(phase)
            with self._measured(phase, is_new=is_new):
                yield moves
            if is_new:
                Ranks().together(partial(self._check_fits, phase))

    def _enter_first(self, phase: Phase) -> Moves:
        self._check_fits(phase)
        return self._enter(phase)

    def _enter(self, phase: Phase) -> Moves:
        assert self.residency is not None
        taken = self.transient_bytes.get(phase)
        room = float("inf") if taken is None else taken
        moves = self._bring(phase.uses, room)
        if taken is not None and self._tracker is None:
            following = self.timeline.next_phase()
            if following in self.transient_bytes:
                ahead = self.residency.prefetch(following.uses, max(taken, self.transient_bytes[following]))
                moves.num_bytes += ahead
        return moves

    def _bring(self, names: Iterable[StateName], room_bytes: float) -> Moves:
        assert self.residency is not None
        return self.residency.bring(tuple(names), room_bytes, self.timeline.next_use, self._pinned)

    @contextmanager
    def _holding(self, names: Iterable[StateName]) -> Iterator[None]:
        """Not to be evicted while inside; what grew or was replaced there is found at the end."""
        assert self.residency is not None
        names = tuple(names)
        self._pinned.update(names)
        try:
            yield
        finally:
            self._pinned.subtract(names)
            self._pinned += Counter()  # drops zeros
            self._rescan(names)

    def _rescan(self, names: Iterable[StateName]) -> None:
        """Find what a phase may have made or dropped; the storages of weights stay."""
        assert self.residency is not None
        self.residency.rescan([name for name in names if name.kind != "weights"])

    # ---- what a phase takes ------------------------------------------------------------------------------------------
    @contextmanager
    def _measured(self, phase: Phase, *, is_new: bool) -> Iterator[None]:
        """Note the peak of what runs inside, without the states, nor what they grew by."""
        assert self.residency is not None
        if self._tracker is None:
            yield
            self._rescan(phase.uses)
            taken = peak_bytes(self._device) - self.residency.resident_bytes
        elif is_new:
            before = self.residency.needed_bytes(self.residency.states)
            self._tag_states()
            with self._tracker, self._tracker.phase(f"{phase.level}/{phase.name}") as seen:
                yield
            self._tag_states()
            self._rescan(phase.uses)
            grown = self.residency.needed_bytes(self.residency.states) - before
            taken = int(seen.peak_bytes - seen.persistent_bytes) - max(grown, 0)
        else:
            yield
            return
        self.transient_bytes[phase] = max(taken, self.transient_bytes.get(phase, 0))

    def _tag_states(self) -> None:
        """Tell the tracker what persists: what is there now, and what the phase has made, before it is evicted."""
        assert self._tracker is not None and self.residency is not None
        for state in self.residency.states.values():
            for tensor in state.tensors() if state.is_resident else ():
                self._tracker.tag(tensor, KIND_OF_STATE[state.name.kind])

    # ---- what does not fit -------------------------------------------------------------------------------------------
    def _check_fits(self, phase: Phase) -> None:
        assert self.residency is not None
        residency, budget = self.residency, self.residency.memory.device_bytes
        states = residency.needed_bytes(phase.uses)
        unit, unit_bytes = self._largest_unit(phase)
        taken = self.transient_bytes.get(phase, unit_bytes)
        if states + taken <= budget:
            return
        if phase in self.transient_bytes:
            beside = f" and takes {format_bytes(taken)} more while it runs (measured)"
            beside += f", {format_bytes(unit_bytes)} of them for its largest gathered block {unit!r}" if unit else ""
        else:
            beside = f" and gathers {unit!r}, its largest block: {format_bytes(unit_bytes)}" if unit else ""
        held = ", ".join(f"{name} ({format_bytes(residency.states[name].num_bytes)})" for name in phase.uses)
        raise ValueError(
            f"{phase} does not fit memory={format_bytes(budget)}: it needs {held}{beside}; with what never moves, "
            f"{format_bytes(states + taken)} in all. Raise the budget, shard over more ranks (engine=FSDP()), or take "
            "smaller batches with more gradient_accumulation_steps."
        )

    def _largest_unit(self, phase: Phase) -> tuple[str, int]:
        """Name and bytes of the largest block that the phase gathers; none where parameters are whole, or it steps."""
        engines = {t.engine.name: t.engine for t in self._trainers.values() if t.engine.group is not None}
        read = [engines[n.owner] for n in phase.uses if n.kind == "weights" and n.owner in engines]
        units = [unit for engine in read if phase.name != "step" for unit in _gathered_units(engine)]
        return max(units, key=lambda unit: unit[1], default=("", 0))

    # ---- outside of phases -------------------------------------------------------------------------------------------
    @contextmanager
    def resident(self, names: Iterable[StateName] | None = None) -> Iterator[None]:
        """Have some states on the device while inside, whatever is done to them.

        Of one or a few, others make room for them. All at once may exceed the budget, and nothing is evicted then.

        Args:
            names: The states; None for all.

        Yields:
            Nothing.
        """
        if self.residency is None:
            yield
            return
        chosen = tuple(self.residency.states if names is None else names)
        room = max(self.transient_bytes.values(), default=float("inf"))
        with self._holding(chosen):
            self._bring(chosen, room)
            yield


def _gathered_units(engine: "Engine") -> Iterator[tuple[str, int]]:
    for unit in engine.skeleton.units:
        parameters = [engine.parameters[name] for name in unit.names]
        dtype = engine.spec.compute_dtype
        size = sum(p.numel() * (dtype.itemsize if dtype else p.element_size()) for p in parameters)
        yield unit.name or "(root)", size


def _ignore(is_resident: bool) -> None:
    return None
