"""Programs as users run them: interruption, records, loss scaling."""

import os
import signal

import pytest
import torch

import scalemlo as mlo
from scalemlo.engines.loss_scaler import LossScaler
from tests.problems import (
    Finetune,
    Problem,
    Rate,
    assert_same,
    build_modules,
    sgd,
    token_batch,
    weights,
)
from tests.ranks import run_ranks


def test_ctrl_c_ends_after_the_iteration():
    problem = Problem(kind="mlp")

    def interrupt(program, record):
        if program.num_steps == 2:
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    program = problem.program(mlo.Identity(), mlo.Single())
    history = program.run(6, callbacks=[interrupt], progress=False)
    assert history.interrupted and len(history.steps) == program.num_steps == 2
    assert signal.getsignal(signal.SIGINT) is handler
    module, _ = build_modules("mlp", torch.float64)
    module.load_state_dict(program.state_dict("finetune"))
    uninterrupted = problem.program(mlo.Identity(), mlo.Single())
    uninterrupted.run(2, progress=False)
    assert_same(weights(program), weights(uninterrupted), 0.0)
    program.run(2, progress=False)  # it can go on
    uninterrupted.run(2, progress=False)
    assert_same(weights(program), weights(uninterrupted), 0.0)
    assert not program.history.interrupted


def test_a_second_ctrl_c_ends_at_once():
    def impatient(program, record):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    program = Problem().program(mlo.Identity(), mlo.Single())
    with pytest.raises(KeyboardInterrupt):
        program.run(6, callbacks=[impatient], progress=False)
    assert program.num_steps == 1


def test_ctrl_c_on_one_rank_ends_all():
    def body(rank, world_size):
        def interrupt(program, record):
            if rank == 1 and program.num_steps == 2:
                os.kill(os.getpid(), signal.SIGINT)

        program = Problem().program(mlo.Identity(), mlo.FSDP())
        history = program.run(6, callbacks=[interrupt], progress=False)
        return history.interrupted, program.num_steps, len(program.state_dict("finetune"))

    module, _ = build_modules("mlp", torch.float64)
    assert run_ranks(body, 2) == [(True, 2, len(module.state_dict())), (True, 2, 0)]


def test_history(tmp_path):
    program = Problem().program(mlo.SAMA(), mlo.Single())
    seen = []
    history = program.run(3, callbacks=[lambda program, record: seen.append(dict(record))], progress=False)
    assert seen == history.steps
    columns = {f"{kind}/{level}" for kind in ("loss", "gradient_norm", "lr") for level in ("rater", "finetune")}
    for row in history.steps:
        assert set(row) == {"step"} | columns
    assert history.column("step") == [1, 2, 3]
    assert history.column("lr/finetune") == [1e-2] * 3
    assert all(norm > 0 for norm in history.column("gradient_norm/rater"))
    assert history.column("no such column") == []
    phases = {
        "rater/data", "finetune/data", "rater/direct gradient", "finetune/gradient",
        "finetune/hypergradient", "rater/step", "finetune/step",
    }  # fmt: skip
    assert set(history.phases) == phases | {"finetune/verify"}
    assert all(history.phases[name].num_calls == 3 and history.phases[name].peak_bytes > 0 for name in phases)
    assert history.phases["finetune/verify"].num_calls == 1
    history.save(tmp_path)
    assert (tmp_path / "history.csv").read_text().splitlines()[0].startswith("step,")
    assert len((tmp_path / "history.csv").read_text().splitlines()) == 4
    assert not history.interrupted and history.skipped == {}


def test_history_means_over_the_steps_of_an_iteration():
    lower, upper = build_modules("mlp", torch.float64)
    finetune = Finetune("finetune", lower, data=[token_batch(i) for i in range(6)], optimizer=sgd, unroll_steps=3)
    program = mlo.Program([Rate("rater", upper, data=[token_batch(9)], optimizer=sgd), finetune], verify="off")
    losses: list[float] = []
    compute = program.trainers["finetune"].compute_gradient

    def spy(*args, **kwargs):
        result = compute(*args, **kwargs)
        losses.append(result.loss)
        return result

    program.trainers["finetune"].compute_gradient = spy
    program.run(2, progress=False)
    assert len(losses) == 6 and program.trainers["rater"].num_steps == 2
    assert program.history.column("loss/finetune") == pytest.approx([sum(losses[:3]) / 3, sum(losses[3:]) / 3])


def test_loss_scaling_changes_nothing_but_the_range():
    """fp16's loss scaling, exercised in fp64: scaled gradients and hypergradients are unscaled again, exactly."""
    found = {}
    for scale in (1.0, 2.0**16):
        program = Problem().program(mlo.SAMA(), mlo.Single())
        for trainer in program.trainers.values():
            trainer.scaler = LossScaler(scale=scale, enabled=scale != 1.0, growth_interval=1)
        found[scale] = program.gradients()
    for level in ("rater", "finetune"):
        for name, t in found[1.0][level].items():
            torch.testing.assert_close(found[2.0**16][level][name], t, rtol=1e-12, atol=1e-15)
    assert program.trainers["rater"].scaler.scale == 2.0**17  # one good gradient, growth_interval 1


def test_an_overflow_halves_the_scale_and_skips_the_step():
    program = Problem(dtype=torch.float32).program(mlo.Identity(), mlo.Single())
    lower = program.trainers["finetune"]
    lower.scaler = LossScaler(scale=2.0**140)  # beyond fp32's range: overflows whatever it multiplies
    before = {n: t.clone() for n, t in lower.weights().items()}
    program.step()
    assert lower.scaler.scale == 2.0**139
    assert all(torch.equal(t, before[n]) for n, t in lower.weights().items())
    assert program.history.skipped == {}  # part of loss scaling, not an error
