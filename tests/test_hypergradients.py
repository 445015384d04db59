"""Every estimator on every engine equals the fp64 single-process reference of tests/problems.py."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

import scalemlo as mlo
from scalemlo.hypergradients.update_derivative import update_derivative
from tests.problems import LOWER_MODULES, Problem, errors, relative_error
from tests.ranks import run_ranks

ESTIMATORS = {"identity": (mlo.Identity, False), "sama": (mlo.SAMA, True)}
ENGINES = {"single-1": (mlo.Single, 1), "ddp-1": (mlo.DDP, 1), "fsdp-1": (mlo.FSDP, 1), "ddp-2": (mlo.DDP, 2),
           "fsdp-2": (mlo.FSDP, 2)}  # fmt: skip
ACCUMULATION = {"1x8": 1, "4x2": 4}

# In fp32 the unnormalised weighted mean is used: normalising subtracts the mean of nearly equal numbers, and the
# reference itself, computed in fp32, is then off by 1e-4.
PRECISIONS = {"fp64": (dict(dtype=torch.float64), 1e-10), "fp32": (dict(dtype=torch.float32, normalize=False), 1e-5)}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("engine", ENGINES)
def test_forward_mixed_partial_equals_reference(engine, estimator, precision):
    (spec, world_size), (cls, adaptive), (options, tolerance) = (
        ENGINES[engine],
        ESTIMATORS[estimator],
        PRECISIONS[precision],
    )
    problems = [Problem(kind=kind, accumulation=a, **options) for kind in LOWER_MODULES for a in ACCUMULATION.values()]
    for by_rank in run_ranks(errors, world_size, problems, cls(mixed="forward"), adaptive, spec()):
        assert max(by_rank) < tolerance, dict(zip([(p.kind, p.accumulation) for p in problems], by_rank, strict=True))


@pytest.mark.full
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("spec", [mlo.DDP, mlo.FSDP])
def test_four_ranks(spec, estimator):
    cls, adaptive = ESTIMATORS[estimator]
    problems = [Problem(kind=kind) for kind in LOWER_MODULES]
    for by_rank in run_ranks(errors, 4, problems, cls(mixed="forward"), adaptive, spec()):
        assert max(by_rank) < 1e-10


@pytest.mark.parametrize("engine", ["single-1", "ddp-2", "fsdp-2"])
def test_central_differences_come_close(engine):
    """The fallback has the error of a central difference, O(e^2), not that of a moved stop-gradient, O(1)."""
    spec, world_size = ENGINES[engine]
    kinds = ["mlp", "gpt2_tied", "llama"]
    problems = [Problem(kind=kind, normalize=False) for kind in kinds]
    hypergradient = mlo.Identity(mixed="finite_difference")
    for by_rank in run_ranks(errors, world_size, problems, hypergradient, False, spec()):
        by_kind = dict(zip(kinds, by_rank, strict=True))
        assert max(by_kind["mlp"], by_kind["gpt2_tied"]) < 1e-6
        assert (
            by_kind["llama"] < 1e-2
        )  # its RMSNorm computes in fp32 whatever the dtype: noise of 1e-7 over a 1e-5 step


def test_central_differences_freeze_stop_gradients_inside_the_module():
    """DoRA detaches a norm of its weights: a constant of the derivative, which moves when the weights are moved."""

    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = LOWER_MODULES["mlp"]()

        def forward(self, input_ids):
            out = self.inner(input_ids)
            return out / out.detach().norm(dim=-1, keepdim=True)

    LOWER_MODULES["normed"] = Normed
    try:
        problem = Problem(kind="normed", normalize=False)
        (found,) = errors(0, 1, [problem], mlo.Identity(mixed="finite_difference"), False, mlo.Single())
        (exact,) = errors(0, 1, [problem], mlo.Identity(), False, mlo.Single())
    finally:
        del LOWER_MODULES["normed"]
    assert exact < 1e-10
    assert found < 1e-6


@pytest.mark.parametrize("spec", [mlo.Single, mlo.FSDP])
def test_bf16_points_the_same_way(spec):
    """Exact products in bf16 against the fp64 reference; finite differences of bf16 losses are noise there."""
    problem = Problem(kind="llama", dtype=torch.float32, normalize=False)

    def body(rank, world_size):
        measured = problem.hypergradient(mlo.Identity(), spec(dtype="bf16"))
        expected = problem.reference(measured.state, adaptive=False)
        a, b = (torch.cat([t[n].double().flatten() for n in expected]) for t in (measured.gradient, expected))
        return torch.cosine_similarity(a, b, dim=0).item()

    assert min(run_ranks(body, 2 if spec is mlo.FSDP else 1)) > 0.99


OPTIMIZERS = {
    "adam": partial(torch.optim.Adam, lr=1e-2),
    "adam-coupled-decay": partial(torch.optim.Adam, lr=1e-2, weight_decay=0.3, betas=(0.5, 0.7)),
    "adamw": partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.3),
    "adamw-maximize": partial(torch.optim.AdamW, lr=1e-2, maximize=True),
    "amsgrad": partial(torch.optim.AdamW, lr=1e-2, amsgrad=True, betas=(0.5, 0.7)),
    "sgd": partial(torch.optim.SGD, lr=1e-2, weight_decay=0.3),
    "momentum": partial(torch.optim.SGD, lr=1e-2, momentum=0.9, dampening=0.2),
    "nesterov": partial(torch.optim.SGD, lr=1e-2, momentum=0.9, nesterov=True),
    "sgd-maximize": partial(torch.optim.SGD, lr=1e-2, momentum=0.9, maximize=True),
}


@pytest.mark.parametrize("num_steps_before", [0, 1, 5])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_update_derivative_is_that_of_torch(name, num_steps_before):
    """Central differences of torch's real step, entry by entry."""
    torch.set_default_dtype(torch.float64)  # the optimizer keeps its step count in it
    try:
        weight = nn.Parameter(torch.randn(50))
        gradients = torch.randn(num_steps_before + 1, 50)
        optimizer = OPTIMIZERS[name]([weight])
        for g in gradients[:-1]:
            weight.grad = g.clone()
            optimizer.step()

        def moved(gradient):
            copy = nn.Parameter(weight.detach().clone())
            fresh = OPTIMIZERS[name]([copy])
            for key, value in optimizer.state[weight].items():
                fresh.state[copy][key] = value.clone() if isinstance(value, torch.Tensor) else value
            copy.grad = gradient
            fresh.step()
            return copy.detach()

        h = 1e-6 * gradients[-1].abs()
        expected = -(moved(gradients[-1] + h) - moved(gradients[-1] - h)) / (2 * h)
        found = update_derivative(
            optimizer,
            optimizer.param_groups[0],
            optimizer.state[weight],
            gradient=gradients[-1],
            weight=weight.detach(),
        )
        scale = optimizer.param_groups[0]["lr"] / gradients[-1].abs()  # Adam's du/dg nearly cancels at its first step
        assert ((found - expected).abs() / (expected.abs() + scale)).max() < 1e-6
    finally:
        torch.set_default_dtype(torch.float32)


