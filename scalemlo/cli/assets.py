"""List the models and data that are fetched from PyPI packages.

Configurations take their names where they take a hub name or a folder.
"""

from argparse import ArgumentParser, Namespace


def configure(parser: ArgumentParser) -> None:
    """There is nothing to choose."""


def run(options: Namespace) -> int:
    """Print one line per asset."""
    from ..runs.assets import known_assets

    print("\n".join(f"{name:24s} {line}" for name, line in known_assets().items()))
    return 0
