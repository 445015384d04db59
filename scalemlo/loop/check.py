"""Is the hypergradient right, and what does each estimator cost and miss, on the program and batch at hand?

Every estimator is compared with the exact derivative through the lower level's own steps, at the point the program has
reached; and what all of them are made of is compared with a second way to compute it. Nothing is trained: steps that a
comparison needs are undone, bit by bit.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..autodiff.errors import DerivativeError
from ..derivatives.hessian import RetainedHessian, hessian
from ..distributed.group import any_rank, world_size
from ..distributed.shards import Shards
from ..history import peak_bytes, reset_peak_bytes
from ..hypergradients import (
    SAMA,
    ConjugateGradient,
    Hypergradient,
    Identity,
    Neumann,
    Nystrom,
    Unrolled,
    UnrollingHypergradient,
)
from .binding import check_unrolling
from .check_paths import hops_agree, lost_path
from .iteration import Iteration
from .level_trainer import LevelTrainer
from .lower_level import LowerLevel
from .program import Program
from .undo import undone
from .verification import Verification

TOLERANCE = {"fp64": 1e-8, "fp32": 1e-3, "bf16": 2e-1, "fp16": 1e-1}
"""How far two ways to the same number may be apart, relative, by the precision of the computation."""


@dataclass(frozen=True)
class Comparison:
    """One estimator against the exact hypergradient of the level that asks, its response part only.

    Attributes:
        upper: The level whose gradient it is.
        lower: The level that is differentiated through.
        estimator: As one would write it.
        is_configured: Whether it is the program's own.
        cosine: Of the angle to the exact one.
        size_ratio: Its norm over the exact one's; a learning rate can make up for it.
        relative_error: ``|h - exact| / |exact|``.
        num_hvps: Hessian-vector products.
        cpu_seconds: Of this process, upper gradient included.
        peak_growth_bytes: Peak memory over that before.
        note: How it ended, where not as asked for; why it could not run.
    """

    upper: str
    lower: str
    estimator: str
    is_configured: bool
    cosine: float = math.nan
    size_ratio: float = math.nan
    relative_error: float = math.nan
    num_hvps: int = 0
    cpu_seconds: float = math.nan
    peak_growth_bytes: int = 0
    note: str = ""


@dataclass(frozen=True)
class Finding:
    """Two ways to compute one thing.

    Attributes:
        level: Where.
        what: What was compared.
        difference: Relative.
        limit: See :data:`TOLERANCE`.
    """

    level: str
    what: str
    difference: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether they agree."""
        return self.difference <= self.limit


@dataclass
class CheckReport:
    """What :func:`scalemlo.check` found."""

    findings: list[Finding] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether all findings did."""
        return all(finding.passed for finding in self.findings)

    @property
    def verdict(self) -> str:
        """In words: what to believe, and which estimator to take."""
        lines = []
        failed = [f for f in self.findings if not f.passed]
        if failed:
            lines.append("NOT TO BE TRUSTED: " + "; ".join(f"{f.level}: {f.what} ({f.difference:.1e})" for f in failed))
        else:
            worst = max((f.difference for f in self.findings), default=0.0)
            lines.append(f"Derivatives are right: {len(self.findings)} checks agree, the worst to {worst:.1e}.")
        for upper, lower in dict.fromkeys((c.upper, c.lower) for c in self.comparisons):
            lines += self._advice([c for c in self.comparisons if (c.upper, c.lower) == (upper, lower)])
        return "\n".join([*lines, *self.notes])

    def _advice(self, rows: Sequence[Comparison]) -> list[str]:
        lines = []
        hop = f"{rows[0].upper} through {rows[0].lower}"
        own = next((c for c in rows if c.is_configured and not math.isnan(c.cosine)), None)
        if own is not None:
            quality = "close to" if own.cosine > 0.95 else "correlated with" if own.cosine > 0.5 else "far from"
            lines.append(
                f"{hop}: {own.estimator} is {quality} the exact hypergradient (cosine {own.cosine:.4f}, "
                f"{own.size_ratio:.3g} times its size) at {own.cpu_seconds:.2f} CPU-seconds."
            )
            better = [c for c in rows if c.cosine > max(own.cosine + 0.02, 0.9) and not c.is_configured]
            if own.cosine <= 0.95 and better:
                best = min(better, key=lambda c: c.cpu_seconds)
                lines.append(
                    f"  {best.estimator} comes to cosine {best.cosine:.4f} for {best.cpu_seconds:.2f} CPU-seconds."
                )
        return lines

    @property
    def header(self) -> list[str]:
        """Of :attr:`rows`."""
        return ["hop", "estimator", "cosine", "size", "rel. error", "HVPs", "CPU-s", "peak MiB", "note"]

    @property
    def rows(self) -> list[list[object]]:
        """The comparisons as a table; the program's own estimator is marked with *."""
        return [
            [
                f"{c.upper} < {c.lower}",
                ("* " if c.is_configured else "") + c.estimator,
                f"{c.cosine:.6f}",
                f"{c.size_ratio:.4g}",
                f"{c.relative_error:.1e}",
                c.num_hvps,
                f"{c.cpu_seconds:.2f}",
                f"{c.peak_growth_bytes / 2**20:.0f}",
                c.note,
            ]
            for c in self.comparisons
        ]

    def save(self, path: str | Path) -> None:
        """Write everything as JSON."""
        content = {
            "passed": self.passed,
            "verdict": self.verdict,
            "findings": [asdict(f) | {"passed": f.passed} for f in self.findings],
            "comparisons": [asdict(c) for c in self.comparisons],
        }
        Path(path).write_text(json.dumps(content, indent=2) + "\n")


