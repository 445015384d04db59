"""The plan of a run, made while it runs: in a process of its own that gives way to the run's, and ends with it."""

import json
import os
import re
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...distributed.group import default_device, is_main_process, world_size

if TYPE_CHECKING:
    from ...runs.config import RunConfig

WAIT_SECONDS = 120.0
"""How long the end of a run waits for a plan that takes longer than the run did."""
OF_LAUNCHERS = re.compile(r"RANK|WORLD_SIZE|(ACCELERATE|FSDP|TORCHELASTIC|LOCAL|GROUP|ROLE|MASTER|OMPI|PMI|SLURM)_.*")
"""Environment variables that make a process a rank."""


class PlanBeside:
    """Makes ``plan.json`` in a run's folder on rank 0; whatever goes wrong there, the run goes on.

    The process has the lowest priority and one thread: it takes the time that the run leaves.

    Args:
        config: Of the run.
        program: Name of the history that the plan is beside of.
    """

    def __init__(self, config: "RunConfig", program: str):
        self.program, self.reason = program, ""
        self._path = Path(config.output_dir) / "plan.json"
        self._process: subprocess.Popen | None = None
        if not is_main_process() or not config.plan:
            return
        self._path.unlink(missing_ok=True)
        if config.engine.type == "deepspeed":
            self.reason = "DeepSpeed cannot be planned, as its code needs data"
            return
        try:
            self._start(config)
        except OSError as error:
            self.reason = str(error)

    def _start(self, config: "RunConfig") -> None:
        from ...runs.config import to_yaml

        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 (as long as the process)
        environment = {name: value for name, value in os.environ.items() if not OF_LAUNCHERS.fullmatch(name)}
        environment |= dict.fromkeys(("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"), "")
        environment |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        asked = {
            "config": to_yaml(config),
            "world_size": world_size(),
            "accelerator": default_device().type != "cpu",
            "program": self.program,
            "path": str(self._path.absolute()),
            "parent": os.getpid(),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.plan_process"],
            stdin=subprocess.PIPE,
            stdout=self._said,
            stderr=self._said,
            text=True,
            env=environment,
            start_new_session=True,  # Ctrl-C is the run's
        )
        weakref.finalize(self, _end, self._process)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked))
        self._process.stdin.close()

    def finish(self, *, wait: bool = True) -> dict[str, Any] | None:
        """The plan, as :meth:`~.planning.plan.Plan.as_dict`; None with ``reason`` set, or where none was asked for.

        Args:
            wait: Whether to wait for one that is not ready.
        """
        if self._process is None:
            return None
        try:
            status = self._process.wait(WAIT_SECONDS if wait else 0)
        except subprocess.TimeoutExpired:
            _end(self._process)
            self.reason = f"it was not ready{f' {WAIT_SECONDS:.0f} s after the run' if wait else ''}"
            return None
        if status == 0 and self._path.exists():
            return json.loads(self._path.read_text())
        self._said.seek(0)
        lines = self._said.read().strip().splitlines()
        self.reason = lines[-1] if lines else f"its process ended with status {status}"
        return None


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
