"""Which level stands above which and which gradient passes through which, read from the signatures of the losses."""

import difflib
import heapq
import inspect
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from typing import Any

from .level import Level


class Upper(Any):  # to type checkers what a loss reads, a module, has any attribute
    """Annotation of a loss parameter: that level stands above this one, whatever the order in the program."""


class Lower(Any):
    """Annotation of a loss parameter: that level stands below this one, whatever the order in the program."""


@dataclass(frozen=True)
class Hop:
    """One level on the way of a hypergradient, and where its part goes.

    Attributes:
        name: The level that is differentiated through.
        onward: Levels that its loss depends on and that get a part of the gradient: the one whose gradient it is, or
            levels whose best response depends on that one.
        back: Of those, the levels whose best response depends on this one too. They have been passed already; what
            goes to them now is what they answer while this level stays where it is.
    """

    name: str
    onward: tuple[str, ...]
    back: tuple[str, ...]


class LevelGraph:
    """Order, dependencies and hypergradient paths of a program's levels.

    A loss depends on the levels that it names, and on every level that owns a part of a module which it runs: its own
    level's, or one that it reads. Of the latter no name is needed in the signature.

    Args:
        levels: Top to bottom. The order decides which of two levels stands above; annotations with :class:`Upper` and
            :class:`Lower` override it.

    Raises:
        ValueError: For duplicate or unknown names, cycles, levels that no other level reads, or options that cannot
            have an effect.
    """

    def __init__(self, levels: Sequence[Level]):
        if not levels:
            raise ValueError("a program needs at least one level.")
        self._levels = {level.name: level for level in levels}
        if len(self._levels) < len(levels):
            names = [level.name for level in levels]
            raise ValueError(
                f"level names must differ; twice there: {sorted({n for n in names if names.count(n) > 1})}."
            )
        self._reads_batch: dict[str, bool] = {}
        self._named: dict[str, list[str]] = {name: [] for name in self._levels}
        self._uppers: dict[str, list[str]] = {name: [] for name in self._levels}
        self._lowers: dict[str, list[str]] = {name: [] for name in self._levels}
        for level in levels:
            self._read_signature(level)
        self._add_owners_of_shared_modules()
        self.order = self._sorted()
        self._check_everyone_is_read()
        self._check_options()

    @property
    def levels(self) -> list[Level]:
        """All levels, upper ones first."""
        return [self._levels[name] for name in self.order]

    def reads(self, name: str) -> list[str]:
        """The levels that the loss of ``name`` names: it is called with their modules."""
        return self._named[name]

    def reads_batch(self, name: str) -> bool:
        """Whether the loss has a parameter ``batch``."""
        return self._reads_batch[name]

    def uppers(self, name: str) -> list[str]:
        """Levels above that the loss of ``name`` depends on directly, and so does its best response."""
        return self._uppers[name]

    def lowers(self, name: str) -> list[str]:
        """Levels below that the loss of ``name`` depends on directly: on their best responses."""
        return self._lowers[name]

    def responding(self, name: str, fixed: Collection[str] = ()) -> set[str]:
        """Levels whose best response depends on ``name``, through any number of levels.

        A level below answers ``name`` if its loss depends on ``name``, or on a level that answers it, which may stand
        above it or below.

        Args:
            name: The level.
            fixed: Levels that stay where they are, whatever happens to ``name``.

        Returns:
            Their names; all come later in :attr:`order`.
        """
        return set(self._responding(name, frozenset(fixed)))

    def ancestors(self, name: str) -> set[str]:
        """Levels that the best response of ``name`` depends on, through any number of hops."""
        return {other for other in self.order if name in self.responding(other)}

    def depends_on_best_responses(self, name: str) -> bool:
        """Whether the gradient of ``name`` has a part that goes through a lower level."""
        return not self.responding(name).isdisjoint(self._lowers[name])

    def hops(self, name: str, fixed: Sequence[str] = ()) -> tuple[Hop, ...]:
        """The levels that the hypergradient of ``name`` passes through, in the order in which it does.

        A level comes after all levels that answer it, whose part of the gradient goes on to it; and before those levels
        that its loss reads and that do not answer it.

        Args:
            name: The level whose gradient it is.
            fixed: Levels that stay where they are, one inside the other; then the hops alone that answer the last of
                them: all others are taken outside.

        Returns:
            One hop per level.
        """
        return self._hops(name, tuple(fixed))

    def below(self, name: str) -> list[str]:
        """Levels directly below: those that read ``name`` as upper or that it reads as lower."""
        return [n for n in self.order if name in self._uppers[n] or n in self._lowers[name]]

    def period(self, name: str) -> int:
        """Ticks between two steps of a level; a level with none below steps at every tick."""
        return math.lcm(*(self.period(n) * self._levels[n].unroll_steps for n in self.below(name)))

    @property
    def ticks_per_step(self) -> int:
        """Ticks of one outer iteration: each level steps at least once."""
        return math.lcm(*(self.period(name) for name in self.order))

    @cache  # noqa: B019  # a graph lives as long as its program
    def _responding(self, name: str, fixed: frozenset[str]) -> frozenset[str]:
        later = [n for n in self.order[self.order.index(name) + 1 :] if n not in fixed]
        found: set[str] = set()
        while True:
            more = {n for n in later if n not in found and not found.union((name,)).isdisjoint(self._depends(n))}
            if not more:
                return frozenset(found)
            found |= more

    @cache  # noqa: B019
    def _hops(self, name: str, fixed: tuple[str, ...]) -> tuple[Hop, ...]:
        gradient = self.responding(name, fixed)
        passed = gradient & self.responding(fixed[-1], fixed[:-1]) if fixed else gradient
        answers = {level: self.responding(level, fixed) for level in passed}
        before: dict[str, set[str]] = {level: answers[level] & passed for level in passed}
        for level in passed:
            for other in self._reached(level, passed) - answers[level]:
                if self.order.index(other) > self.order.index(level):
                    before[other].add(level)
        hops = []
        for level in TopologicalSorter(before).static_order():
            onward = [n for n in self._depends(level) if (n == name or n in gradient) and n not in fixed]
            hops.append(Hop(level, tuple(onward), tuple(n for n in onward if n in answers[level])))
        return tuple(hops)

    def _reached(self, name: str, within: Collection[str]) -> set[str]:
        """Levels that one comes to from ``name`` by what losses depend on, through levels ``within``."""
        found: set[str] = set()
        pending = [name]
        while pending:
            for other in self._depends(pending.pop()):
                if other in within and other not in found:
                    found.add(other)
                    pending.append(other)
        return found - {name}

    def _depends(self, name: str) -> list[str]:
        return self._uppers[name] + self._lowers[name]

    def _read_signature(self, level: Level) -> None:
        position = {name: i for i, name in enumerate(self._levels)}
        self._reads_batch[level.name] = False
        for parameter in inspect.signature(level.loss_function, eval_str=True).parameters.values():
            if parameter.name == level.name and level.reads_itself:
                continue
            if parameter.name == "batch":
                self._reads_batch[level.name] = True
                continue
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise ValueError(
                    f"level {level.name!r}: loss must name the levels it reads; *{parameter.name} says nothing."
                )
            other = parameter.name
            if other not in self._levels:
                close = difflib.get_close_matches(other, self._levels, n=1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise ValueError(
                    f"level {level.name!r}: its loss reads {other!r}, which is no level; levels are "
                    f"{list(self._levels)}.{hint} The batch must be called 'batch'."
                )
            if other == level.name:
                raise ValueError(f"level {level.name!r} reads itself; use self.module.")
            if parameter.annotation in (Upper, Lower):
                above = parameter.annotation is Upper
            else:
                above = position[other] < position[level.name]
            self._named[level.name].append(other)
            (self._uppers if above else self._lowers)[level.name].append(other)

    def _add_owners_of_shared_modules(self) -> None:
        """A loss that runs a module depends on all levels that own a part of it, named or not."""
        order = self._sorted()
        for name in self._levels:
            run = {id(self._levels[n]._module) for n in (name, *self._named[name])}
            for other in order:
                if other != name and other not in self._depends(name) and id(self._levels[other]._module) in run:
                    above = order.index(other) < order.index(name)
                    (self._uppers if above else self._lowers)[name].append(other)

    def _sorted(self) -> list[str]:
        """Upper levels first; in the order given where nothing says which of two stands above."""
        above: dict[str, set[str]] = {name: set(self._uppers[name]) for name in self._levels}
        for name in self._levels:
            for lower in self._lowers[name]:
                above[lower].add(name)
        position = {name: i for i, name in enumerate(self._levels)}
        sorter = TopologicalSorter(above)
        try:
            sorter.prepare()
        except CycleError as error:
            cycle = " above ".join(error.args[1])
            raise ValueError(
                f"the levels stand above each other in a circle: {cycle}. Check the annotations Upper and Lower "
                "of their losses."
            ) from None
        order: list[str] = []
        ready: list[tuple[int, str]] = []
        while sorter.is_active():
            for name in sorter.get_ready():
                heapq.heappush(ready, (position[name], name))
            order.append(heapq.heappop(ready)[1])
            sorter.done(order[-1])
        return order

    def _check_everyone_is_read(self) -> None:
        if len(self._levels) == 1:
            return
        read = {other for name in self._levels for other in self._depends(name)}
        idle = [name for name in self.order if name not in read]
        if idle:
            raise ValueError(
                f"no loss reads level(s) {idle}: they have no effect on the others. Add the name to the parameters of "
                "the loss that depends on it, or leave the level out."
            )

    def _check_options(self) -> None:
        for level in self.levels:
            if level.hypergradient is not None and not self.ancestors(level.name):
                raise ValueError(
                    f"level {level.name!r}: hypergradient={level.hypergradient!r} has no effect, since its best "
                    "response depends on no other level: its loss reads no level above, nor one below that does. Set "
                    "it on the lower level, the one that is differentiated through."
                )
            above = [n for n in self.order if level.name in self.below(n)]
            if level.unroll_steps > 1 and not above:
                raise ValueError(
                    f"level {level.name!r}: unroll_steps={level.unroll_steps} has no effect: no level stands above."
                )
            if self._reads_batch[level.name] and level.data is None:
                raise ValueError(f"level {level.name!r}: loss reads a batch, but data is None.")
            if not self._reads_batch[level.name] and level.data is not None:
                raise ValueError(f"level {level.name!r}: data is given, but loss has no parameter 'batch'.")
