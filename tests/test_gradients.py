"""Gradients and hypergradients of every kind of level, against double backward on plain modules."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import scalemlo as mlo
from tests.problems import (
    BATCH,
    ENGINES,
    assert_same,
    build_modules,
    example_losses,
    relative_error,
    sgd,
    token_batch,
)
from tests.ranks import run_ranks


def full(program: mlo.Program, gradients) -> dict[str, Tensor]:
    return {
        f"{level}.{name}": t.clone()
        for level, gradient in gradients.items()
        for name, t in program.trainers[level].engine.gather(dict(gradient)).items()
    }


def direction(trainer) -> mlo.Shards:
    """A fixed v, laid out like the weights of a level."""
    return trainer.weights().map(lambda t: torch.ones_like(t) / 10)


class Parts(nn.Module):
    """Has methods beside forward, one of them with keyword arguments and several outputs, and blocks."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(5, 5) for _ in range(2))
        self.head = nn.Linear(5, 1)

    def encode(self, x):  # [B, 5] -> [B, 5]
        for block in self.blocks:
            x = x + block(x).tanh()
        return x

    def forward(self, x):  # [B, 5] -> [B]
        return self.head(self.encode(x)).squeeze(-1)

    def score(self, x, *, power=2):
        out = self(x)
        return {"scores": out**power, "features": (self.encode(x), power)}

    def penalty(self):
        return self.head.weight.square().sum() + self.head.bias.square().sum()


class Gate(nn.Module):
    def __init__(self, width=1):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, 4), nn.Tanh(), nn.Linear(4, 1))
        self.log_penalty = nn.Parameter(torch.randn(1))

    def forward(self, x):  # [B, width] -> [B]
        return self.net(x).sigmoid().squeeze(-1)

    def decay(self):
        return self.log_penalty.exp().sum()


class ByForward(mlo.Level):
    def loss(self, batch, top):
        losses = (self.module(batch) - 1).square()
        return mlo.weighted_mean(losses, top(losses.detach().unsqueeze(-1))) + top.decay() * self.module.penalty()


class ByMethods(mlo.Level):
    """Uses methods only, of both modules, one of them twice, and reads what depends on weights."""

    def loss(self, batch, top):
        out = self.module.score(batch, power=3)
        features, power = out["features"]
        assert power == 3
        again = self.module.encode(batch.flip(1))
        losses = (out["scores"] - 1).square() + (features * again).mean(1)
        return mlo.mean(losses * top(features[:, :1])) + top.decay() * self.module.penalty()


class UnderNoGrad(mlo.Level):
    def loss(self, batch, top):
        with torch.no_grad():
            features = (self.module(batch) - 1).square()
        losses = (self.module(batch) - 1).square()
        return mlo.weighted_mean(losses, top(features.unsqueeze(-1))) + top.decay() * self.module.penalty()


class Judge(mlo.Level):
    """An upper loss with a direct gradient too."""

    def loss(self, batch, low):
        return mlo.mean((low(batch) + 0.5).square()) + 0.1 * self.module.decay()


class JudgeByMethods(mlo.Level):
    def loss(self, batch, low):
        return mlo.mean(low.encode(batch).square().mean(1)) + 0.1 * self.module.decay() + 0.1 * low.penalty()


