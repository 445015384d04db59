"""Compare hypergradients with exact ones on a recipe's own program.

On the next batches: every estimator against the exact hypergradient (cosine, size, CPU-seconds, bytes), and every
derivative against a second way to compute it. Prints both, and writes check.json and check.png to the file's
output_dir. Trains nothing, but for --warm-up. Exit status 1 if derivatives disagree.
"""

from argparse import ArgumentParser, Namespace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from . import on_recipe

if TYPE_CHECKING:
    from ..recipes import Recipe
    from ..runs.config import RunConfig


def configure(parser: ArgumentParser) -> None:
    """Those of a recipe, and how long to train before."""
    on_recipe.configure(parser)
    parser.add_argument("--warm-up", type=int, default=0, metavar="N", help="outer steps to train first (default 0)")


def run(options: Namespace) -> int:
    """Check.

    Raises:
        ValueError: If the number of steps is negative.
    """
    if options.warm_up < 0:
        raise ValueError(f"--warm-up {options.warm_up} must not be negative.")
    return on_recipe.run(options, partial(_check, warm_up=options.warm_up), ["--warm-up", str(options.warm_up)])


def _check(recipe: "Recipe", run_config: "RunConfig", warm_up: int) -> int:
    from ..distributed.group import is_main_process
    from ..loop.check import check
    from ..reporting.tables import plot_check, print_table

    program = recipe.build(run_config)
    if warm_up:
        program.run(warm_up)
    report = check(program)
    if is_main_process():
        folder = Path(run_config.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        rows = [[f.level, f.what, f"{f.difference:.1e}", f"{f.limit:.0e}", "yes" if f.passed else "NO"]
                for f in report.findings]  # fmt: skip
        print_table("Two ways to the same number", ["level", "what", "difference", "limit", "agree"], rows)
        print_table("Against the exact hypergradient (* the program's own)", report.header, report.rows)
        print(report.verdict)
        report.save(folder / "check.json")
        plot_check(folder / "check.png", report)
        print(f"wrote {folder}/check.json, check.png")
    return 0 if report.passed else 1