def default_estimators(lower: LevelTrainer) -> list[Hypergradient]:
    """What is compared where nothing else is asked for: cheap, solving and truncated ones."""
    candidates: list[Hypergradient] = [
        Identity(),
        SAMA(),
        Neumann(num_terms=5, preconditioner="optimizer"),
        ConjugateGradient(max_steps=5, tolerance=None, damping=1e-2),
        Nystrom(rank=5, damping=1e-2),
    ]
    if lower.level.unroll_steps > 1:
        candidates.append(Unrolled(num_steps=1))
    return [e for e in candidates if e != lower.estimator]


def check(program: Program, estimators: Sequence[Hypergradient] | None = None) -> CheckReport:
    """Compare estimators of every hop with the exact hypergradient, and derivatives with a second way to have them.

    At the point reached, on the next batches; nothing is trained, weights and states are bit for bit as before. Where a
    lower level's steps cannot be taken again (unknown optimizer, moving levels below it) only the second ways are
    compared. Costs some lower steps and one hypergradient per estimator; collective.

    Args:
        program: Between two outer iterations.
        estimators: What to compare beside the program's own; by default a few of each kind.

    Returns:
        Findings, comparisons, and a verdict in words.
    """
    iteration = program.iteration
    iteration.ticks.require_between_iterations("check()")
    report, gradients = CheckReport(), iteration.gradients
    verification, gradients.verification = gradients.verification, Verification("off", 1)
    try:
        with iteration.scheduler.resident():
            _fill(report, iteration, estimators)
    finally:
        gradients.verification = verification
    return report


def _fill(report: CheckReport, iteration: Iteration, estimators: Sequence[Hypergradient] | None) -> None:
    trainers = iteration.trainers
    before = {name: trainer.weights().clone() for name, trainer in trainers.items()}
    for lower in trainers.values():
        uppers = [trainers[n] for n in iteration.graph.uppers(lower.name)]
        if uppers:
            _Hop(iteration, lower, uppers, report).compare(estimators)
    _check_whole(iteration, report)
    moved = any(not torch.equal(t, trainers[n].weights()[k]) for n, v in before.items() for k, t in v.items())
    report.findings.append(Finding("all levels", "weights are bit for bit as before", float(any_rank(moved)), 0.0))
    if world_size() > 1:
        for trainer in trainers.values():
            if trainer.engine.group is None:
                spread = _spread_over_ranks(trainer.weights())
                report.findings.append(Finding(trainer.name, "all ranks hold the same weights", spread, 0.0))


def _check_whole(iteration: Iteration, report: CheckReport) -> None:
    """Every gradient that goes through levels below, over all its hops and paths."""
    levels = [t for t in iteration.trainers.values() if iteration.graph.depends_on_best_responses(t.name)]
    if not levels:
        return
    with iteration.after_unrolled_steps():
        for level in levels:
            for what, question in (
                ("whole gradient: hops move as live gradients do", hops_agree),
                ("whole gradient: no path is lost", lost_path),
            ):
                answer = question(iteration, level)
                report.findings.append(Finding(level.name, what, 0.0 if answer is None else math.inf, 0.0))
                if answer is not None:
                    report.notes.append(f"{level.name}: {answer}")


