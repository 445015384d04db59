"""A resumed run is bit for bit the uninterrupted one."""

import os
import random
import signal
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import scalemlo as mlo
from scalemlo.checkpoint import complete_checkpoints, state
from scalemlo.engines.loss_scaler import LossScaler
from tests.checkpoint.programs import (
    ESTIMATORS,
    Net,
    Tokens,
    build,
    differences,
    everything,
    full,
    plain_problem,
    start_random,
)
from tests.problems import Problem
from tests.ranks import run_ranks

WORLD_SIZES = {"single": 1, "ddp": 2, "fsdp": 2}


def resumed_and_not(rank, world_size, folder, engine, estimators):
    found = {}
    for estimator in estimators:
        start_random()
        straight = build(engine, estimator)
        straight.run(6, progress=False)

        start_random()
        first = build(engine, estimator)
        first.run(3, progress=False)
        at_save = everything(first)
        first.save(f"{folder}/{estimator}")
        torch.rand(5), random.random(), np.random.rand()
        second = build(engine, estimator, seed=17 + rank)  # other weights: all of them must come from the checkpoint
        second.trainers["finetune"].engine.module.head.bias.copy_(first.trainers["finetune"].engine.module.head.bias)
        second.load(f"{folder}/{estimator}")
        loaded = differences(at_save, everything(second))
        second.run(3, progress=False)
        moments = [k for k in state.vectors(second) if "/optimizer/exp_avg" in k]
        found[estimator] = (loaded, differences(everything(straight), everything(second)), len(moments))
    return found


@pytest.mark.parametrize("engine", WORLD_SIZES)
def test_resume_is_bit_identical(engine, tmp_path):
    world_size = WORLD_SIZES[engine]
    estimators = list(ESTIMATORS) if engine == "single" else ["soba", "unrolled", "nystrom"]
    for found in run_ranks(
        resumed_and_not, world_size, tmp_path, engine, estimators, init_process_group=world_size > 1
    ):
        for estimator, (loaded, trained, num_moments) in found.items():
            assert loaded == [], estimator
            assert trained == [], estimator
            assert num_moments == 12  # exp_avg and exp_avg_sq of six parameters
    if engine == "fsdp":
        shards = list((tmp_path / "soba/step-000003").glob("__*.distcp"))
        assert len(shards) == 2  # each rank wrote its own


def test_run_writes_and_resumes(tmp_path):
    start_random()
    straight = build()
    straight.run(7, progress=False)

    start_random()
    checkpoint = mlo.Checkpointing(tmp_path, every=2, save_total_limit=2)
    build().run(5, progress=False, checkpoint=checkpoint)
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step-000004", "step-000005"]
    program = build(seed=9)
    bias = straight.trainers["finetune"].engine.module.head.bias
    program.trainers["finetune"].engine.module.head.bias.copy_(bias)
    history = program.run(7, progress=False, checkpoint=checkpoint, resume=True)
    assert program.num_steps == len(history.steps) == 7
    assert differences(everything(straight), everything(program)) == []
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step-000006", "step-000007"]
    again = build()
    assert len(again.run(7, progress=False, checkpoint=checkpoint, resume=True).steps) == 7  # nothing is left to do
    earlier = build()
    earlier.run(7, progress=False, resume=tmp_path / "step-000006")
    assert [r["step"] for r in earlier.history.steps] == list(range(1, 8))


def test_run_writes_and_resumes_on_two_ranks(tmp_path):
    def body(rank, world_size):
        checkpoint = mlo.Checkpointing(tmp_path, every=1, save_total_limit=1)
        straight = plain_problem("fsdp")
        straight.run(3, progress=False, checkpoint=checkpoint)
        resumed = plain_problem("fsdp")
        resumed.run(4, progress=False, checkpoint=checkpoint, resume=True)
        straight.run(1, progress=False)
        assert differences(full(straight), full(resumed)) == []
        assert [p.name for p in complete_checkpoints(tmp_path)] == ["step-000004"]
        resumed.run(1, progress=False)
        trainer = resumed.trainers["finetune"]
        moments = trainer.optimizer.state[trainer.engine.parameters["head.weight"]]
        moments["rows"] = moments["exp_avg"][:, :3]
        with pytest.raises(ValueError, match=r"AdamW keeps 'rows' of shape \[37, 3\] for parameter 'head.weight'"):
            resumed.save(tmp_path)
        del moments["rows"]
        resumed.save(tmp_path)

    run_ranks(body, 2)


def test_state_of_another_shape_than_the_parameter(tmp_path):
    problem = Problem(lower_optimizer=partial(torch.optim.Adafactor, lr=1e-2))
    programs = [problem.program(mlo.SOBA(step_size=0.1), mlo.Single()) for _ in range(2)]
    programs[0].run(2, progress=False)
    programs[0].save(tmp_path)
    programs[1].load(tmp_path)
    for program in programs:
        program.run(2, progress=False)
    assert differences(everything(programs[0]), everything(programs[1])) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_saves(tmp_path, number):
    def interrupt(program, record):
        if record["step"] == 2:
            os.kill(os.getpid(), number)

    program = build()
    history = program.run(9, callbacks=[interrupt], progress=False, checkpoint=mlo.Checkpointing(tmp_path))
    assert history.interrupted
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step-000002"]
    resumed = build()
    resumed.load(tmp_path)
    assert resumed.num_steps == 2 and not resumed.history.interrupted


class Head(mlo.Level):
    def loss(self, batch, body):
        return mlo.mean(body(batch["input_ids"])[..., 0] ** 2)


class Body(mlo.Level):
    def loss(self, batch, head):
        return mlo.mean((self.module(batch["input_ids"]) ** 2).sum(-1))


def test_levels_that_share_a_module(tmp_path):
    def make(seed):
        torch.manual_seed(seed)
        net, data = Net().double(), DataLoader(Tokens(), batch_size=4, shuffle=True)
        options = dict(data=data, optimizer=partial(torch.optim.Adam, lr=1e-2))
        head = Head("head", net, parameters="head.weight", **options)
        return mlo.Program([head, Body("body", net, parameters=["embed.*", "blocks.*"], **options)])

    program = make(0)
    program.run(2, progress=False)
    program.save(tmp_path)
    other = make(1)
    net = program.trainers["head"].engine.module
    other.trainers["head"].engine.module.head.bias.copy_(net.head.bias)
    other.load(tmp_path)
    at_load = differences(everything(program), everything(other))
    assert at_load == []
    assert all(torch.equal(t, net.state_dict()[n]) for n, t in other.state_dict("head").items())


def test_loss_scales(tmp_path):
    program = build()
    program.trainers["finetune"].scaler = LossScaler(scale=8.0, num_good=3)
    program.save(tmp_path)
    other = build()
    other.load(tmp_path)  # in full precision there is nothing to scale
    assert other.trainers["finetune"].scaler == LossScaler(scale=1.0, enabled=False)
    other.trainers["finetune"].scaler = LossScaler()
    other.load(tmp_path)
    assert other.trainers["finetune"].scaler == LossScaler(scale=8.0, num_good=3)


def test_extra_state(tmp_path):
    def note(program, record):
        program.extra_state.setdefault("steps", []).append(program.num_steps)

    build().run(2, callbacks=[note], progress=False, checkpoint=mlo.Checkpointing(tmp_path))
    program = build()
    program.extra_state["gone"] = 1
    program.run(3, callbacks=[note], progress=False, resume=tmp_path)
    assert program.extra_state == {"steps": [1, 2, 3]}
