"""The commands of ``scalemlo``, one file each.

A command is a module: its docstring is its help (the first line in the list of commands), ``configure(parser)`` adds
its arguments, and ``run(options)`` does it and returns the exit status. A :class:`ValueError` that it raises is printed
as one line and ends with status 2. Modules import what is slow inside ``run``, so that ``--help`` is quick.
"""

from argparse import ArgumentParser, Namespace
from typing import Protocol

from . import assets, check, convert, cp, env, ls, plan, report, train, validate


class Command(Protocol):
    """What the module of a command has."""

    def configure(self, parser: ArgumentParser) -> None:
        """Add the arguments."""

    def run(self, options: Namespace) -> int:
        """Do it; returns the exit status."""


COMMANDS: dict[str, Command] = {
    "train": train,
    "validate": validate,
    "plan": plan,
    "check": check,
    "report": report,
    "convert": convert,
    "ls": ls,
    "cp": cp,
    "assets": assets,
    "env": env,
}
"""Command by name, in the order of the help."""
