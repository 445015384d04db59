"""What commands on a recipe share: the YAML file, its overrides, and the processes they run in."""

import os
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..recipes import Recipe
    from ..runs.config import RunConfig


def configure_file(parser: ArgumentParser) -> None:
    """Add the file and the overrides."""
    parser.add_argument("config", help="YAML file; `scalemlo cp` copies one that works, to be changed")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="changes to the file, such as engine=fsdp; `scalemlo validate FILE` shows all keys",
    )


def refuse_idle(options: Namespace, names: Sequence[str], where: str) -> None:
    """Refuse options that would be ignored.

    Args:
        options: With an attribute by each name.
        names: Of the options without effect.
        where: When they have none.

    Raises:
        ValueError: If one of them is given.
    """
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) not in (None, False)]
    if given:
        raise ValueError(f"{', '.join(given)} has no effect {where}: leave it out.")


def configure(parser: ArgumentParser) -> None:
    """Add the file, the overrides, and how to launch."""
    from .launcher import configurations

    configure_file(parser)
    parser.add_argument(
        "--launch",
        metavar="NAME",
        help=f"start several processes on this machine: {', '.join(configurations())}; for several machines see "
        "docs/launch.md",
    )
    parser.add_argument(
        "--num-processes",
        type=int,
        metavar="N",
        help="how many --launch starts; by default one per GPU, or two without GPUs",
    )


def run(options: Namespace, command: Callable[["Recipe", "RunConfig"], int], forwarded: Sequence[str] = ()) -> int:
    """Run a command here, or through a launcher.

    Args:
        options: With the arguments of :func:`configure`.
        command: Gets the recipe and its configuration; returns the exit status.
        forwarded: The command's own arguments, for launched processes.

    Returns:
        The exit status.

    Raises:
        ValueError: If the launch is wrong.
        ConfigError: If the configuration is.
    """
    if options.launch is not None:
        from .launcher import launch

        arguments = [options.command, options.config, *options.overrides, *forwarded]
        return launch(options.launch, options.num_processes, arguments)
    if options.num_processes is not None:
        raise ValueError("--num-processes has no effect without --launch; use it with --launch ddp, say.")

    from ..runs.launched import check_all_started

    check_all_started()
    from ..distributed import group as distributed
    from ..recipes import CONFIGS, RECIPES
    from ..runs import config

    try:
        run_config = config.load(options.config, options.overrides, CONFIGS)
    except config.ConfigError:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            return 2  # the same on every rank: one per machine says it
        raise
    try:
        distributed.initialize()
        distributed.check_launch(run_config.num_processes)
        return command(RECIPES[run_config.recipe], run_config)
    finally:
        distributed.shutdown()
