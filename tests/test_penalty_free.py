"""PBGD-Free: the lower level is pulled towards the upper loss, the upper one follows its direct gradient."""

from functools import partial

import pytest
import torch
from torch import Tensor

import scalemlo as mlo
from tests.problems import Vector
from tests.ranks import run_ranks

SIZE, RATE, PENALTY = 5, 0.1, 4.0


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


A, TARGET, X, W = draw(0, SIZE, SIZE), draw(1, SIZE), draw(2, SIZE), draw(3, SIZE)


class Lower(mlo.Level):
    """L = |w - A x|^2 / 2."""

    def loss(self, upper):
        return (self.module() - A @ upper()).square().sum() / 2


class Upper(mlo.Level):
    """F = |w - t|^2 / 2 + <x, w>, which depends on x directly."""

    def loss(self, lower):
        return (lower() - TARGET).square().sum() / 2 + self.module() @ lower()


class Indirect(mlo.Level):
    def loss(self, lower):
        return (lower() - TARGET).square().sum() / 2


def program(kind=Upper, spec=None, **options) -> mlo.Program:
    sgd = partial(torch.optim.SGD, lr=RATE)
    lower = Lower("lower", Vector(W), optimizer=sgd, hypergradient=mlo.PBGDFree(penalty=PENALTY), **options)
    return mlo.Program([kind("upper", Vector(X), optimizer=sgd), lower], engine=spec)


def recursion(num_steps: int) -> tuple[Tensor, Tensor]:
    x, w = X.clone(), W.clone()
    for _ in range(num_steps):
        slope = w - TARGET + x  # dF/dw
        x, w = x - RATE * w, w - RATE * (w - A @ x + slope / PENALTY)
    return x, w


def run(rank, world_size, spec):
    p = program(spec=spec)
    p.run(4, progress=False)
    trainers = p.trainers.values()
    return [t.engine.gather(dict(t.weights()))["value"].clone() for t in trainers]


def check(found: list[Tensor]) -> None:
    for measured, expected in zip(found, recursion(4), strict=True):
        torch.testing.assert_close(measured, expected, rtol=1e-12, atol=1e-12)


def test_the_run_is_the_recursion():
    check(run(0, 1, mlo.Single()))


@pytest.mark.parametrize("spec", [mlo.DDP(), mlo.FSDP()], ids=["ddp", "fsdp"])
def test_two_ranks_follow_it_too(spec):
    for found in run_ranks(run, 2, spec):
        check(found)


def test_a_direct_gradient_of_nothing_is_refused():
    with pytest.raises(ValueError, match="does not depend on its own parameters.*Use Penalty"):
        program(Indirect).step()


def test_more_steps_of_the_lower_level_are_refused():
    with pytest.raises(ValueError, match="unroll_steps=2, but PBGDFree is single-loop"):
        program(unroll_steps=2)


def test_penalty_out_of_range():
    with pytest.raises(ValueError, match="penalty=0 must be a finite number greater than 0"):
        mlo.PBGDFree(penalty=0)
