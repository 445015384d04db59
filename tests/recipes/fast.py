"""Runs a recipe's configuration on a few steps, in this process."""

import json
import tempfile
from pathlib import Path

from scalemlo.cli import main as cli

CONFIGS = Path(__file__).parents[2] / "configs"


def run_fast(name: str, *overrides: str) -> dict:
    """Train `configs/NAME.yaml` with overrides; return its result.json."""
    with tempfile.TemporaryDirectory() as folder:
        status = cli.main(["train", str(CONFIGS / f"{name}.yaml"), f"output_dir={folder}", "num_seeds=1", *overrides])
        assert not status
        assert (Path(folder) / "result.png").is_file()
        return json.loads((Path(folder) / "result.json").read_text())
