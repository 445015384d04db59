"""Tables and pictures at the end of a run."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ..history import History
from ..loop.check import CheckReport


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table on the terminal."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(header):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    Console(width=None if Console().is_terminal else 120).print(table)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """The same table as Markdown."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]) + "\n"


def phase_table(
    histories: Mapping[str, History], plan: Mapping[str, Any] | None = None, why_not: str = ""
) -> tuple[list[str], list[list[str]], str]:
    """Seconds and bytes per phase of some runs, measured beside planned.

    Args:
        histories: By run.
        plan: What :meth:`scalemlo.recipes.study.plan_beside.PlanBeside.finish` gave; without, there is no column for
            it.
        why_not: Why there is no plan.

    Returns:
        Header, rows, and what is to be said below them.
    """
    header = ["run", "phase", "calls", "seconds", "per call", "peak MiB", *(["planned MiB"] if plan else [])]
    said = f"Not planned: {why_not}." if why_not else ""
    rows = []
    for run, history in histories.items():
        planned, beside = planned_peaks(plan, run, history.resident_at_start)
        if beside:
            said = (
                "Peaks are of the whole process, with the gaps that the C allocator leaves between tensors; the "
                f"planned ones are the program's, and {beside / MIB:.0f} MiB that the process had beside the program's "
                "weights when training began."
            )
        for phase, stats in history.phases.items():
            row = [run, phase, f"{stats.num_calls}", f"{stats.wall_seconds:.1f}"]
            row += [f"{stats.wall_seconds / stats.num_calls:.2f}", f"{stats.peak_bytes / MIB:.0f}"]
            rows.append([*row, f"{planned[phase] / MIB:.0f}" if phase in planned else ""] if plan else row)
    return header, rows, said


def planned_peaks(
    plan: Mapping[str, Any] | None, run: str, resident_at_start: int | None
) -> tuple[dict[str, float], float]:
    """Planned peaks, as they are measured: of the allocator on an accelerator, of the whole process on the CPU.

    Args:
        plan: What :meth:`scalemlo.recipes.study.plan_beside.PlanBeside.finish` gave.
        run: Whose peaks are wanted; those of a run that the plan is not of are not known.
        resident_at_start: See :class:`~scalemlo.history.History`.

    Returns:
        Bytes by phase, and those among them that the process has beside the program.
    """
    if plan is None or plan.get("program", run) != run:
        return {}, 0.0
    beside = max(0.0, resident_at_start - plan["start_bytes"]) if resident_at_start else 0.0
    return {phase: beside + peak for phase, peak in plan["peak_by_phase"].items()}, beside


MIB = 2**20


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under the ROC curve: the probability that a positive example scores above a negative one.

    Args:
        scores: ``[N]``.
        positive: ``[N]``, booleans.

    Returns:
        A number in [0, 1]; NaN if all examples are of one kind.
    """
    from sklearn.metrics import roc_auc_score

    if positive.all() or not positive.any():
        return float("nan")
    return float(roc_auc_score(positive, scores))


def plot_reweighting(
    path: str | Path,
    *,
    weights: np.ndarray,
    corrupted: np.ndarray,
    auroc_value: float,
    losses: Mapping[str, Sequence[float]],
    heldout: Mapping[str, Sequence[tuple[int, float]]],
) -> None:
    """Draw learned weights (clean against corrupted) and loss curves.

    Args:
        path: PNG file.
        weights: ``[N]``, learned weights.
        corrupted: ``[N]``, booleans.
        auroc_value: Shown above the weights.
        losses: Curve name to one value per outer step.
        heldout: Curve name to (outer step, held-out loss) points.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.2), constrained_layout=True)
    bins = np.linspace(float(weights.min()), float(weights.max()) + 1e-9, 30).tolist()
    for kind, mask, color in (("clean", ~corrupted, "#2a7f62"), ("corrupted", corrupted, "#c8553d")):
        left.hist(weights[mask], bins=bins, alpha=0.65, label=f"{kind} ({mask.sum()})", color=color)
    left.set(title=f"Learned weights, AUROC {auroc_value:.3f}", xlabel="weight", ylabel="examples")
    left.legend()
    for name, values in losses.items():
        x = np.arange(1, len(values) + 1)
        (line,) = middle.plot(x, values, alpha=0.25)
        middle.plot(x, _smoothed(values), color=line.get_color(), label=name)
    middle.set(title="Loss per level (smoothed)", xlabel="outer step", ylabel="loss")
    middle.legend()
    for name, points in heldout.items():
        right.plot([x for x, _ in points], [y for _, y in points], marker="o", label=name)
    right.set(title="Held-out loss", xlabel="outer step", ylabel="loss")
    right.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_check(path: str | Path, report: CheckReport) -> None:
    """Draw what each estimator costs and how close it comes.

    Args:
        path: PNG file.
        report: With any number of comparisons.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [c for c in report.comparisons if np.isfinite(c.cosine)]
    hops = list(dict.fromkeys((c.upper, c.lower) for c in rows))
    height = 1.2 + 0.42 * max(1, len(rows))
    figure, axes = plt.subplots(
        max(1, len(hops)), 2, figsize=(12, height), squeeze=False, sharey="row", constrained_layout=True
    )
    for (left, right), hop in zip(axes, hops, strict=False):
        mine = sorted((c for c in rows if (c.upper, c.lower) == hop), key=lambda c: c.cosine)
        names = [textwrap.fill(c.estimator, 42) for c in mine]
        colors = ["#c8553d" if c.is_configured else "#2a7f62" for c in mine]
        cosines = left.barh(names, [c.cosine for c in mine], color=colors)
        left.bar_label(cosines, [f"{c.cosine:.4f}" for c in mine], padding=3, fontsize=8)
        left.set(title=f"{hop[0]} through {hop[1]}: cosine to the exact one", xlim=(min(0.0, mine[0].cosine), 1.15))
        left.tick_params(axis="y", labelsize=8)
        seconds = right.barh(names, [c.cpu_seconds for c in mine], color=colors)
        labels = [f"{c.cpu_seconds:.2f} s, {c.num_hvps} HVPs" for c in mine]
        right.bar_label(seconds, labels, padding=3, fontsize=8)
        right.set(title="CPU-seconds", xlim=(0, 1.35 * max(c.cpu_seconds for c in mine)))
    if not hops:
        axes[0][0].text(0.5, 0.5, "nothing to compare with", ha="center")
    figure.suptitle("The program's own estimator is red", fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _smoothed(values: Sequence[float]) -> np.ndarray:
    """Running mean over about a tenth of the curve, over fewer points at its ends."""
    width = max(1, len(values) // 10)
    kernel = np.ones(width)
    return np.convolve(values, kernel, mode="same") / np.convolve(np.ones(len(values)), kernel, mode="same")
