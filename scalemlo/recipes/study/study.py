"""A method beside its baselines: every arm with every seed, mean and spread, as table, picture and JSON.

A recipe names its arms, functions that train one program (or several) with one seed and say how well it did. What an
arm finds is kept as soon as it is found, so that a comparison that was interrupted goes on with the arms that are left.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from ...distributed.group import is_main_process
from ...distributed.ranks import Ranks
from ...level import Level
from ...loop.program import Callback, Program
from ...reporting.tables import markdown_table, print_table
from ...runs import config as cfg
from ...runs.provenance import PACKAGES, device_name, versions
from .picture import draw_comparison

VALIDATION = "validation"
"""Name of the score by which :meth:`Cell.train` picks the best moment; higher is better."""


@dataclass(kw_only=True)
class ComparisonConfig(cfg.RunConfig):
    """What the configurations of comparisons share.

    Args:
        num_seeds: How often every arm runs, with the seeds ``seed``, ``seed + 1`` and so on.
        resume: Whether to keep what an earlier, interrupted run of the same configuration has found.
        plan: Must be false: several programs run, of which ``scalemlo plan`` plans the method's.

    Raises:
        ValueError: If ``num_seeds`` is not positive, or a plan beside the run is asked for.
    """

    num_seeds: int = 3
    resume: bool = False
    plan: bool = False

    def __post_init__(self) -> None:
        if self.num_seeds < 1:
            raise ValueError(f"num_seeds={self.num_seeds} must be at least 1")
        if self.plan:
            raise ValueError("plan=True has no effect here, as several programs run; use the command `scalemlo plan`")


C = TypeVar("C", bound=ComparisonConfig)


@dataclass(frozen=True)
class Outcome:
    """What an arm found with one seed.

    Attributes:
        scores: By name; the first one is drawn.
        arrays: What the recipe's picture is drawn from, by name.
    """

    scores: Mapping[str, float]
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)


class Interrupted(Exception):
    """Ctrl-C or SIGTERM came while an arm ran."""


@dataclass
class Cell(Generic[C]):
    """One arm with one seed.

    Attributes:
        config: The configuration.
        arm: Its name.
        seed: For everything that is drawn; torch's generator has it when the arm begins.
        cpu_seconds: Of this process, in :meth:`train`.
        outer_steps: Taken in :meth:`train`.
    """

    config: C
    arm: str
    seed: int
    cpu_seconds: float = 0.0
    outer_steps: int = 0

    def program(self, levels: Sequence[Level]) -> Program:
        """A program of some levels, with the engine of the configuration and the seed of the cell."""
        config = self.config
        return Program(levels, engine=config.engine.build(), seed=self.seed, **config.program_options())

    def train(
        self,
        program: Program,
        steps: int,
        evaluate: Callable[[], Mapping[str, float]] | None = None,
        *,
        every: int | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> dict[str, float]:
        """Train a program.

        Args:
            program: The program.
            steps: Outer steps.
            evaluate: Scores at this moment. Where they have one named :data:`VALIDATION`, it picks the best moment, and
                is no score of the result. Collective.
            every: Outer steps between two evaluations; None evaluates at the end only.
            callbacks: Called after every outer step, before it is evaluated.

        Returns:
            The last scores, and for each one, where a moment was picked, ``"<name>, best"`` at that moment.

        Raises:
            Interrupted: If the run was.
        """
        found: list[dict[str, float]] = []

        def look(program: Program, record: Mapping[str, float]) -> None:
            if evaluate is not None and (program.num_steps == steps or every and program.num_steps % every == 0):
                found.append(dict(evaluate()))

        start, steps_before = time.process_time(), program.num_steps
        history = program.run(steps, callbacks=[*callbacks, look, self.config.tracker(f"{self.arm} {self.seed}")])
        self.cpu_seconds += time.process_time() - start
        self.outer_steps += program.num_steps - steps_before
        if history.interrupted:
            raise Interrupted
        if not found:
            return {}
        last = {name: value for name, value in found[-1].items() if name != VALIDATION}
        if VALIDATION not in found[-1]:
            return last
        best = max(found, key=lambda scores: scores[VALIDATION])
        return last | {f"{name}, best": best[name] for name in last}


Arm = Callable[[Cell[Any]], Outcome]
Outcomes = Mapping[str, Sequence[Outcome]]
"""By arm, one for each seed."""


class Comparison:
    """Runs the arms of a recipe and reports.

    Args:
        config: The configuration.
        arms: By name, baselines first.
        draw: ``draw(axes, outcomes)`` draws what the recipe is about beside the scores.
        smaller_is_better: Whether the first score is a loss.
    """

    def __init__(
        self,
        config: ComparisonConfig,
        arms: Mapping[str, Arm],
        draw: Callable[[Any, Outcomes], None] | None = None,
        *,
        smaller_is_better: bool = False,
    ):
        self._config, self._arms, self._draw, self._smaller = config, arms, draw, smaller_is_better
        self._folder = Path(config.output_dir)
        self._outcomes: dict[str, list[Outcome]] = {arm: [] for arm in arms}
        self._costs: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}

    def run(self) -> bool:
        """Every arm with the first seed, then with the second one, and so on.

        Returns:
            Whether it was interrupted; what was found until then is kept and reported.
        """
        config = self._config
        if is_main_process():
            (self._folder / "cells").mkdir(parents=True, exist_ok=True)
            cfg.save(config, self._folder / "run.yaml")
        interrupted = False
        try:
            for seed in range(config.seed, config.seed + config.num_seeds):
                for arm in self._arms:
                    self._run_cell(Cell(config, arm, seed))
        except Interrupted:
            interrupted = True
        if is_main_process() and any(self._outcomes.values()):
            self._report()
        return interrupted

    def _run_cell(self, cell: Cell) -> None:
        outcome, cost = Ranks().from_main(Ranks().on_main(lambda: self._kept(cell))) or (None, None)
        if outcome is None or cost is None:
            if is_main_process():
                print(f"{cell.arm}, seed {cell.seed}", flush=True)
            torch.manual_seed(cell.seed)
            outcome = self._arms[cell.arm](cell)
            cost = {"cpu_seconds": cell.cpu_seconds, "outer_steps": float(cell.outer_steps)}
            if is_main_process():
                self._keep(cell, outcome, cost)
        self._outcomes[cell.arm].append(outcome)
        self._costs[cell.arm].append(cost)

    # ---- what was found, on disk -------------------------------------------------------------------------------------
    def _path(self, cell: Cell) -> Path:
        return self._folder / "cells" / f"{cell.arm.replace(' ', '_').replace('/', '_')}-{cell.seed}.json"

    def _asked(self) -> dict[str, Any]:
        """The configuration as far as it decides what a cell finds."""
        free = ("output_dir", "seed", "num_seeds", "resume", "provenance", "report_to")
        return {key: value for key, value in cfg.plain(self._config).items() if key not in free}

    def _keep(self, cell: Cell, outcome: Outcome, cost: Mapping[str, float]) -> None:
        path = self._path(cell)
        np.savez(path.with_suffix(".npz"), **outcome.arrays)  # ty: ignore[invalid-argument-type]  # none is `allow_pickle`
        whole = {"config": self._asked(), "scores": dict(outcome.scores), "cost": dict(cost)}
        path.with_suffix(".tmp").write_text(json.dumps(whole, indent=2))
        path.with_suffix(".tmp").rename(path)

    def _kept(self, cell: Cell) -> tuple[Outcome, dict[str, float]] | None:
        path = self._path(cell)
        if not self._config.resume or not path.is_file():
            return None
        whole = json.loads(path.read_text())
        if whole["config"] != self._asked():
            raise ValueError(
                f"resume=True: {path} is of another configuration. Give another output_dir, or resume=false to start "
                "anew."
            )
        with np.load(path.with_suffix(".npz")) as arrays:
            return Outcome(whole["scores"], dict(arrays)), whole["cost"]

    # ---- the report --------------------------------------------------------------------------------------------------
    def _report(self) -> None:
        done = {arm: found for arm, found in self._outcomes.items() if found}
        names = list(dict.fromkeys(name for found in done.values() for one in found for name in one.scores))
        header = ["arm", *names, "outer steps", "CPU-s"]
        rows = []
        for arm, found in done.items():
            scores = [[one.scores[name] for one in found if name in one.scores] for name in names]
            costs = [np.mean([cost[key] for cost in self._costs[arm]]) for key in ("outer_steps", "cpu_seconds")]
            rows.append([arm, *map(spread, scores), f"{costs[0]:.0f}", f"{costs[1]:.1f}"])
        seeds = max(map(len, done.values()))
        print_table(f"Mean and standard deviation over {seeds} seed(s)", header, rows)
        (self._folder / "report.md").write_text(markdown_table(header, rows))
        result = {
            "recipe": self._config.recipe,
            "seeds": [self._config.seed + i for i in range(seeds)],
            "arms": {arm: {n: [o.scores.get(n) for o in found] for n in names} for arm, found in done.items()},
            "costs": {arm: self._costs[arm] for arm in done},
            "header": header,
            "rows": rows,
            "config": self._asked(),
            "device": device_name(),
            "versions": versions(PACKAGES),
        }
        (self._folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
        first = {arm: [one.scores[names[0]] for one in found if names[0] in one.scores] for arm, found in done.items()}
        own = self._draw
        draw = None if own is None else lambda axes: own(axes, done)
        draw_comparison(self._folder / "result.png", names[0], first, draw, smaller_is_better=self._smaller)
        print(f"wrote {self._folder}/result.png, result.json, report.md")


def compared(
    arms: Mapping[str, Arm], draw: Callable[..., None] | None = None, *, smaller_is_better: bool = False
) -> Callable[[Any], bool]:
    """What a recipe runs: all arms of a configuration.

    Args:
        arms: See :class:`Comparison`.
        draw: See :class:`Comparison`.
        smaller_is_better: See :class:`Comparison`.

    Returns:
        A function of the configuration; it returns whether Ctrl-C ended it early.
    """
    return lambda config: Comparison(config, arms, draw, smaller_is_better=smaller_is_better).run()


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation, to four digits or the digits that the spread leaves; empty for no values."""
    if not values:
        return ""
    mean = float(np.mean(values))
    if len(values) == 1:
        return f"{mean:.4g}"
    deviation = float(np.std(values, ddof=1))
    digits = 1 if abs(mean) >= 10 else 3
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"