class _Hop:
    """All comparisons of one lower level."""

    def __init__(self, iteration: Iteration, lower: LevelTrainer, uppers: Sequence[LevelTrainer], report: CheckReport):
        self.iteration, self.lower, self.uppers, self.report = iteration, lower, uppers, report
        self.gradients = iteration.gradients
        self.asking = [
            t for t in iteration.trainers.values()
            if lower.name in t.depends_on and lower.name in iteration.graph.responding(t.name)
        ]  # fmt: skip
        dtype = next(iter(lower.weights().values())).dtype
        precision = lower.engine.spec.dtype
        self.limit = TOLERANCE["fp64" if precision == "fp32" and dtype == torch.float64 else precision]

    def compare(self, estimators: Sequence[Hypergradient] | None) -> None:
        """Fill the report."""
        own = self.lower.estimator
        others = default_estimators(self.lower) if estimators is None else [e for e in estimators if e != own]
        candidates = [own, *others]
        with undone(list(self.iteration.trainers.values())):
            try:
                self._compare(own, candidates)
            finally:
                self.lower.estimator = own
                self.gradients.clear()

    def _compare(self, own: Hypergradient, candidates: Sequence[Hypergradient]) -> None:
        exact = Unrolled()
        reason = self._why_not(exact)
        num_steps = self.lower.level.unroll_steps
        found: dict[int, dict[str, tuple[Shards, Comparison]]] = {}
        self.lower.estimator = exact
        for position in range(num_steps):
            last = position == num_steps - 1
            self.iteration.ticks.fetch(list(self.iteration.trainers.values()) if last else [self.lower])
            if reason is None:
                self.lower.record_step(position)
            if last:
                self._second_ways()
                for i, estimator in enumerate(candidates):
                    if not isinstance(estimator, UnrollingHypergradient):
                        found[i] = self._measure(estimator, estimator is own)
            self.lower.estimator = exact
            self.gradients.clear()
            if reason is None:
                self.iteration.ticks.update([self.lower])
        if reason is not None:
            self.report.notes.append(f"{self.lower.name}: no exact hypergradient to compare with: {reason}")
            self.report.comparisons += [row for by_level in found.values() for _, row in by_level.values()]
            return
        if num_steps == 1:
            self.report.notes.append(
                f"{self.lower.name}: unroll_steps=1, so exact means the derivative through one step; estimators that "
                "solve with the Hessian answer for the best response instead, and may differ without being wrong."
            )
        whole = self.lower.trajectory
        assert whole is not None
        for i, estimator in enumerate(candidates):
            if isinstance(estimator, UnrollingHypergradient):
                self.lower.trajectory = whole.last(estimator.steps_of(num_steps, self.lower.name))
                found[i] = self._measure(estimator, estimator is own)
        self.lower.trajectory = whole
        reference = self._measure(exact, False)
        self._difference_quotient({name: h for name, (h, _) in reference.items()})
        for i in sorted(found):
            for name, (h, row) in found[i].items():
                self.report.comparisons.append(_against(row, h, reference[name][0]))
        if exact not in candidates:
            for h, row in reference.values():
                self.report.comparisons.append(_against(row, h, h))

    def _why_not(self, exact: Unrolled) -> str | None:
        try:
            check_unrolling(self.iteration.graph, self.lower, exact)
        except ValueError as error:
            return str(error)
        return None

    def _measure(self, estimator: Hypergradient, is_configured: bool) -> dict[str, tuple[Shards, Comparison]]:
        """The response part of the hypergradient of every level that asks."""
        found = {}
        for upper in self.asking:
            row: dict[str, Any] = dict(
                upper=upper.name, lower=self.lower.name, estimator=_written(estimator), is_configured=is_configured
            )
            zero = upper.weights() * 0.0
            self.lower.estimator, self.gradients.record = estimator, {}
            self.gradients.clear()
            device = self.lower.engine.device
            direct = upper.compute_gradient([upper]).gradients[upper.name]
            reset_peak_bytes(device)
            bytes_before, seconds = peak_bytes(device), time.process_time()
            try:
                _, total = self.gradients.hypergradient(upper)
            except (ValueError, DerivativeError) as error:
                found[upper.name] = zero, Comparison(**row, note=str(error).split(". ")[0])
                continue
            found[upper.name] = (
                total - direct,
                Comparison(
                    **row,
                    num_hvps=int(sum(self.gradients.record.get(f"hvps/{self.lower.name}", [0]))),
                    cpu_seconds=time.process_time() - seconds,
                    peak_growth_bytes=max(0, peak_bytes(device) - bytes_before),
                ),
            )
        return found

    # ---- second ways to the same numbers -----------------------------------------------------------------------------
    def _second_ways(self) -> None:
        lower, limit = self.lower, self.limit
        weights = lower.weights()
        gradient = lower.compute_gradient([lower]).gradients[lower.name]
        v = gradient if float(gradient.norm()) > 0.0 else weights.clone()
        plain = lower.loss_at().gradient({lower.name: lower.block})[lower.name]
        self._find("gradient: engine and skeleton", lambda: _distance(plain, gradient), limit)
        blocks = {u.name: u.block for u in self.uppers}
        forward = lower.compute_mixed(v, self.uppers, "forward")
        retained = RetainedHessian(lower.loss_at(), lower.block, blocks)
        reverse, product = retained.mixed(v), retained(v)
        retained.free()
        for name in blocks:
            self._find(
                f"mixed partial by {name}: forward and reverse mode",
                lambda name=name: _distance(forward[name], reverse[name]), limit,
            )  # fmt: skip
        with hessian(lower.loss_at(), lower.block, "remat") as again:
            h_v, h_w = again(v), again(weights)
        self._find("Hessian-vector product: remat and retain", lambda: _distance(h_v, product), limit)
        size = float(h_v.norm() * weights.norm()) + float(h_w.norm() * v.norm())
        asymmetry = abs(float(h_v.dot(weights) - h_w.dot(v))) / max(size, 1e-300)
        self._find("Hessian is symmetric", lambda: asymmetry, limit)

    def _difference_quotient(self, exact: dict[str, Shards]) -> None:
        """The exact hypergradient along itself, against the upper loss after the steps with moved upper parameters.

        In fp64 only: elsewhere rounding of the loss drowns what it would show. Stop-gradients inside modules are not
        held: a module that has them (DoRA) shows here by what they do.
        """
        if self.limit != TOLERANCE["fp64"]:
            return
        for upper in self.asking:
            direction = exact[upper.name]
            size = float(direction.norm())
            if upper not in self.uppers or size == 0.0 or len(self.uppers) > 1:
                continue
            problem = LowerLevel(self.lower, upper, self.uppers, self.gradients.of)
            unit, trajectory = direction * (1 / size), problem.trajectory.held()

            def outcome(radius: float, problem=problem, unit=unit, upper=upper, trajectory=trajectory) -> float:
                state = trajectory.forward((upper.block, upper.weights() + unit * radius))
                return problem.upper_loss.at((problem.block, state.weights)).value()

            radius = 1e-4 * max(float(upper.weights().norm()), 1.0)
            wide = (outcome(radius) - outcome(-radius)) / (2 * radius)
            narrow = (outcome(radius / 2) - outcome(-radius / 2)) / radius
            slope = (4 * narrow - wide) / 3
            self._find(
                f"exact hypergradient of {upper.name}: difference quotient",
                lambda slope=slope, size=size: abs(slope - size) / size, 1e-5,
            )  # fmt: skip

    def _find(self, what: str, difference: Callable[[], float], limit: float) -> None:
        self.report.findings.append(Finding(self.lower.name, what, difference(), limit))