def test_sama_counts_the_clipping_factor():
    """The gradient enters the update clipped; with a clipping factor c held constant, du/dg gains a factor c."""
    problem = Problem()
    measured = {}
    for limit in (None, 1e-3):
        program = problem.program(mlo.SAMA(), mlo.Single())
        program.trainers["finetune"].level.max_grad_norm = limit
        program.trainers["finetune"].optimizer.param_groups[0]["betas"] = (0.0, 0.999)
        gradient = program.gradients()
        measured[limit] = gradient["rater"], gradient["finetune"]
    (free, g_free), (clipped, g_clipped) = measured[None], measured[1e-3]
    factor = float(g_clipped.norm() / g_free.norm())
    assert factor < 0.1
    # the rule at the clipped gradient, times the factor
    rule = {n: update_derivative(
        program.trainers["finetune"].optimizer, program.trainers["finetune"].parameter_group(n), {},
        gradient=g_clipped[n], weight=program.trainers["finetune"].weights()[n],
    ) * factor for n in g_clipped}  # fmt: skip
    lower, rater = program.trainers["finetune"], program.trainers["rater"]
    v = rater.compute_gradient([lower]).gradients["finetune"]
    expected = -lower.compute_mixed(v * mlo.Shards(rule), [rater])["rater"]
    assert relative_error(clipped, expected) < 1e-10
    assert relative_error(clipped, dict(free)) > 0.1


def test_replace_keeps_estimators_frozen():
    assert replace(mlo.SAMA(), mixed="finite_difference").mixed == "finite_difference"
    with pytest.raises(ValueError, match="mixed='forwards'.*forward"):
        mlo.SAMA(mixed="forwards")
