"""Second derivatives on the device, against fp64 on the CPU by plain double backward."""

import pytest

import scalemlo as mlo
from scalemlo.derivatives.hessian import hessian
from tests.gpu.small import (
    ADAMW,
    DTYPES,
    ENGINES,
    SGD,
    TOLERANCE,
    Reference,
    direction,
    is_on_accelerator,
    on_host,
    problem,
    snapshot,
    unrolled,
)
from tests.problems import build_modules, full_tensors, relative_error

pytestmark = pytest.mark.gpu
NUM_UNROLLED = 4


def engine_of(name: str, dtype: str) -> mlo.engines.EngineSpec:
    if dtype == "fp16" and not is_on_accelerator():
        pytest.skip("fp16 needs an accelerator")
    return ENGINES[name](dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("engine", ["single", "fsdp"])
def test_products_and_mixed_partials(engine, dtype, record_property):
    case = problem(ADAMW, normalize=False)
    program = case.program(mlo.Identity(mixed="forward"), engine_of(engine, dtype))
    program.run(2, progress=False)
    state = snapshot(program)
    program.gradients()  # takes the batches
    lower, upper = program.trainers["finetune"], program.trainers["rater"]
    full = direction(case)
    shards = lower.engine.shard({n: t.to(lower.engine.device) for n, t in full.items()})
    v = mlo.Shards(shards, lower.engine.group)
    reference, errors = Reference(case, state), {}
    for products in ("remat", "retain"):
        with hessian(lower.loss_at(), lower.block, products) as operator:
            found = [full_tensors(lower, operator(v)) for _ in range(2)]
        errors[products] = max(relative_error(on_host(x), reference.product(full)) for x in found)
    mixed = lower.loss_at().tangents([(lower.block, v)], {"rater": upper.block})["rater"]
    errors["mixed"] = relative_error(on_host(full_tensors(upper, mixed)), reference.mixed(full))
    for name, error in errors.items():
        record_property(f"error/{name}/{engine}/{dtype}", error)
    assert max(errors.values()) < TOLERANCE[dtype], errors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["ghost", "forward", "sama"])
def test_hypergradients(name, dtype, record_property):
    estimator = mlo.SAMA() if name == "sama" else mlo.Identity(mixed=name)
    case = problem(ADAMW, normalize=False)  # else differences of nearly equal losses, noise in bf16
    program = case.program(estimator, engine_of("single", dtype))
    program.run(3, progress=False)
    state = snapshot(program)
    gradient = full_tensors(program.trainers["rater"], program.gradients()["rater"])
    error = relative_error(on_host(gradient), case.reference(state, adaptive=name == "sama"))
    record_property(f"error/{name}/{dtype}", error)
    assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("engine", ["single", "fsdp"])
def test_unrolled(engine, dtype, record_property):
    case = problem(SGD, normalize=False)
    finetune, rate = case.levels(*build_modules(case.kind, case.dtype), mlo.Unrolled())
    finetune.unroll_steps = NUM_UNROLLED
    program = mlo.Program([rate, finetune], engine=engine_of(engine, dtype))
    gradient = full_tensors(program.trainers["rater"], program.gradients()["rater"])
    error = relative_error(on_host(gradient), unrolled(case, NUM_UNROLLED))
    record_property(f"error/unrolled/{engine}/{dtype}", error)
    assert error < TOLERANCE[dtype]