def _against(row: Comparison, h: Shards, exact: Shards) -> Comparison:
    if math.isnan(row.cpu_seconds):
        return row
    size, exact_size = float(h.norm()), float(exact.norm())
    if exact_size == 0.0:
        return replace(row, note="the exact hypergradient is zero")
    return replace(
        row,
        cosine=float(h.dot(exact)) / max(size * exact_size, 1e-300),
        size_ratio=size / exact_size,
        relative_error=float((h - exact).norm()) / exact_size,
    )


def _distance(a: Shards, b: Shards) -> float:
    size = float(b.norm())
    return float((a - b).norm()) / size if size > 0 else float(a.norm())


def _written(estimator: Hypergradient) -> str:
    """Only the fields that differ from their defaults."""
    given = {f.name: getattr(estimator, f.name) for f in fields(estimator) if getattr(estimator, f.name) != f.default}
    return f"{type(estimator).__name__}({', '.join(f'{n}={v!r}' for n, v in given.items())})"


def _spread_over_ranks(weights: Shards) -> float:
    """Largest difference to rank 0 of a replicated vector, over all ranks."""
    worst = torch.zeros(())
    for t in weights.values():
        first = t.clone()
        dist.broadcast(first, 0)
        worst = torch.maximum(worst, (first - t).abs().max().float().cpu())
    return _max_over_ranks(worst.to(next(iter(weights.values())).device))


def _max_over_ranks(x: Tensor) -> float:
    dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return float(x)
