"""Every estimator gives one answer on every engine, precision and number of ranks: that of one process in fp64."""

from functools import cache, partial

import pytest
import torch
from torch import Tensor

import scalemlo as mlo
from tests.cases import CASES
from tests.problems import Problem, build_modules, full_tensors, relative_error
from tests.ranks import run_ranks

ADAMW = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-3)
ENGINES = {"single": mlo.Single, "ddp": mlo.DDP, "fsdp": mlo.FSDP}


def measured(name: str, spec, kind: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The upper level's hypergradient at the start, after which the lower weights must be as before."""
    case = CASES[name]
    problem = Problem(kind=kind, dtype=dtype, lower_optimizer=ADAMW, normalize=False)
    finetune, rater = problem.levels(*build_modules(kind, dtype), case.estimator)
    finetune.unroll_steps = case.unroll_steps
    program = mlo.Program([rater, finetune], engine=spec)
    lower = program.trainers["finetune"]
    before = {n: t.clone() for n, t in lower.weights().items()}
    gradient = program.gradients()["rater"]
    assert all(torch.equal(before[n], t) for n, t in lower.weights().items()), "weights moved"
    return full_tensors(program.trainers["rater"], gradient)


@cache
def reference(name: str, kind: str) -> dict[str, Tensor]:
    return measured(name, mlo.Single(), kind, torch.float64)


def all_cases(rank, world_size, spec, kind, dtype) -> dict[str, dict[str, Tensor]]:
    return {name: measured(name, spec, kind, dtype) for name in CASES}


def check(engine: str, world_size: int, kind: str, dtype: torch.dtype, tolerance: float) -> None:
    for by_case in run_ranks(all_cases, world_size, ENGINES[engine](), kind, dtype):
        errors = {name: relative_error(found, reference(name, kind)) for name, found in by_case.items()}
        late = {name: error for name, error in errors.items() if not error < tolerance * CASES[name].rounding}
        assert not late, late


@pytest.mark.parametrize(("engine", "world_size"), [("ddp", 2), ("fsdp", 1), ("fsdp", 2)])
def test_fp64(engine, world_size):
    check(engine, world_size, "mlp", torch.float64, 1e-10)


@pytest.mark.parametrize(("engine", "world_size"), [("single", 1), ("fsdp", 2)])
def test_fp32(engine, world_size):
    check(engine, world_size, "mlp", torch.float32, 1e-5)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["mlp", "gpt2_tied"])
@pytest.mark.parametrize(("engine", "world_size"), [("ddp", 1), ("ddp", 4), ("fsdp", 4)])
def test_fp64_on_more_ranks(engine, world_size, kind):
    check(engine, world_size, kind, torch.float64, 1e-10)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["llama", "llama_lora"])
@pytest.mark.parametrize(("engine", "world_size"), [("ddp", 2), ("ddp", 4), ("fsdp", 2), ("fsdp", 4)])
def test_fp32_on_more_ranks(engine, world_size, kind):
    check(engine, world_size, kind, torch.float32, 1e-5)


@pytest.mark.parametrize("engine", ["single", "fsdp"])
def test_bf16_points_the_same_way(engine):
    """Master weights in fp32, computation in bf16; `measured` checks that they are bit for bit as before."""

    def body(rank, world_size):
        spec = ENGINES[engine](dtype="bf16")
        return {n: measured(n, spec, "llama", torch.float32) for n, case in CASES.items() if case.is_bf16_ready}

    for by_case in run_ranks(body, 1 if engine == "single" else 2):
        cosines = {}
        for name, found in by_case.items():
            expected = reference(name, "llama")
            a, b = (torch.cat([t[n].double().flatten() for n in expected]) for t in (found, expected))
            cosines[name] = float(torch.cosine_similarity(a, b, dim=0))
        assert min(cosines.values()) > 0.99, cosines
