"""The ``scalemlo`` command."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from .config import RunConfig
    from .recipes import Recipe

DESCRIPTION = """\
Multilevel optimization of models too large for one device.

  scalemlo train configs/reweight_smollm2.yaml                      one process
  scalemlo train configs/reweight_smollm2.yaml train.steps=20       change any key of the file
  scalemlo check configs/reweight_smollm2.yaml train.batch_size=2   is the hypergradient right, which estimator fits
  torchrun --nproc-per-node 2 -m scalemlo train configs/reweight_smollm2.yaml engine=fsdp
  accelerate launch --config_file launch/cpu_2.yaml -m scalemlo train configs/reweight_smollm2.yaml engine=fsdp
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; by default those of the process.

    Returns:
        Exit status: 0 done, 1 the run failed, 2 the command or configuration is wrong, 130 interrupted.
    """
    parser = argparse.ArgumentParser(
        prog="scalemlo", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="run a recipe from a YAML file", description="Run a recipe.")
    train.add_argument("config", help="YAML file; its key `recipe` names what runs")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the file, such as engine=fsdp")
    check = commands.add_parser(
        "check",
        help="compare hypergradients with exact ones on a recipe's own program",
        description="Build a recipe's program and compare each estimator with the exact hypergradient on its next "
        "batches: cosine, size, CPU-seconds, bytes; and derivatives with a second way to have them. Trains nothing. "
        "Exit status 1 if derivatives disagree.",
    )
    check.add_argument("config", help="YAML file; its key `recipe` names what is checked")
    check.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the file")
    check.add_argument("--warm-up", type=int, default=0, metavar="N", help="outer steps to train before (default 0)")
    assets = commands.add_parser("assets", help="list the models and data that are fetched from PyPI packages")
    assets.set_defaults(config=None, overrides=[])
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if options.command == "assets":
        from .assets import known_assets

        print("\n".join(f"{name:24s} {line}" for name, line in known_assets().items()))
        return 0
    if options.command == "check":
        return _with_recipe(options.config, options.overrides, partial(_check, warm_up=options.warm_up))
    return _with_recipe(options.config, options.overrides, _train)


def run() -> NoReturn:
    """The command as a process: :func:`main`, and then the end of it.

    A rank of several leaves without running the destructors of C++ libraries: gloo's threads are sometimes still there
    when theirs run, and abort a process that has done all it had to ("terminate called without an active exception").

    Raises:
        SystemExit: With the status, where this is the only process.
    """
    status = main()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    raise SystemExit(status)


def _train(recipe: "Recipe", run_config: "RunConfig") -> int:
    return 130 if recipe.run(run_config) else 0


def _check(recipe: "Recipe", run_config: "RunConfig", warm_up: int) -> int:
    from .distributed import is_main_process
    from .reporting import plot_check, print_table

    if warm_up < 0:
        raise ValueError(f"--warm-up {warm_up} must not be negative.")
    program = recipe.build(run_config)
    if warm_up:
        program.run(warm_up)
    report = program.check()
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


def _with_recipe(path: str, overrides: Sequence[str], command: Callable[["Recipe", "RunConfig"], int]) -> int:
    _check_accelerate_started_all()
    from . import config, distributed
    from .recipes import RECIPES

    try:
        run_config = config.load(path, overrides, {name: recipe.config for name, recipe in RECIPES.items()})
    except config.ConfigError as error:
        print(f"scalemlo: {error}", file=sys.stderr)
        return 2
    try:
        distributed.initialize()
        distributed.check_launch(run_config.num_processes)
        return command(RECIPES[run_config.recipe], run_config)
    except ValueError as error:
        print(f"scalemlo: {error}", file=sys.stderr)
        return 2
    finally:
        distributed.shutdown()


def _check_accelerate_started_all() -> None:
    """``accelerate launch --num_processes 2`` starts one process on a machine without GPUs, and says nothing.

    It shows in the environment: accelerate names a rendezvous address only where several processes were asked for.

    Raises:
        SystemExit: If that has happened.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ
    several = any(name in os.environ for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"))
    if launched and not several:
        print(
            "scalemlo: accelerate was asked for several processes but started one, as it does on machines without GPUs."
            " Use `accelerate launch --config_file launch/cpu_2.yaml --num_processes N -m scalemlo ...` or "
            "`torchrun --nproc-per-node N -m scalemlo ...`.",
            file=sys.stderr,
        )
        raise SystemExit(2)
