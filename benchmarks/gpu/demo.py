"""The demo recipe in a few steps: a stage of the kit. Skipped where its model or its data are not on this machine.

python benchmarks/gpu/demo.py train.steps=10 output_dir=DIR
"""

import importlib.util
import json
import shutil
import sys
import time
from pathlib import Path

from results import say

CONFIG = Path(__file__).parents[2] / "configs" / "reweight_smollm2.yaml"
ASSETS = ("smollm2-135m-instruct", "alpaca_en_demo")
NEEDS = ("omegaconf", "pydantic", "rich", "matplotlib", "peft", "pandas", "sklearn")


def obstacle() -> str | None:
    """Why the demo cannot run without a network."""
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    from scalemlo.runs import assets

    absent = [n for n in ASSETS if not (assets.cache_dir() / assets._ASSETS[n].package.folder).is_dir()]
    if absent:
        where = f"copy them there from a machine with a network, or fetch them with `make demo`: {assets.cache_dir()}"
        return f"{' and '.join(absent)} are not in the cache of assets; {where}"
    return None


def main() -> int:
    """Train, and say what came of it."""
    why = obstacle()
    if why is not None:
        say(skipped=["demo", why])
        return 0
    from scalemlo.cli import main as cli

    changes = sys.argv[1:]
    folder = Path(next(c for c in changes if c.startswith("output_dir=")).split("=", 1)[1])
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier run of the kit
    start = time.monotonic()
    status = cli.main(["train", str(CONFIG), *changes])
    say(figures={"demo/seconds": time.monotonic() - start})
    summary = folder / "summary.json"
    if summary.exists():
        for name, losses in json.loads(summary.read_text()).get("heldout", {}).items():
            say(figures={f"demo/heldout_loss/{name}/step_{step}": loss for step, loss in losses})
    return status or 0


if __name__ == "__main__":
    sys.exit(main())
