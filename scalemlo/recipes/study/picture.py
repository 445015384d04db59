"""The picture of a comparison: a dot for every seed of every arm, and what the recipe is about."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

BASELINE, METHOD, INK = "#8a8f98", "#2a7f62", "#333333"


def draw_comparison(
    path: Path,
    score: str,
    values: Mapping[str, Sequence[float]],
    draw: Callable[[Any], None] | None,
    *,
    smaller_is_better: bool,
) -> None:
    """Draw it.

    Args:
        path: PNG file.
        score: Name of what is compared.
        values: By arm, one for each seed; the arm with the best mean is green.
        draw: Draws on a second axis; None leaves it out.
        smaller_is_better: Whether the score is a loss.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = {arm: found for arm, found in values.items() if found}
    means = {arm: float(np.mean(found)) for arm, found in shown.items()}
    best = (min if smaller_is_better else max)(means, key=means.__getitem__) if means else None
    columns = 1 if draw is None else 2
    height = max(3.2, 1.4 + 0.45 * len(shown))
    figure, axes = plt.subplots(1, columns, figsize=(6.2 * columns, height), squeeze=False, constrained_layout=True)
    left = axes[0][0]
    for row, (arm, found) in enumerate(reversed(shown.items())):
        color = METHOD if arm == best else BASELINE
        left.scatter(found, [row] * len(found), color=color, alpha=0.55, s=42, zorder=3, linewidths=0)
        left.plot([means[arm]] * 2, [row - 0.28, row + 0.28], color=color, linewidth=2.5, zorder=4)
        left.annotate(
            f"{means[arm]:.3g}", (means[arm], row + 0.32), ha="center", va="bottom", fontsize=8, color=INK
        )  # fmt: skip
    left.set_yticks(range(len(shown)), list(reversed(shown)))
    left.set_ylim(-0.6, len(shown) - 0.2)
    left.margins(x=0.12)
    better = "smaller" if smaller_is_better else "larger"
    left.set_title(f"{score} ({better} is better): seeds and their mean", fontsize=10, loc="left")
    left.grid(axis="x", color="#e3e5e8", zorder=0)
    for side in ("top", "right", "left"):
        left.spines[side].set_visible(False)
    left.tick_params(axis="y", length=0)
    if draw is not None:
        draw(axes[0][1])
    figure.savefig(path, dpi=110)
    plt.close(figure)
