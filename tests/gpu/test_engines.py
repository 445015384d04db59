"""Every engine on one rank trains in every precision, and its hypergradient is that of fp64 on the CPU."""

import importlib.util
import math

import pytest
import torch

import scalemlo as mlo
from scalemlo.distributed import group as distributed
from tests.gpu.small import ADAMW, DTYPES, ENGINES, TOLERANCE, is_on_accelerator, on_host, problem, snapshot
from tests.problems import full_tensors, relative_error
from tests.ranks import run_ranks

pytestmark = pytest.mark.gpu


def trained(spec: mlo.engines.EngineSpec) -> dict[str, float]:
    """Some outer iterations, and the error of the hypergradient after them."""
    case = problem(ADAMW, normalize=False)
    program = case.program(mlo.Identity(mixed="forward"), spec)
    history = program.run(6, progress=False)
    state = snapshot(program)
    rater = program.trainers["rater"]
    gradient = full_tensors(rater, program.gradients()["rater"])
    return {
        "error": relative_error(on_host(gradient), case.reference(state, adaptive=False)),
        "first": history.steps[0]["loss/finetune"],
        "last": history.steps[-1]["loss/finetune"],
        "is_on_device": float(rater.engine.device == distributed.default_device()),
        "scale": program.trainers["finetune"].scaler.scale,
    }


def check(found: dict[str, float], dtype: str, name: str, record_property) -> None:
    record_property(f"error/{name}/{dtype}", found["error"])
    assert found["error"] < TOLERANCE[dtype]
    assert found["is_on_device"]
    assert math.isfinite(found["last"]) and found["last"] != found["first"]
    assert (found["scale"] > 1.0) == (dtype == "fp16")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("engine", ENGINES)
def test_engine(engine, dtype, record_property):
    if dtype == "fp16" and not is_on_accelerator():
        pytest.skip("fp16 needs an accelerator")
    found = trained(ENGINES[engine](dtype=dtype))
    if engine != "single":
        backend = torch.distributed.get_backend()
        device = distributed.default_device()
        assert backend == ("gloo" if device.type == "cpu" else torch.distributed.get_default_backend_for_device(device))
    check(found, dtype, engine, record_property)


@pytest.mark.skipif(not is_on_accelerator(), reason="fp16 needs an accelerator")
@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_that_overflows_fp16_is_left_out(engine):
    program = problem(ADAMW, normalize=False).program(mlo.Identity(mixed="forward"), ENGINES[engine](dtype="fp16"))
    program.run(1, progress=False)
    scaler = program.trainers["finetune"].scaler
    scaler.scale = 2.0**60
    before = on_host(full_tensors(program.trainers["finetune"], program.trainers["finetune"].weights()))
    program.run(1, progress=False)
    after = on_host(full_tensors(program.trainers["finetune"], program.trainers["finetune"].weights()))
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert scaler.scale == 2.0**59
    scaler.scale = 2.0**10
    program.run(1, progress=False)
    moved = on_host(full_tensors(program.trainers["finetune"], program.trainers["finetune"].weights()))
    assert not all(torch.equal(moved[n], after[n]) for n in moved)


def on_deepspeed(rank: int, world_size: int, stages, dtype: str) -> list[dict[str, float]]:
    found = []
    for stage in stages:
        found.append(trained(mlo.DeepSpeed(stage=stage, dtype=dtype)))
    return found


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("dtype", DTYPES)
def test_deepspeed(dtype, record_property):
    if dtype == "fp16" and not is_on_accelerator():
        pytest.skip("fp16 needs an accelerator")
    stages = (1, 2, 3) if dtype == "fp32" else (2, 3)
    # In a process of its own: ZeRO-3 changes torch's functions for the whole process.
    (results,) = run_ranks(on_deepspeed, 1, stages, dtype, init_process_group=False)
    for stage, found in zip(stages, results, strict=True):
        check(found, dtype, f"zero{stage}", record_property)
