"""Write the report of a run again, from the files in its folder.

Makes FOLDER/report.html of a run of reweight_instructions: losses, weights, hypergradients, time and memory,
configuration and versions, in one file that needs no network. Other recipes write report.md and result.png themselves.
"""

from argparse import ArgumentParser, Namespace


def configure(parser: ArgumentParser) -> None:
    """Which run."""
    parser.add_argument("folder", help="the run's output_dir")


def run(options: Namespace) -> int:
    """Write it."""
    from ..reporting import write_report

    print(f"wrote {write_report(options.folder)}")
    return 0
