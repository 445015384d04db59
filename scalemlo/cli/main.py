"""The ``scalemlo`` command: parses and dispatches; the commands themselves are in :mod:`scalemlo.cli`."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from ..versions import __version__
from . import COMMANDS

DESCRIPTION = """\
Multilevel optimization of models too large for one device.

  scalemlo train configs/reweight_smollm2.yaml                      one process
  scalemlo train configs/reweight_smollm2.yaml train.steps=20       change any key of the file
  scalemlo train configs/reweight_smollm2.yaml --launch zero3       one process per GPU, sharded by ZeRO-3
  scalemlo check configs/reweight_smollm2.yaml train.batch_size=2   is the hypergradient right, which estimator fits

The same under a launcher of your own:
  torchrun --nproc-per-node 2 -m scalemlo train configs/reweight_smollm2.yaml engine=fsdp
  accelerate launch --config_file launch/zero3.yaml -m scalemlo train configs/reweight_smollm2.yaml

Several machines, SLURM, and who chooses the engine: docs/launch.md. `scalemlo COMMAND --help` explains a command.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; by default those of the process.

    Returns:
        Exit status: 0 done, 1 the run failed, 2 the command or configuration is wrong, 130 interrupted.
    """
    options = _parse(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        return COMMANDS[options.command].run(options)
    except ValueError as error:
        notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()))
        print(f"scalemlo: {error}{notes}", file=sys.stderr)
        return 2


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


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="scalemlo", description=DESCRIPTION, formatter_class=raw)
    # The deepspeed launcher adds it to its process's arguments; LOCAL_RANK, which it also sets, is what counts.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"scalemlo {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        text = command.__doc__ or ""
        help_ = text.partition("\n")[0].rstrip(".")
        command.configure(commands.add_parser(name, help=help_, description=text, formatter_class=raw))
    options, rest = parser.parse_known_args(argv)
    # argparse takes no positional arguments after options: `train run.yaml --launch fsdp train.steps=2`.
    if rest and (not hasattr(options, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    return options
