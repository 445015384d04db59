"""A program in words: its levels, how often each steps, how large it is and how it is held."""

from dataclasses import fields

from ..engines import ENGINES, EngineSpec
from .iteration import Iteration
from .level_trainer import LevelTrainer


def table_of(iteration: Iteration) -> str:
    """One line per level: module, trained parameters, optimizer, engine, period, and what differentiates through it.

    Args:
        iteration: The program at work.

    Returns:
        Lines of columns.
    """
    rows = [_row(iteration, trainer) for trainer in iteration.trainers.values()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(f"  {line.rstrip()}" for line in lines)


def _row(iteration: Iteration, trainer: LevelTrainer) -> tuple[str, ...]:
    engine, name = trainer.engine, trainer.name
    size = sum(engine.shape(n).numel() for n in trainer.block.names)
    below = [n for n in iteration.graph.order if name in iteration.graph.ancestors(n)]
    counts = {n: iteration.trainers[n].level.unroll_steps for n in below}
    words = [f"every {counts[n]} steps of {n}" for n in below if counts[n] > 1]
    if reads := iteration.graph.reads(name):
        words.append(f"reads {', '.join(reads)}")
    if iteration.graph.uppers(name):
        words.append(f"through it: {trainer.estimator!r}")
    kind = type(trainer.optimizer).__name__
    return name, type(engine.module).__name__, f"{size:,} parameters", kind, _name_of(engine.spec), "; ".join(words)


def _name_of(spec: EngineSpec) -> str:
    """The engine, and of its fields those that are not at their defaults."""
    changed = [f"{f.name}={value!r}" for f in fields(spec) if (value := getattr(spec, f.name)) != f.default]
    name = next(name for name, kind in ENGINES.items() if kind is type(spec)) if type(spec) in ENGINES.values() else ""
    return " ".join([name or type(spec).__name__, *changed])
