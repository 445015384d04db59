"""The order of levels within an outer iteration, chosen so that fewer bytes move within a memory budget.

Mathematics leaves some of it open. All gradients of one update are taken at one point, so levels may take theirs in any
order in which a level comes before those that its hypergradient goes through (their gradients come out of the same
passes); and all steps are taken with gradients that are there already, so they have no order at all. Every choice gives
the same bits. Decisions about what is evicted are those of :mod:`.residency`, here on sizes alone.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

from .phases import Phase, StateName
from .sizes import format_bytes

MAX_LEVELS = 6
"""Up to so many levels all orders of a part are compared; beyond, the given one and its reverse."""
MAX_PHASES = 200
"""Where an outer iteration has more phases, again the given order and its reverse."""


@dataclass(frozen=True)
class Part:
    """A part of an outer iteration whose levels may change places: the gradients of one update, or its steps.

    Attributes:
        tick: Of the outer iteration, from 1.
        kind: ``"gradients"`` or ``"steps"``.
        work: The phases of each level, in the order in which they ran.
        leaves: Bytes that each level's work leaves for later phases; negative for what it frees.
    """

    tick: int
    kind: str
    work: Mapping[str, tuple[Phase, ...]]
    leaves: Mapping[str, int]


Order = tuple[str, ...]
"""Names of levels."""


@dataclass(frozen=True)
class Sizes:
    """What evictions depend on.

    Attributes:
        states: Bytes by state.
        room: What each phase takes beside the states, in the order given.
        budget: Bytes for states that move and for what phases take.
    """

    states: Mapping[StateName, int]
    room: Mapping[Phase, int]
    budget: float


@dataclass(frozen=True)
class Interleaving:
    """Orders of the parts of an outer iteration.

    Attributes:
        orders: One for each part.
        sentences: What was changed, and why.
        given_bytes: What an iteration in the order given moves.
    """

    orders: tuple[Order, ...]
    sentences: tuple[str, ...]
    given_bytes: float


def moved_bytes(parts: Sequence[Part], orders: Sequence[Order], sizes: Sizes) -> float:
    """Bytes that one outer iteration moves, after one that came before: farthest next use is evicted first.

    Args:
        parts: In the order of the outer iteration.
        orders: Of the levels of each.
        sizes: Of states and phases.

    Returns:
        Onto the device and off it; infinite where a phase does not fit.
    """
    needing = [(phase, room) for phase, room in _run(parts, orders, sizes) if phase.uses]
    uses: dict[StateName, list[int]] = {}
    for i, (phase, _) in enumerate(needing):
        for name in phase.uses:
            uses.setdefault(name, []).append(i)

    def next_use(name: StateName, now: int) -> int:
        return min((i - now - 1) % len(needing) for i in uses[name])

    resident: dict[StateName, None] = {}
    held = moved = 0
    for i, (phase, room) in enumerate(needing * 2):
        now, counts = i % len(needing), i >= len(needing)
        if sum(sizes.states[name] for name in phase.uses) + room > sizes.budget:
            return math.inf
        missing = [name for name in phase.uses if name not in resident]
        wanted = sum(sizes.states[name] for name in missing)
        victims = sorted((n for n in resident if n not in phase.uses), key=lambda name: next_use(name, now))
        while victims and held > sizes.budget - wanted - room:
            size = sizes.states[victims[-1]]
            del resident[victims.pop()]
            held, moved = held - size, moved + size * counts
        resident |= dict.fromkeys(missing)
        held, moved = held + wanted, moved + wanted * counts
    return moved


def _run(parts: Sequence[Part], orders: Sequence[Order], sizes: Sizes) -> Iterator[tuple[Phase, int]]:
    """Phases in some order, with what each takes in it: its own, and what those before it left."""
    for part, order in zip(parts, orders, strict=True):
        left_before, left = {}, 0  # in the order given
        for level in part.work:
            left_before[level], left = left, left + part.leaves[level]
        left = 0
        for level in order:
            for phase in part.work[level]:
                yield phase, sizes.room.get(phase, 0) + left - left_before[level]
            left += part.leaves[level]


def interleave(parts: Sequence[Part], below: Mapping[str, set[str]], sizes: Sizes) -> Interleaving:
    """Choose orders, part after part: of each the one with which the whole iteration moves the fewest bytes.

    Args:
        parts: In the order of the outer iteration.
        below: By level, those that its hypergradient goes through.
        sizes: Of states and phases.

    Returns:
        The orders. Where none is better, the given one stays.
    """
    orders = [tuple(part.work) for part in parts]
    given_bytes = least = before = moved_bytes(parts, orders, sizes)
    is_small = sum(len(work) for part in parts for work in part.work.values()) <= MAX_PHASES
    sentences = []
    for i, part in enumerate(parts):
        given = orders[i]
        for order in _orders(part, below, exhaustive=is_small and len(given) <= MAX_LEVELS):
            tried = [*orders[:i], order, *orders[i + 1 :]]
            found = moved_bytes(parts, tried, sizes)
            if found < least:
                least, orders = found, tried
        if orders[i] != given:
            instead = f"instead of {format_bytes(before)}" if before < math.inf else "and every phase fits"
            sentences.append(
                f"{part.kind} at tick {part.tick}: {', '.join(orders[i])} (given: {', '.join(given)}); the iteration "
                f"then moves {format_bytes(least)} {instead}"
            )
            before = least
    return Interleaving(tuple(orders), tuple(sentences), given_bytes)


def _orders(part: Part, below: Mapping[str, set[str]], *, exhaustive: bool) -> Iterator[Order]:
    given = tuple(part.work)
    for order in permutations(given) if exhaustive else (given[::-1],):
        if part.kind == "steps" or not any(
            earlier in below[later] for i, later in enumerate(order) for earlier in order[:i]
        ):
            yield order
