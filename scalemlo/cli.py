"""The ``scalemlo`` command."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence

DESCRIPTION = """\
Multilevel optimization of models too large for one device.

  scalemlo train configs/reweight_smollm2.yaml                      one process
  scalemlo train configs/reweight_smollm2.yaml train.steps=20       change any key of the file
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
    assets = commands.add_parser("assets", help="list the models and data that are fetched from PyPI packages")
    assets.set_defaults(config=None, overrides=[])
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if options.command == "assets":
        from .assets import known_assets

        print("\n".join(f"{name:24s} {line}" for name, line in known_assets().items()))
        return 0
    return _train(options.config, options.overrides)


def _train(path: str, overrides: Sequence[str]) -> int:
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
        interrupted = RECIPES[run_config.recipe].run(run_config)
    except ValueError as error:
        print(f"scalemlo: {error}", file=sys.stderr)
        return 2
    finally:
        distributed.shutdown()
    return 130 if interrupted else 0


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
