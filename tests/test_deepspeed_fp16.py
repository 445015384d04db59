"""DeepSpeed in fp16, for real: torch has the kernels on the CPU, though they are slow."""

import gc
import importlib

import pytest
import torch
import torch.distributed as dist
from torch import nn

import scalemlo as mlo
from scalemlo.engines import base
from tests.problems import Problem
from tests.ranks import run_ranks
from tests.test_deepspeed import ADAMW, exact
from tests.test_parity import measured

pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install 'scalemlo[deepspeed]'")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

ESTIMATORS = {2: ["identity, forward"], 3: ["neumann", "sama"]}


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Lift the refusals of fp16 on the CPU, which are scalemlo's and, without AVX512-FP16, DeepSpeed's."""
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")  # once for all ranks, which are forked
    monkeypatch.setattr(base, "check_precision", lambda *arguments: None)
    accelerator = importlib.import_module("deepspeed.accelerator").get_accelerator()
    monkeypatch.setattr(accelerator, "is_fp16_supported", lambda: True)


def with_scale(power: int, stage: int) -> mlo.DeepSpeed:
    keys = {"initial_scale_power": power, "loss_scale_window": 3, "hysteresis": 1}
    return mlo.DeepSpeed(stage=stage, dtype="fp16", offload_optimizer=stage == 2, config={"fp16": keys})


def test_hypergradients_point_where_those_of_fp64_do():
    def body(rank, world_size):
        gc.freeze()
        return [
            {n: measured(n, with_scale(10, stage), "llama", torch.float32) for n in names}
            for stage, names in ESTIMATORS.items()
        ]

    for by_stage in run_ranks(body, 2, timeout_seconds=300):
        for by_case in by_stage:
            for name, found in by_case.items():
                a, b = (torch.cat([t[n].double().flatten() for n in found]) for t in (found, exact(name, "llama")))
                assert torch.cosine_similarity(a, b, dim=0) > 0.99, name


def test_a_scale_that_is_too_large_comes_down_and_training_goes_on():
    """Also of ghost products, mixed partials and the upper level, whose scale is its own."""

    def body(rank, world_size):
        gc.freeze()
        program = Problem(kind="mlp", dtype=torch.float32, lower_optimizer=ADAMW).program(
            mlo.Identity(), with_scale(20, 3)
        )
        lower, upper = program.trainers["finetune"], program.trainers["rater"]
        assert lower.engine._partition._optimizer.loss_scaler.cur_scale == 1.0
        before = lower.weights().clone()
        program.step()
        assert lower.num_steps == upper.num_steps == 0
        assert all(torch.equal(before[n], t) for n, t in lower.weights().items())
        program.run(12, progress=False)
        assert lower.num_steps == upper.num_steps > 4
        assert 1.0 < lower.scaler.scale < 2.0**20
        assert all(t.isfinite().all() for t in lower.weights().values())
        losses = [r["loss/finetune"] for r in program.history.steps if "loss/finetune" in r]
        assert losses[-1] < losses[0]

    run_ranks(body, 2, timeout_seconds=300)


def test_an_overflow_on_one_rank_skips_the_step_on_all():
    class Train(mlo.Level):
        def loss(self, batch):
            factor = 1e4 if dist.get_rank() == 1 and self.overflows else 1.0
            return self.module(batch).square().mean() * factor

    def body(rank, world_size):
        gc.freeze()
        for stage in (1, 2, 3):
            torch.manual_seed(0)
            level = Train("train", nn.Linear(3, 2), data=[torch.ones(2, 3)], optimizer=ADAMW)
            level.overflows = True
            program = mlo.Program([level], engine=with_scale(12, stage))
            program.step()
            trainer = program.trainers["train"]
            assert trainer.scaler.scale == 2.0**11 and trainer.num_steps == 0
            level.overflows = False
            program.step()
            assert trainer.scaler.scale == 2.0**11 and trainer.num_steps == 1

    run_ranks(body, 2, timeout_seconds=300)
