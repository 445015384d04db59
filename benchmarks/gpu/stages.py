"""What the kit does, in order of priority: each stage is a process of its own with its own time limit."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from results import LINES, Results

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FORMS = ("full", "cpu", "quick")
"""On an accelerator; on the CPU, in less than four minutes; on the CPU, in less than one, for the test of the kit."""

QUICK_CHECKS = (
    "test_derivatives.py::test_products_and_mixed_partials[fsdp-fp32]",
    "test_derivatives.py::test_products_and_mixed_partials[single-bf16]",
    "test_derivatives.py::test_hypergradients[ghost-fp32]",
    "test_derivatives.py::test_hypergradients[ghost-fp16]",
    "test_derivatives.py::test_unrolled[single-fp32]",
    "test_engines.py::test_engine[ddp-fp32]",
    "test_residency.py::test_a_budget_is_kept_and_bits_are_equal[ghost-single]",
    "test_checkpoint.py::test_a_killed_run_resumes_bit_for_bit[single]",
)
SIZES = {
    "full": {"135M": 75.0, "1B": 95.0, "8B width": 110.0},
    "cpu": {"tiny": 40.0, "small": 40.0},
    "quick": {"tiny": 30.0},
}
"""Seconds by size."""
PART = "plain_step,plain_gradient,ghost,hvp_remat"
SMALL_DEMO = (
    "plan=false", "train.steps=2", "data.num_train=16", "data.num_meta=8", "data.num_heldout=8", "data.max_length=48",
    "train.batch_size=2", "train.meta_batch_size=2",
)  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """One process.

    Args:
        name: Figures and logs are called by it.
        command: Of the interpreter that runs the kit.
        limit_seconds: After these it is ended; what it has found by then is kept.
        least_seconds: Not begun with less time left.
        is_check: Whether what it did not do counts as failed.
        beside: Runs while the others do, at low priority.
        obstacle: Why it cannot run here.
        environment: Variables, beside the kit's own.
        path: Folders of modules, beside the kit's own.
    """

    name: str
    command: Sequence[str]
    limit_seconds: float
    least_seconds: float = 10.0
    is_check: bool = False
    beside: bool = False
    obstacle: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    path: tuple[str, ...] = ()


def stages_of(
    form: str, device: str, free_bytes: int, checks: Sequence[str], out: Path, deepspeed: str | None
) -> list[Stage]:
    """The stages of a form, first ones first.

    Args:
        form: One of :data:`FORMS`.
        device: Type of the device.
        free_bytes: Of its memory.
        checks: Paths for pytest in the place of the kit's own checks; none for those.
        out: Folder of the demo's run.
        deepspeed: Where DeepSpeed is, if it is not where everything else is.
    """
    found = [_checks("checks", checks, 120.0)] if checks else _own_checks(form, deepspeed)
    sizes = SIZES[form]
    exact = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"} if device == "cpu" else {}
    for size, limit in sizes.items():
        command = [str(HERE / "speed.py"), "--size", size, "--device", device, "--free-bytes", str(free_bytes)]
        command += ["--seconds", str(limit - 10.0), *_part(form, size)]
        found.append(Stage(f"speed {size}", command, limit, environment=exact))
    kind = ["--accelerator"] if device != "cpu" else []
    without = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "ZE_AFFINITY_MASK": ""}  # by vendor
    for size in sizes:
        command = [str(HERE / "plans.py"), "--size", size, *kind, "--free-bytes", str(free_bytes)]
        command += _part(form, size)
        limit = 420.0 if form == "full" else 60.0
        beside = (os.cpu_count() or 1) >= 2 + len(sizes)  # with few cores, after everything else
        found.append(Stage(f"plan {size}", command, limit, beside=beside, environment=without if kind else {}))
    if form != "quick":
        found.append(_demo(form, out))
    return found


def _part(form: str, size: str) -> list[str]:
    return ["--variants", PART] if (form, size) in (("quick", "tiny"), ("cpu", "small")) else []


def _own_checks(form: str, deepspeed: str | None) -> list[Stage]:
    tests = ROOT / "tests" / "gpu"
    if form == "quick":
        return [_checks("checks", [str(tests / name) for name in QUICK_CHECKS], 50.0)]
    zero = _checks("checks deepspeed", [str(tests / "test_engines.py"), "-k", "deepspeed"], 75.0)
    if deepspeed is not None:
        zero = replace(zero, path=(deepspeed,))
    elif importlib.util.find_spec("deepspeed") is None:
        zero = replace(zero, obstacle="deepspeed is not installed: pip install deepspeed, or see pack.sh")
    if form == "cpu":
        return [_checks("checks", [str(tests), "-k", "not deepspeed"], 110.0), zero]
    return [
        _checks("checks derivatives", [str(tests / "test_derivatives.py")], 80.0),
        _checks("checks engines", [str(tests / "test_engines.py"), "-k", "not deepspeed"], 80.0),
        _checks("checks residency", [str(tests / "test_residency.py")], 80.0),
        _checks("checks checkpoint", [str(tests / "test_checkpoint.py")], 90.0),
        zero,
    ]


def _checks(name: str, paths: Sequence[str], limit: float) -> Stage:
    command = ["-m", "pytest", "-c", str(HERE / "pytest.ini"), "--rootdir", str(ROOT), "-p", "kit_outcomes", "-v"]
    environment = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # deterministic algorithms ask for it; read by NVIDIA's alone
    return Stage(name, [*command, *paths], limit, is_check=True, environment=environment)


def _demo(form: str, out: Path) -> Stage:
    changes = ["train.steps=10", "train.eval_every=10", f"output_dir={out / 'demo'}"]
    changes += SMALL_DEMO if form == "cpu" else []
    command = [str(HERE / "demo.py"), *changes]
    return Stage("demo", command, 90.0 if form == "full" else 60.0, least_seconds=20.0)


# ---- running ---------------------------------------------------------------------------------------------------------
class Running:
    """A stage that has been started.

    Args:
        stage: The stage.
        results: Where what it finds goes.
        environment: Of the process.
    """

    def __init__(self, stage: Stage, results: Results, environment: dict[str, str]):
        self.stage, self._results, self._start = stage, results, time.monotonic()
        logs = results.folder / "logs"
        self.log = logs / f"{stage.name.replace(' ', '-')}.log"
        self.lines = self.log.with_suffix(".jsonl")
        self.lines.unlink(missing_ok=True)
        path = [environment["PYTHONPATH"], *stage.path]
        with open(self.log, "w") as log:
            self._process = subprocess.Popen(
                [sys.executable, *stage.command],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment | stage.environment | {LINES: str(self.lines), "PYTHONPATH": os.pathsep.join(path)},
                cwd=ROOT,
                start_new_session=True,
                preexec_fn=(lambda: os.nice(10)) if stage.beside else None,
            )

    def wait(self, end: float) -> None:
        """Until it has ended, or its own time or that of the kit is over; results are read all the while.

        Args:
            end: Of the kit, by :func:`time.monotonic`.
        """
        end = min(end, self._start + self.stage.limit_seconds)
        failed = len(self._results.failed)
        while self._process.poll() is None and time.monotonic() < end:
            time.sleep(0.2)
            self._results.read(self.lines)
        status = self._process.poll()
        self.stop()
        self._results.read(self.lines)
        seconds = time.monotonic() - self._start
        self._results.seconds[self.stage.name] = seconds
        if status is None:
            kind = self._results.failed if self.stage.is_check else self._results.skipped
            kind.append((self.stage.name, f"ended after {seconds:.0f} s, its time; see {self.log.name}"))
        elif status and len(self._results.failed) == failed:
            why = _last_line(self.log) if status > 0 else signal.Signals(-status).name
            self._results.failed.append((self.stage.name, f"status {status}: {why}; see {self.log.name}"))
        self._results.write()

    def stop(self) -> None:
        """End it, and all that it started."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1][-300:] if lines else "no output"