def numbers(seed: int) -> Tensor:
    return torch.randn(BATCH, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def small(low: type[mlo.Level], top: type[mlo.Level] = Judge, mixed="forward") -> list[mlo.Level]:
    torch.manual_seed(4)
    net, gate = Parts().double(), Gate().double()
    return [
        top("top", gate, data=[numbers(1)], optimizer=sgd),
        low("low", net, data=[numbers(2)], optimizer=sgd, hypergradient=mlo.Identity(mixed=mixed)),
    ]


class Below(mlo.Level):
    def loss(self, batch, top):
        return mlo.mean(example_losses(self.module, batch))


class Above(mlo.Level):
    def loss(self, batch, low):
        return mlo.mean(example_losses(low, batch))


class RMSNorm(LlamaRMSNorm):
    """Without the detour over fp32 that transformers takes in any dtype: its derivatives are good to 1e-8 only."""

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


def shared(kind: str, above: str, below: str) -> list[mlo.Level]:
    """Two levels that own parts of one module."""
    module, _ = build_modules(kind, torch.float64)
    for m in module.modules():
        if isinstance(m, LlamaRMSNorm):
            m.__class__ = RMSNorm
    return [
        Above("top", module, data=[token_batch(1)], optimizer=sgd, parameters=above),
        Below("low", module, data=[token_batch(2)], optimizer=sgd, parameters=below),
    ]


CASES: dict[str, Callable[[], list[mlo.Level]]] = {
    "forward": partial(small, ByForward),
    "methods": partial(small, ByMethods, JudgeByMethods),
    "no_grad": partial(small, UnderNoGrad),
    "lora A above lora B": partial(shared, "llama_lora", "*lora_A*", "*lora_B*"),
    "embedding above blocks": partial(shared, "mlp", "embed*", "blocks*"),
    "norms above everything else": partial(shared, "llama", "*norm*", "*proj*"),
}


def measured(case: str, spec: mlo.engines.EngineSpec) -> dict[str, Tensor]:
    program = mlo.Program(CASES[case](), engine=spec)
    return full(program, program.gradients())


def double_backward(case: str) -> dict[str, Tensor]:
    """``dF/dlambda - d/dlambda <dL/dw, dF/dw>`` and dL/dw with plain autograd on the plain modules."""
    top, low = CASES[case]()
    w = {n: p for n, p in low._module.named_parameters() if n in low.owned_parameters()}
    x = {n: p for n, p in top._module.named_parameters() if n in top.owned_parameters()}
    with sdpa_kernel(SDPBackend.MATH):
        gradients = torch.autograd.grad(low.loss(low.data[0], top._module), list(w.values()), create_graph=True)
        outer = top.loss(top.data[0], low._module)
        v = torch.autograd.grad(outer, list(w.values()), retain_graph=True, allow_unused=True)
        direct = torch.autograd.grad(outer, list(x.values()), allow_unused=True)
        product = sum((g * u).sum() for g, u in zip(gradients, v, strict=True) if u is not None)
        mixed = torch.autograd.grad(product, list(x.values()), materialize_grads=True, allow_unused=True)
    expected = {f"top.{n}": (d if d is not None else 0) - m for n, d, m in zip(x, direct, mixed, strict=True)}
    return expected | {f"low.{n}": g.detach() for n, g in zip(w, gradients, strict=True)}


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_double_backward(case):
    assert_same(measured(case, mlo.Single()), double_backward(case))


def test_gradients_equal_double_backward_on_two_ranks():
    def body(rank, world_size):
        return {(case, name): measured(case, spec()) for case in CASES for name, spec in ENGINES.items()}

    expected = {case: double_backward(case) for case in CASES}
    for by_rank in run_ranks(body, 2):
        for (case, _), found in by_rank.items():
            assert_same(found, expected[case])


def test_values_under_no_grad_are_constants_as_detached_ones_are():
    """In both ways of taking the mixed partial; and the derivative without this rule is another one."""

    def of(low, mixed):
        program = mlo.Program(small(low, mixed=mixed))
        return full(program, program.gradients())

    class Moving(mlo.Level):
        def loss(self, batch, top):
            losses = (self.module(batch) - 1).square()
            return mlo.weighted_mean(losses, top(losses.unsqueeze(-1))) + top.decay() * self.module.penalty()

    exact = of(ByForward, "forward")
    assert_same(of(UnderNoGrad, "forward"), exact)
    assert relative_error(of(ByForward, "finite_difference"), exact) < 1e-7
    assert relative_error(of(UnderNoGrad, "finite_difference"), exact) < 1e-7
    assert relative_error({n: t for n, t in of(Moving, "forward").items() if "net" in n},
                          {n: t for n, t in exact.items() if "net" in n}) > 1e-2  # fmt: skip


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Linear(5, 1)

    def forward(self, x):
        return self.head(self.norm(self.first(x)).tanh()).squeeze(-1)


class NormedLow(mlo.Level):
    def loss(self, batch, top):
        losses = (self.module(batch) - 1).square()
        return mlo.weighted_mean(losses, top(losses.detach().unsqueeze(-1)))


def normed() -> list[mlo.Level]:
    torch.manual_seed(4)
    net, gate = Normed().double(), Gate().double()
    return [
        Judge("top", gate, data=[numbers(1)], optimizer=sgd),
        NormedLow("low", net, data=[numbers(2)], optimizer=sgd),
    ]


def test_mixed_partials_leave_running_statistics_alone():
    def body(rank, world_size):
        changed = {}
        for name, spec in ENGINES.items() if world_size > 1 else [("single", mlo.Single)]:
            program = mlo.Program(normed(), engine=spec())
            program.run(2, progress=False)
            trainer = program.trainers["low"]
            assert int(trainer.engine.module.norm.num_batches_tracked) > 0
            for method in ("forward", "finite_difference"):
                trainer.estimator = mlo.Identity(mixed=method)
                before = {n: b.clone() for n, b in trainer.engine.module.named_buffers()}
                trainer.compute_mixed(direction(trainer), [program.trainers["top"]])
                after = dict(trainer.engine.module.named_buffers())
                changed[name, method] = [n for n in before if not torch.equal(before[n], after[n])]
        return changed

    for by_case in (body(0, 1), *run_ranks(body, 2)):
        assert by_case and all(names == [] for names in by_case.values()), by_case


def test_derivatives_of_batch_statistics():
    """In training mode the statistics of the batch depend on the weights."""
    CASES["normed"] = normed
    try:
        found, expected = measured("normed", mlo.Single()), double_backward("normed")
    finally:
        del CASES["normed"]
    assert_same(found, expected)
