"""The report of a run: one HTML file, made from the files in the run's folder, that needs no network.

    run.yaml                 configuration and provenance
    summary.json             headline table, a note, held-out losses (written by the recipe)
    weights.csv              learned weight of every example
    plan.json                what was planned, if it was
    NAME/history.csv         losses and norms of one program of the run, step by step
    NAME/phases.json         its seconds and bytes by phase

Every file may be missing; the report has the sections whose files are there.
"""

from pathlib import Path

from .page import page
from .run_folder import RunFolder
from .sections import sections

__all__ = ["write_report"]


def write_report(folder: str | Path) -> Path:
    """Write ``report.html`` into a run's folder.

    Args:
        folder: What the run's ``output_dir`` was.

    Returns:
        The file.
    """
    run = RunFolder.read(Path(folder))
    path = Path(folder) / "report.html"
    path.write_text(page(run.title, run.subtitle, sections(run)), encoding="utf-8")
    return path
