"""Pictures of plans."""

from collections.abc import Sequence
from pathlib import Path

from ..memory.bytes_tracker import KINDS
from .plan import Plan

COLORS = dict(zip(KINDS, ("#22577a", "#38a3a5", "#8ac926", "#b5838d", "#f4a259", "#ffca3a", "#c8553d"), strict=True))


def plot_phases(path: str | Path, plan: Plan) -> None:
    """Phases across, bytes at each one's peak stacked by kind, the budget as a line.

    Args:
        path: PNG file.
        plan: The plan.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    width = max(7.0, 0.9 * len(plan.phases))
    figure, axis = plt.subplots(figsize=(width, 5), constrained_layout=True)
    positions = range(len(plan.phases))
    bottom = [0.0] * len(plan.phases)
    for kind in KINDS:
        sizes = [phase.peak.get(kind, 0) / 2**30 for phase in plan.phases]
        if any(sizes):
            axis.bar(positions, sizes, bottom=bottom, width=0.9, label=kind, color=COLORS[kind])
        bottom = [a + b for a, b in zip(bottom, sizes, strict=True)]
    if plan.device_memory is not None:
        axis.axhline(plan.device_memory / 2**30, color="black", linestyle="--", label="device memory")
    if plan.memory is not None:
        budget = plan.memory.device_bytes / 2**30
        axis.axhline(budget, color="gray", linestyle=":", label="memory budget, without batches")
    axis.set_xticks(positions, [p.name.replace("/", "\n", 1) for p in plan.phases], rotation=60, ha="right", fontsize=8)
    axis.set(ylabel="GiB per rank", title=f"Peak of each phase of an outer iteration, {plan.world_size} ranks")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_sweep(path: str | Path, plans: Sequence[Plan]) -> None:
    """Peak and persistent bytes against the number of ranks.

    Args:
        path: PNG file.
        plans: One per number of ranks.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6.5, 4.5), constrained_layout=True)
    ranks = [plan.world_size for plan in plans]
    axis.plot(ranks, [plan.peak_bytes / 2**30 for plan in plans], marker="o", label="peak", color="#c8553d")
    persistent = [plan.persistent_bytes / 2**30 for plan in plans]
    axis.plot(ranks, persistent, marker="o", label="persistent", color="#22577a")
    if plans[0].device_memory is not None:
        axis.axhline(plans[0].device_memory / 2**30, color="black", linestyle="--", label="device memory")
    axis.set_xscale("log", base=2)
    axis.set_xticks(ranks, [str(n) for n in ranks])
    axis.set(xlabel="ranks", ylabel="GiB per rank", ylim=(0, None))
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
