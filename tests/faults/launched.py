"""Launches the command with a fault in it, and says how that ended; for the tests and ``benchmarks/faults.py``."""

import io
import json
import os
import subprocess
import time
import uuid
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import psutil

from tests.ranks import run_ranks
from tests.tiny_recipe import ENVIRONMENT, TORCHRUN

ROOT = Path(__file__).parent.parent.parent
MARK = "SCALEMLO_TEST_RUN"  # in the environment of every process that a launch starts, whoever adopts it
PHASES = {  # of the recipe's outer step with unroll_steps=2, in the order in which they come
    "lower gradient": "finetune: gradient",
    "lower step": "finetune: step",
    "upper direct gradient": "rater: direct gradient",
    "Hessian-vector products": "finetune: solve",
    "upper step": "rater: step",
    "between steps": "callbacks",
    "save, before it": "save checkpoint",
    "save, all but renamed": "rename",
}
ENGINES = {"ddp": "engine=ddp", "fsdp": "engine=fsdp", "zero3": "engine=deepspeed"}
OPTIONS = [
    "train.save_every=1",
    "train.save_total_limit=9",
    "hypergradient.type=neumann",
    "hypergradient.num_terms=2",
    "hypergradient.step_size=0.1",
]
RESUME = "train.resume=true"


@dataclass(frozen=True)
class Fault:
    """What happens to one rank where it enters a phase of an outer step.

    Attributes:
        action: A name in ``tests.faults.faulty.ACTIONS``.
        phase: As the watchdog names it, or ``"rename"``: when rank 0 makes a checkpoint complete.
    """

    action: Literal["kill", "hang", "fail", "terminate_launcher"]
    phase: str
    step: int
    rank: int = 1
    phase_timeout_seconds: float | None = None


@dataclass(frozen=True)
class Outcome:
    """How a launch ended.

    Attributes:
        orphans: Command lines of processes that outlived the launcher.
        events: Times by ``"fault"`` and ``"step 3"``, the first rank's; and of ``"start"`` and ``"end"``.
    """

    status: int
    output: str
    orphans: list[str]
    events: dict[str, float]

    @property
    def seconds_to_end(self) -> float:
        """From the fault until the launcher had ended."""
        return self.events["end"] - self.events["fault"]

    @property
    def seconds_to_first_step(self) -> float:
        """From the start of the launcher until an outer step was done."""
        return min(t for event, t in self.events.items() if event.startswith("step")) - self.events["start"]


def launch(
    recipe: Path, out: Path, *overrides: str, fault: Fault | None = None, launcher: Sequence[str] = TORCHRUN
) -> Outcome:
    """Run the recipe on two ranks until the launcher ends.

    Args:
        recipe: Folder of ``run.yaml``.
        out: The run's folder; what the processes log is written beside it.
        *overrides: Of the configuration.
        fault: If any.
        launcher: Command that takes ``-m module arguments``.
    """
    mark, log = uuid.uuid4().hex, out.with_suffix(f".{time.time_ns()}.log")
    described = json.dumps(asdict(fault) if fault else None)
    command = [*launcher, "-m", "tests.faults.faulty", described, str(log), "train", str(recipe / "run.yaml")]
    start = time.time()
    try:
        done = subprocess.run(
            [*command, f"output_dir={out}", *overrides],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=os.environ | ENVIRONMENT | {MARK: mark},
            timeout=240,
        )
        end = time.time()
    finally:
        orphans = end_all_with(mark)
    events = {"start": start, "end": end}
    for line in log.read_text().splitlines() if log.exists() else []:
        event = json.loads(line)
        events.setdefault(event["event"], event["time"])
    return Outcome(done.returncode, done.stdout, orphans, events)


def finish(recipe: Path, out: Path, *overrides: str) -> None:
    """Run the recipe to its end on two forked ranks: sooner, as everything is imported, and bit for bit the same."""

    def body(rank: int, world_size: int) -> None:
        from scalemlo.cli.main import main

        with redirect_stdout(io.StringIO()):  # its tables
            assert main(["train", str(recipe / "run.yaml"), f"output_dir={out}", *overrides]) == 0

    run_ranks(body, 2, init_process_group=False, timeout_seconds=250)


def end_all_with(mark: str) -> list[str]:
    """Kill what is left of a launch; its command lines."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
                process.kill()
        except psutil.Error:  # it ended meanwhile, or is another user's
            continue
    return found


def checkpoints(out: Path) -> list[str]:
    """Names of everything in a run's folder of checkpoints."""
    folder = out / "checkpoints"
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def learnt(out: Path) -> dict[str, bytes]:
    """What a finished run wrote of what it learnt, bit by bit: adapter, example weights, losses and norms by step."""
    files = ("reweighted/adapter_model.safetensors", "weights.csv", "reweighted/history.csv")
    return {name: (out / name).read_bytes() for name in files}
