"""A run that is saved, killed and resumed is bit for bit the one that was not."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import scalemlo as mlo
from scalemlo.checkpoint import complete_checkpoints
from tests.checkpoint.programs import build, differences, everything, start_random
from tests.checkpoint.test_resume import resumed_and_not
from tests.gpu.small import use_deterministic_algorithms

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("deterministic")]
STEPS, KILLED_AT_SAVE = 5, 3


@pytest.mark.parametrize("engine", ["single", "ddp", "fsdp"])
def test_resume_is_bit_identical(engine, tmp_path):
    for estimator, (loaded, trained, _) in resumed_and_not(0, 1, tmp_path, engine, ["soba", "unrolled"]).items():
        assert loaded == [], estimator
        assert trained == [], estimator


def killed(folder: str, engine: str) -> None:
    """A run that dies in the middle of writing a checkpoint; in a process of its own."""
    torch.set_num_threads(1)
    use_deterministic_algorithms()
    start_random()
    program = build(engine)
    fsync = os.fsync

    def counted(descriptor) -> None:
        if program.num_steps == KILLED_AT_SAVE:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    os.fsync = counted
    program.run(STEPS, progress=False, checkpoint=mlo.Checkpointing(folder, every=1, save_total_limit=2))
    raise AssertionError("not killed")


@pytest.mark.parametrize("engine", ["single", "fsdp"])
def test_a_killed_run_resumes_bit_for_bit(engine, tmp_path):
    code = f"from tests.gpu.test_checkpoint import killed; killed({str(tmp_path)!r}, {engine!r})"
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert child.returncode == -signal.SIGKILL, child.stderr[-3000:]
    assert [p.name for p in complete_checkpoints(tmp_path)] == [f"step-{n:06d}" for n in (1, 2)]

    start_random()
    straight = build(engine)
    bias = straight.trainers["finetune"].engine.module.head.bias  # frozen: a checkpoint does not hold it
    resumed = build(engine, seed=9)
    resumed.trainers["finetune"].engine.module.head.bias.copy_(bias)
    resumed.run(STEPS, progress=False, checkpoint=mlo.Checkpointing(tmp_path, every=1), resume=True)
    start_random()
    straight = build(engine)
    straight.run(STEPS, progress=False)
    assert differences(everything(straight), everything(resumed)) == []
