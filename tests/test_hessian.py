"""Hessian-vector products on every engine equal double backward in one fp64 process."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import scalemlo as mlo
from scalemlo.derivatives.hessian import RetainedHessian, hessian
from tests.problems import BATCH, Problem, Snapshot, build_modules, full_tensors, relative_error, token_batch
from tests.ranks import run_ranks

KINDS = ["mlp", "llama", "gpt2_tied", "llama_lora"]
ENGINES = {"single-1": (mlo.Single, 1), "ddp-2": (mlo.DDP, 2), "fsdp-1": (mlo.FSDP, 1), "fsdp-2": (mlo.FSDP, 2)}


def direction(names_and_shapes, seed: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(shape, generator=generator, dtype=torch.float64) for n, shape in names_and_shapes}


def reference(problem: Problem, state: Snapshot) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """``H v`` and ``d/dlambda <grad, v>`` by double backward over the whole batch."""
    lower, upper = build_modules(problem.kind, torch.float64)
    lower.load_state_dict(state.lower, strict=False)
    upper.load_state_dict(state.upper)
    weights = {n: p for n, p in lower.named_parameters() if p.requires_grad}
    size, step = BATCH // problem.accumulation, state.num_steps
    micro = [token_batch((step * problem.accumulation + i) % 40, size) for i in range(problem.accumulation)]
    v = direction((n, p.shape) for n, p in weights.items())
    with sdpa_kernel(SDPBackend.MATH):
        loss = sum(problem._lower_loss(lower, upper, b) for b in micro) / problem.accumulation
        gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        product = sum((g * v[n]).sum() for n, g in zip(weights, gradients, strict=True))
        wanted = [*weights.values(), *upper.parameters()]
        found = torch.autograd.grad(product, wanted, materialize_grads=True)
    return (
        dict(zip(weights, found[: len(weights)], strict=True)),
        dict(zip(dict(upper.named_parameters()), found[len(weights) :], strict=True)),
    )


def errors(rank, world_size, problems: Sequence[Problem], products: str, spec) -> list[float]:
    found = []
    for problem in problems:
        program = problem.program(mlo.Identity(), spec)
        program.run(2, progress=False)
        state = Snapshot.of(program)
        program.gradients()  # takes the next batches
        lower = program.trainers["finetune"]
        engine, dtype = lower.engine, problem.dtype
        before = {n: t.clone() for n, t in lower.weights().items()}
        full = direction((n, engine.parameters[n].shape) for n in lower.block.names)
        v = mlo.Shards({n: t.to(dtype) for n, t in engine.shard(full).items()}, engine.group)
        expected, expected_mixed = reference(problem, state)
        with hessian(lower.loss_at(), lower.block, products) as operator:
            for _ in range(2):  # a retained graph serves more than once
                product = operator(v)
            assert operator.num_products == 2
        found.append(relative_error(full_tensors(lower, product), expected))
        if products == "retain":
            rater = program.trainers["rater"]
            retained = RetainedHessian(lower.loss_at(), lower.block, {"rater": rater.block})
            found.append(relative_error(full_tensors(rater, retained.mixed(v)["rater"]), expected_mixed))
        assert all(torch.equal(before[n], t) for n, t in lower.weights().items())
    return found


@pytest.mark.parametrize("products", ["remat", "retain"])
@pytest.mark.parametrize("engine", ENGINES)
def test_products_equal_double_backward(engine, products):
    spec, world_size = ENGINES[engine]
    exact = [Problem(kind=kind, accumulation=a) for kind in KINDS for a in (1, 2)]
    single = [Problem(kind=kind, dtype=torch.float32, normalize=False) for kind in KINDS]
    for by_rank in run_ranks(errors, world_size, exact, products, spec()):
        assert max(by_rank) < 1e-6, by_rank
    for by_rank in run_ranks(errors, world_size, single, products, spec()):
        assert max(by_rank) < 1e-5, by_rank


@pytest.mark.parametrize("products", ["remat", "retain"])
def test_a_scaled_loss_gives_the_same_products(products):
    """What fp16 does against underflow: the loss times a power of two, directions of the size of the weights."""
    program = Problem(kind="mlp").program(mlo.Identity(), mlo.Single())
    program.gradients()
    lower, rater = program.trainers["finetune"], program.trainers["rater"]
    plain = lower.loss_at()
    scaled = replace(plain, scale=2.0**16)
    v = lower.weights() * 1e-6
    with hessian(plain, lower.block, products) as a, hessian(scaled, lower.block, products) as b:
        assert relative_error(dict(b(v)), dict(a(v))) < 1e-12
    for uppers in ({"rater": rater.block}, {"finetune": lower.block}):
        (a,), (b,) = (loss.tangents([(lower.block, v)], uppers).values() for loss in (plain, scaled))
        assert relative_error(dict(b), dict(a)) < 1e-12
        (a,), (b,) = (loss.gradient(uppers).values() for loss in (plain, scaled))
        assert relative_error(dict(b), dict(a)) < 1e-12


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Dropout(0.3)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.mark.parametrize("products", ["remat", "retain"])
def test_dropout_is_replayed_not_switched_off(products):
    """One set of masks in the live gradient, in every product, and in the rematerialised forward."""

    class Train(mlo.Level):
        def loss(self, batch, rater):
            return mlo.weighted_mean(self.module(batch).square().mean(1), rater(batch).sigmoid()[:, 0])

    class Rate(mlo.Level):
        def loss(self, batch, train):
            return train(batch).square().mean()

    torch.manual_seed(0)
    sgd = partial(torch.optim.SGD, lr=0.1)
    data = [torch.randn(8, 5, dtype=torch.float64)]
    model = Dropping().double()
    levels = [
        Rate("rater", nn.Linear(5, 1).double(), data=data, optimizer=sgd),
        Train("train", model, data=data, optimizer=sgd, gradient_accumulation_steps=2),
    ]
    program = mlo.Program(levels)
    program.gradients()
    lower = program.trainers["train"]
    weights, v = lower.weights(), lower.weights().map(torch.randn_like)
    base = weights.clone()

    def gradient(step: float) -> mlo.Shards:  # by the live module, with the masks of this step
        for name, w in weights.items():
            w.copy_(base[name] + step * v[name])
        return lower.compute_gradient([lower]).gradients["train"]

    with hessian(lower.loss_at(), lower.block, products) as operator:
        product = operator(v)
    difference = (gradient(1e-5) - gradient(-1e-5)) * 5e4
    gradient(0.0)
    assert relative_error(dict(product), dict(difference)) < 1e-8
    model.eval()
    lower.fetch(lower._seed)  # passes of one step run in the mode that its first one found
    with hessian(lower.loss_at(), lower.block, products) as operator:
        assert relative_error(dict(operator(v)), dict(difference)) > 0.1
