"""Write the report of a run again, from the files in its folder.

One HTML file that needs no network: losses, weights, hypergradients, time and memory, configuration and versions.
"""

from argparse import ArgumentParser, Namespace


def configure(parser: ArgumentParser) -> None:
    """Which run."""
    parser.add_argument("folder", help="what the run's output_dir was")


def run(options: Namespace) -> int:
    """Write it."""
    from ..report import write_report

    print(f"wrote {write_report(options.folder)}")
    return 0
