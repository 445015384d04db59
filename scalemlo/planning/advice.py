"""What would make a plan fit: single changes first, then pairs, each simulated."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from .plan import Plan


@dataclass(frozen=True)
class Change:
    """One change of a run.

    Attributes:
        overrides: Keys of the configuration and their new values.
        factor_of_ranks: What to multiply the number of ranks with.
    """

    overrides: tuple[tuple[str, object], ...] = ()
    factor_of_ranks: int = 1

    @property
    def keys(self) -> frozenset[str]:
        """What it touches; changes are combined only where they touch different things."""
        return frozenset(key for key, _ in self.overrides) | ({"ranks"} if self.factor_of_ranks > 1 else set())

    def __add__(self, other: "Change") -> "Change":
        return Change(self.overrides + other.overrides, self.factor_of_ranks * other.factor_of_ranks)

    def describe(self, world_size: int) -> str:
        """As arguments of the command."""
        words = [f"{key}={value}" for key, value in self.overrides]
        if self.factor_of_ranks > 1:
            words.append(f"--world-size {world_size * self.factor_of_ranks}")
        return " ".join(words)


@dataclass(frozen=True)
class Advice:
    """A change, and the plan with it."""

    change: Change
    plan: Plan


def possible_changes(config: Any, world_size: int) -> list[Change]:
    """Changes that a configuration leaves open, the smallest first.

    Args:
        config: Of a recipe; sections and keys that it lacks give no changes.
        world_size: Number of ranks.

    Returns:
        Changes, each valid by itself.
    """
    found = []
    if getattr(config.hypergradient, "products", "remat") != "remat":
        found.append(Change((("hypergradient.products", "remat"),)))
    if getattr(config.hypergradient, "mixed", None) == "auto":
        found.append(Change((("hypergradient.mixed", "forward"),)))
    train = getattr(config, "train", None)
    size = getattr(train, "batch_size", 1)
    if train is not None and size % (2 * world_size) == 0:
        steps = 2 * train.gradient_accumulation_steps
        halves = [("train.batch_size", size // 2), ("train.gradient_accumulation_steps", steps)]
        if getattr(train, "weight_normalization", "dataset") != "dataset":
            halves.append(("train.weight_normalization", "dataset"))
        found.append(Change(tuple(halves)))
    if config.engine.type in ("auto", "single", "ddp") and world_size > 1:
        found.append(Change((("engine.type", "fsdp"),)))
    if getattr(config.engine, "dtype", None) == "fp32":
        found.append(Change((("engine.dtype", "bf16"),)))
    if all(n % (2 * world_size) == 0 for n in (size, getattr(train, "meta_batch_size", 0))):
        found.append(Change(factor_of_ranks=2))
    return found


def cheapest_fit(simulate: Callable[[Change], Plan], changes: Sequence[Change]) -> tuple[Advice | None, list[Advice]]:
    """The change that fits with the least time: of single ones, or where none fits of pairs.

    Args:
        simulate: Plans the run with a change; a ``ValueError`` leaves the change out.
        changes: Candidates.

    Returns:
        The best, if any, and everything that was tried.
    """
    tried: list[Advice] = []
    pairs = [a + b for a, b in combinations(changes, 2) if not a.keys & b.keys]
    for candidates in (changes, pairs):
        for change in candidates:
            try:
                tried.append(Advice(change, simulate(change)))
            except ValueError:
                continue
        fitting = [advice for advice in tried if advice.plan.fits]
        if fitting:
            return min(fitting, key=lambda advice: advice.plan.seconds), tried
    return None, tried


def say(advice: Advice | None, tried: Sequence[Advice], before: Plan) -> str:
    """The advice in words.

    Args:
        advice: The best change, if any.
        tried: All that were simulated.
        before: The plan without changes.

    Returns:
        One or several lines.
    """
    if advice is None:
        if not tried:
            return "No change of this configuration is known that takes less."
        closest = min(tried, key=lambda a: a.plan.peak_bytes)
        what = closest.change.describe(before.world_size)
        return f"None of {len(tried)} changes fits; the closest is {what}: it {closest.plan.verdict}"
    what, ratio = advice.change.describe(before.world_size), advice.plan.seconds / before.seconds
    return f"With {what} it {advice.plan.verdict} It takes {ratio:.2f} of the time (estimate)."


def overridden(overrides: Sequence[str], change: Change) -> list[str]:
    """``key=value`` words with a change applied; later words win."""
    extra: Mapping[str, object] = dict(change.overrides)
    return [*overrides, *(f"{key}={value}" for key, value in extra.items())]
