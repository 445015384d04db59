"""Runs the phases of a program: notes their order, and has the states they need on the device within the budget."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from ..distributed.group import any_rank, gather_objects
from ..distributed.ranks import Ranks
from ..engines.kept import KeptWeights
from .budget import Memory
from .interleaving import Interleaving, Order, Part, Sizes, interleave, moved_bytes
from .meter import meter_of
from .owner import Owner, OwnerT
from .phases import Phase, StateName, Timeline, states_of, tensors_of, uses_of
from .residency import Moves, Residency, State
from .sizes import format_bytes

if TYPE_CHECKING:
    from ..engines import Engine


ROOM = 0.9
"""Of what every phase leaves, the part for weights that stay gathered; the rest is for phases that take more later."""

_Key = tuple[int, str, tuple[str, ...]]  # tick, kind, and the levels of a part


class Scheduler:
    """Without a budget: notes the order of phases, and moves nothing."""

    interleaving: Interleaving | None = None
    """The order of levels, once two outer iterations have shown what phases need; never without a budget."""

    def __init__(self) -> None:
        self.timeline = Timeline()

    @property
    def residency(self) -> Residency | None:
        """Which states are on the device; never without a budget."""
        return None

    @property
    def choices(self) -> tuple[str, ...]:
        """What was decided beyond moves, one sentence each."""
        return () if self.interleaving is None else self.interleaving.sentences

    @contextmanager
    def iteration(self) -> Iterator[None]:
        """Context of one outer iteration. Collective."""
        with self.timeline.iteration():
            yield

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Context of phases that run outside of outer iterations, one after the other."""
        yield

    def in_order(self, kind: str, trainers: Sequence[OwnerT]) -> Iterator[OwnerT]:
        """Some levels, one after the other.

        Args:
            kind: What is done with each before the next one is asked for: ``"gradients"`` or ``"steps"``.
            trainers: The levels.

        Yields:
            Each level.
        """
        yield from trainers

    @contextmanager
    def phase(self, trainer: Owner, name: str, asking: Owner | None = None) -> Iterator[Moves]:
        """Context of one phase: what it uses is resident inside.

        Args:
            trainer: Whose phase it is.
            name: Of the phase.
            asking: In a phase that runs the level's estimator, the level whose gradient is being computed.

        Yields:
            What was moved for it.
        """
        self._note(trainer, name, asking)
        yield Moves()

    @contextmanager
    def beside(self, trainer: Owner, asking: Owner | None = None) -> Iterator[None]:
        """Context of what is done now and then and belongs to no phase, with all that a solve of the level uses.

        Within a budget everything else leaves the device for it; what it takes itself is not counted.

        Args:
            trainer: The level.
            asking: The level whose gradient is being computed, if any.
        """
        yield

    def _note(self, trainer: Owner, name: str, asking: Owner | None) -> Phase:
        phase = Phase(self.timeline.tick, trainer.name, name, uses_of(trainer, name, asking))
        self.timeline.note(phase)
        return phase

    @contextmanager
    def resident(self, names: Iterable[StateName] | None = None) -> Iterator[None]:
        """Have some states on the device while inside, whatever is done to them.

        Of one or a few, others make room for them. All at once may exceed the budget, and nothing is evicted then.

        Args:
            names: The states; None for all.

        Yields:
            Nothing.
        """
        yield


def scheduler_of(
    trainers: Mapping[str, Owner],
    device: torch.device,
    below: Mapping[str, set[str]],
    memory: Memory | int | str | None,
) -> Scheduler:
    """The scheduler of a program.

    Args:
        trainers: The levels.
        device: Of this rank.
        below: By level, those that its hypergradient goes through.
        memory: The budget; None moves nothing.

    Returns:
        One that keeps to the budget, if there is one.
    """
    return Scheduler() if memory is None else BudgetScheduler(trainers, device, below, Memory.of(memory, device))


@dataclass
class _Trial:
    """Of an order that has been chosen, until it is known what phases take in it."""

    taken: dict[Phase, int]  # in the given order
    given_bytes: float  # that the given order moves
    exceeds: bool = False  # whether a phase does not fit


