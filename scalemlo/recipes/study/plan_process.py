"""The process that :mod:`.plan_beside` starts: makes one plan, and ends with the run."""

import ctypes
import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any


def main() -> None:
    """Make the plan that the parent asks for on the standard input."""
    os.nice(19)
    asked = json.load(sys.stdin)
    _end_with_parent(asked["parent"])
    from omegaconf import OmegaConf

    from ...planning.plan import plan_build
    from ...planning.simulate import pretrained_depth
    from ...runs import config as cfg
    from .. import CONFIGS, RECIPES

    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        OmegaConf.save(OmegaConf.create(asked["config"]), file.name)
        config = cfg.load(file.name, [], CONFIGS)

    def build() -> Any:
        return RECIPES[config.recipe].build(config)

    found = plan_build(
        build,
        world_size=asked["world_size"],
        accelerator=asked["accelerator"],
        num_layers=pretrained_depth(build),
    )
    path = Path(asked["path"])
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(found.as_dict() | {"program": asked["program"]}, indent=2) + "\n")
    os.replace(unfinished, path)


def _end_with_parent(parent: int) -> None:
    """Be killed when the run's process ends, however it does; Linux alone knows how."""
    if sys.platform == "linux":
        parent_death_signal = 1  # PR_SET_PDEATHSIG, see prctl(2)
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the run has ended")


if __name__ == "__main__":
    main()
