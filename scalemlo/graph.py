"""Which level stands above which, read from the signatures of the losses."""

import difflib
import inspect
import math
from collections.abc import Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Any

from .level import Level


class Upper(Any):  # to type checkers what a loss reads, a module, has any attribute
    """Annotation of a loss parameter: that level stands above this one, whatever the order in the program."""


class Lower(Any):
    """Annotation of a loss parameter: that level stands below this one, whatever the order in the program."""


class LevelGraph:
    """Order, dependencies and hypergradient paths of a program's levels.

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
        self._uppers: dict[str, list[str]] = {name: [] for name in self._levels}
        self._lowers: dict[str, list[str]] = {name: [] for name in self._levels}
        for level in levels:
            self._read_signature(level)
        self.order = self._sorted()
        self._check_everyone_is_read()
        self._check_options()

    @property
    def levels(self) -> list[Level]:
        """All levels, upper ones first."""
        return [self._levels[name] for name in self.order]

    def reads(self, name: str) -> list[str]:
        """All levels whose modules the loss of ``name`` reads."""
        return self._uppers[name] + self._lowers[name]

    def reads_batch(self, name: str) -> bool:
        """Whether the loss has a parameter ``batch``."""
        return self._reads_batch[name]

    def uppers(self, name: str) -> list[str]:
        """Levels above that the loss of ``name`` reads: its best response depends on them."""
        return self._uppers[name]

    def lowers(self, name: str) -> list[str]:
        """Levels below that the loss of ``name`` reads: it depends on their best responses."""
        return self._lowers[name]

    def ancestors(self, name: str) -> set[str]:
        """Levels that the best response of ``name`` depends on, through any number of hops."""
        found: set[str] = set()
        pending = list(self._uppers[name])
        while pending:
            upper = pending.pop()
            if upper not in found:
                found.add(upper)
                pending += self._uppers[upper]
        return found

    def depends_on_best_responses(self, name: str) -> bool:
        """Whether the gradient of ``name`` has a part that goes through a lower level."""
        return any(name in self.ancestors(lower) for lower in self._lowers[name])

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

    def _read_signature(self, level: Level) -> None:
        position = {name: i for i, name in enumerate(self._levels)}
        self._reads_batch[level.name] = False
        for parameter in inspect.signature(level.loss, eval_str=True).parameters.values():
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
            (self._uppers if above else self._lowers)[level.name].append(other)

    def _sorted(self) -> list[str]:
        sorter: TopologicalSorter[str] = TopologicalSorter({name: [] for name in self._levels})
        for name in self._levels:
            for upper in self._uppers[name]:
                sorter.add(name, upper)
            for lower in self._lowers[name]:
                sorter.add(lower, name)
        try:
            return list(sorter.static_order())
        except CycleError as error:
            cycle = " above ".join(error.args[1])
            raise ValueError(
                f"the levels stand above each other in a circle: {cycle}. Check the annotations Upper and Lower "
                "of their losses."
            ) from None

    def _check_everyone_is_read(self) -> None:
        if len(self._levels) == 1:
            return
        read = {other for name in self._levels for other in self.reads(name)}
        idle = [name for name in self.order if name not in read]
        if idle:
            raise ValueError(
                f"no loss reads level(s) {idle}: they have no effect on the others. Add the name to the parameters of "
                "the loss that depends on it, or leave the level out."
            )

    def _check_options(self) -> None:
        for level in self.levels:
            if level.hypergradient is not None and not self._uppers[level.name]:
                raise ValueError(
                    f"level {level.name!r}: hypergradient={level.hypergradient!r} has no effect, since its loss reads "
                    "no level above. Set it on the lower level, the one that is differentiated through."
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