class BudgetScheduler(Scheduler):
    """Between two phases, decides what is on the device in the next one.

    Within a budget, a phase has the states it uses, and as many others as leave room for what it takes while it runs,
    which is measured (:mod:`.meter`). A phase that has not run yet has nothing but its own states on the device.

    Args:
        trainers: The levels.
        device: Of this rank.
        below: By level, those that its hypergradient goes through.
        memory: The budget.
    """

    def __init__(
        self,
        trainers: Mapping[str, Owner],
        device: torch.device,
        below: Mapping[str, set[str]],
        memory: Memory,
    ):
        super().__init__()
        self._trainers, self._device, self._below = trainers, device, below
        self._gradient_bytes = {name: trainer.block.shards().nbytes for name, trainer in trainers.items()}
        self._num_iterations = 0
        self._parts: dict[_Key, Part] = {}  # of the outer iteration in hand
        self._orders: dict[_Key, Order] = {}
        self._trial: _Trial | None = None
        self._pinned: Counter[StateName] = Counter()
        self._residency = Residency(memory, device, self._states())
        self._kept = KeptWeights()
        self._spare: dict[Phase, int] = {}  # what the states leave of the budget, by phase of the iteration
        self._room_bytes: int | None = None  # for weights that stay gathered, once it is known
        self._has_new = False  # whether a phase of the iteration is
        for trainer in trainers.values():
            trainer.engine.keep_gathered(self._kept)
        self.meter = meter_of(self.residency, device, self._kept)

    @property
    def residency(self) -> Residency:
        """Which states are on the device."""
        return self._residency

    @property
    def choices(self) -> tuple[str, ...]:
        """What was decided beyond moves: the order of levels, and weights that stay gathered."""
        if self._kept.most_bytes == 0:
            return super().choices
        kept = (
            f"{format_bytes(self._kept.most_bytes)} of weights that derivatives gather as constants are kept while "
            "gradients are taken, not gathered anew by every pass: every phase leaves them room"
        )
        return (*super().choices, kept)

    def _states(self) -> dict[StateName, State]:
        found = {}
        for trainer in self._trainers.values():
            for name in states_of(trainer):
                on_move = trainer.engine.note_residence if name.kind == "weights" else _ignore
                found[name] = State(name, partial(tensors_of, trainer, name.kind), self._device, on_move)
        return found

    # ---- order -------------------------------------------------------------------------------------------------------
    @contextmanager
    def iteration(self) -> Iterator[None]:
        """Context of one outer iteration. After the second one, the order of levels is chosen. Collective."""
        self._parts, self._spare, self._has_new = {}, {}, False
        with super().iteration(), self.meter.run(), self._kept.within(self._room_bytes or 0):
            yield
        self._num_iterations += 1
        if self._trial is not None:
            self._judge(self._trial)
        elif self._num_iterations == 2:
            self._interleave()
        if self._trial is None and not self._has_new and self._room_bytes is None:
            self._agree_on_room()

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Context of phases that run outside of outer iterations, one after the other."""
        with self.meter.run(once=True):
            yield

    def in_order(self, kind: str, trainers: Sequence[OwnerT]) -> Iterator[OwnerT]:
        """Some levels, one after the other, in the order that was chosen for them; else in the given one."""
        by_name = {trainer.name: trainer for trainer in trainers}
        key, work = (self.timeline.tick, kind, tuple(by_name)), {}
        for name in self._orders.get(key, tuple(by_name)):
            before = len(self.timeline.noted)
            yield by_name[name]
            work[name] = self.timeline.noted[before:]
        if work:
            sign = 1 if kind == "gradients" else -1  # a step frees its gradient
            leaves = {name: sign * self._gradient_bytes[name] for name in by_name}
            self._parts[key] = Part(self.timeline.tick, kind, work, leaves)

    def _interleave(self) -> None:
        """Choose an order to try: what phases take in it is measured in the next iteration."""
        found = interleave(list(self._parts.values()), self._below, self._sizes())
        found = Ranks().from_main(found)  # sizes may differ by rank, orders must not
        self.interleaving = found
        self._orders = dict(zip(self._parts, found.orders, strict=True))
        if found.sentences:
            self._trial = _Trial(self.meter.forget(), found.given_bytes)

    def _judge(self, trial: _Trial) -> None:
        """After an iteration in the chosen order: back to the given one where that fits, or moves less, after all."""
        if self._parts.keys() != self._orders.keys():  # updates were skipped
            return
        self._trial, parts = None, list(self._parts.values())
        moved = moved_bytes(parts, [tuple(part.work) for part in parts], self._sizes())
        is_less = Ranks().from_main(moved < trial.given_bytes)
        if any_rank(trial.exceeds) or not is_less:
            self._orders, self.interleaving, self.meter.taken = {}, None, trial.taken

    def _sizes(self) -> Sizes:
        fixed = sum(state.fixed_bytes for state in self.residency.states.values())
        states = {name: state.num_bytes for name, state in self.residency.states.items()}
        return Sizes(states, self.meter.taken, self.residency.memory.device_bytes - fixed)

    # ---- phases ----------------------------------------------------------------------------------------------------
    @contextmanager
    def phase(self, trainer: Owner, name: str, asking: Owner | None = None) -> Iterator[Moves]:
        """Context of one phase: what it uses is resident inside.

        A ``ValueError`` where it does not fit the budget: on all ranks, where that is found when it first runs.

        Yields:
            What was moved for it.
        """
        phase = self._note(trainer, name, asking)
        if not phase.uses:
            with self.meter.paused():
                yield Moves()
            return
        is_new = phase not in self.meter.taken
        if is_new:
            self._close_room()
        elif phase.name == "step":
            self._kept.clear()
        is_checked = is_new or self.meter.is_watching
        with self._holding(phase.uses):
            moves = Ranks().together(partial(self._enter_checked, phase)) if is_checked else self._enter(phase)
            if not is_new and phase.name != "step":
                spare = self.residency.memory.device_bytes - self.residency.resident_bytes
                self._spare[phase] = min(spare, self._spare.get(phase, spare))
            with self.meter.phase(phase):
                yield moves
            if is_checked:
                Ranks().together(partial(self._check_fits, phase))

    @contextmanager
    def beside(self, trainer: Owner, asking: Owner | None = None) -> Iterator[None]:
        """See :meth:`Scheduler.beside`."""
        uses = uses_of(trainer, "verify", asking)
        self._kept.clear()
        with self._holding(uses), self.meter.paused():
            self._bring(uses, float("inf"))
            yield

    def _enter_checked(self, phase: Phase) -> Moves:
        self._check_fits(phase)
        return self._enter(phase)

    def _enter(self, phase: Phase) -> Moves:
        taken = self.meter.taken.get(phase)
        kept = 0 if phase.name == "step" else self._kept.room_bytes
        room = float("inf") if taken is None else taken + kept
        moves = self._bring(phase.uses, room)
        if taken is not None and self._device.type != "cpu":
            following = self.timeline.next_phase()
            if following in self.meter.taken:
                room = max(taken, self.meter.taken[following]) + kept
                ahead = self.residency.prefetch(following.uses, room)
                moves.num_bytes += ahead
        return moves

    def _bring(self, names: Iterable[StateName], room_bytes: float) -> Moves:
        return self.residency.bring(tuple(names), room_bytes, self.timeline.next_use, self._pinned)

    @contextmanager
    def _holding(self, names: Iterable[StateName]) -> Iterator[None]:
        """Not to be evicted while inside; what grew or was replaced there is found at the end."""
        names = tuple(names)
        self._pinned.update(names)
        try:
            yield
        finally:
            self._pinned.subtract(names)
            self._pinned += Counter()  # drops zeros
            self.residency.rescan_made(names)

    # ---- weights that stay gathered ----------------------------------------------------------------------------------
    def _agree_on_room(self) -> None:
        """What every phase left, on all ranks, is room for weights in the iterations to come."""
        left = [spare - self.meter.taken[phase] for phase, spare in self._spare.items()]
        self._room_bytes = max(0, int(ROOM * min(gather_objects(min(left, default=0)))))

    def _close_room(self) -> None:
        """A phase is new: until all are known again, nothing is kept."""
        self._has_new, self._room_bytes, self._kept.room_bytes = True, None, 0
        self._kept.clear()

    # ---- what does not fit -------------------------------------------------------------------------------------------
    def _check_fits(self, phase: Phase) -> None:
        residency, budget = self.residency, self.residency.memory.device_bytes
        states = residency.needed_bytes(phase.uses)
        unit, unit_bytes = self._largest_unit(phase)
        taken = self.meter.taken.get(phase, unit_bytes)
        if states + taken <= budget:
            return
        if self._trial is not None:
            self._trial.exceeds = True
            return
        if phase in self.meter.taken:
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
        """Have some states on the device while inside, whatever is done to them: see :class:`Scheduler`."""
        chosen = tuple(self.residency.states if names is None else names)
        room = max(self.meter.taken.values(), default=float("inf"))
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
