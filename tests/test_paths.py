"""Every path that a hypergradient can take: through levels that a loss reads below it, and through shared modules.

Closed forms in fp64 with exact solves. All losses are of vectors; what is compared is the whole gradient of the top.
"""

from functools import partial
from itertools import permutations

import pytest
import torch
from torch import Tensor, nn

import scalemlo as mlo
from tests.problems import Vector
from tests.ranks import run_ranks

SGD = partial(torch.optim.SGD, lr=0.1)
CG = mlo.ConjugateGradient(max_steps=50, tolerance=1e-14)
ENGINES = {"ddp": mlo.DDP(), "fsdp": mlo.FSDP()}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def level(name: str, value: Tensor, loss, **options) -> mlo.Level:
    kind = type(name.title(), (mlo.Level,), {"loss": loss})
    return kind(name, Vector(value), optimizer=SGD, **options)


def gradient_of(program: mlo.Program, name: str) -> Tensor:
    return program.trainers[name].engine.gather(dict(program.gradients()[name]))["value"]


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


# ---- a middle loss that reads a level below it -----------------------------------------------------------------------
A, B, P = normal(5, 3, seed=1), normal(4, 5, seed=2), normal(4, 3, seed=3)
X0, TARGET = normal(3, seed=4), normal(4, seed=5)


def chain(engine: mlo.engines.EngineSpec, order: str = "xyz") -> mlo.Program:
    """``z*(x) = A x`` and ``y*(x, z) = tanh(B z) + P x``, ``f1 = |y - t|^2 / 2``: no loss but y's ties y to z.

    By autograd, ``df1/dx = (P + diag(1 - tanh^2(BAx)) B A)' (y* - t)``.
    """
    levels = {
        "x": level("x", X0, lambda self, y: (y() - TARGET).square().sum() / 2 + 0.0 * self.module().sum()),
        "y": level(
            "y", best_y(X0), lambda self, z, x: (self.module() - torch.tanh(B @ z()) - P @ x()).square().sum(),
            hypergradient=CG,
        ),
        "z": level("z", A @ X0, lambda self, x: (self.module() - A @ x()).square().sum(), hypergradient=CG),
    }  # fmt: skip
    return mlo.Program([levels[name] for name in order], engine=engine)


def best_y(x: Tensor) -> Tensor:
    return torch.tanh(B @ A @ x) + P @ x


def exact() -> Tensor:
    x = X0.clone().requires_grad_()
    return torch.autograd.grad((best_y(x) - TARGET).square().sum() / 2, x)[0]


@pytest.mark.parametrize("order", ["xyz", "xzy"])
def test_a_chain_means_the_same_in_any_order(order):
    """Listed above z, y reads a level below it; listed below, one above it. Neither z nor its answer depends on y."""
    assert_equal(gradient_of(chain(mlo.Single(), order), "x"), exact())


def test_a_chain_on_two_ranks():
    def body(rank, world_size):
        return [gradient_of(chain(engine), "x") for engine in ENGINES.values()]

    for found in run_ranks(body, 2):
        for gradient in found:
            assert_equal(gradient, exact())


def test_an_estimator_may_be_chosen_for_such_a_level_even_where_it_reads_no_level_above():
    """Its best response depends on x all the same: through z."""
    scalar = torch.tensor([0.5], dtype=torch.float64)
    levels = [
        level("x", scalar, lambda self, y: (y() - 2).square().sum() / 2),
        level("y", scalar, lambda self, z: (self.module().square() / 2 - self.module() * z()).sum(), hypergradient=CG),
        level("z", scalar, lambda self, x: (self.module() - x()).square().sum() / 2, hypergradient=CG),
    ]
    program = mlo.Program(levels)
    assert program.graph.ancestors("y") == {"x"}
    assert_equal(gradient_of(program, "x"), torch.tensor([-1.5], dtype=torch.float64))


def test_two_levels_below_a_middle_one():
    """Four levels: v*(x) = A x, z*(v) = sin(B v), y*(z, v) = tanh(Q z) + C v; the list has them upside down."""
    q, c = normal(3, 4, seed=6), normal(3, 5, seed=7)
    target = normal(3, seed=8)

    def total(x: Tensor) -> Tensor:
        v = A @ x
        return (torch.tanh(q @ torch.sin(B @ v)) + c @ v - target).square().sum() / 2

    v0 = A @ X0
    z0 = torch.sin(B @ v0)
    y0 = torch.tanh(q @ z0) + c @ v0
    levels = [
        level("x", X0, lambda self, y: (y() - target).square().sum() / 2),
        level("y", y0, lambda self, z, v: (self.module() - torch.tanh(q @ z()) - c @ v()).square().sum(),
              hypergradient=CG),
        level("z", z0, lambda self, v: (self.module() - torch.sin(B @ v())).square().sum(), hypergradient=CG),
        level("v", v0, lambda self, x: (self.module() - A @ x()).square().sum(), hypergradient=CG),
    ]  # fmt: skip
    x = X0.clone().requires_grad_()
    expected = torch.autograd.grad(total(x), x)[0]
    for order in permutations(levels[1:]):
        for lower in levels:
            lower._view = None
        assert_equal(gradient_of(mlo.Program([levels[0], *order]), "x"), expected)


def test_a_middle_level_and_one_below_that_answer_each_other():
    """x above y above z, where z reads y and y's loss has the product of both.

    What is solved for y has the partial second derivatives of its loss (docs/counterexamples.md); within that, what y's
    own loss gets from z as z answers x at a fixed y must be there: ``f2_yz dz/dx`` beside ``f2_yx``.
    """
    s, t, m = normal(5, 4, seed=11), normal(5, 3, seed=12), normal(4, 5, seed=13)
    y0, target, gain = normal(4, seed=14), normal(4, seed=15), normal(5, seed=16)
    z0 = s @ y0 + t @ X0
    levels = [
        level("x", X0, lambda self, y, z: (y() - target).square().sum() / 2 + gain @ z()),
        level("y", y0, lambda self, x, z: self.module().square().sum() - self.module() @ (P @ x() + m @ z()),
              hypergradient=CG),
        level("z", z0, lambda self, x, y: (self.module() - s @ y() - t @ x()).square().sum(), hypergradient=CG),
    ]  # fmt: skip
    v = y0 - target + s.T @ gain  # df1/dy, through z too
    expected = t.T @ gain + (P + m @ t).T @ v / 2  # f2_yy = 2
    assert_equal(gradient_of(mlo.Program(levels), "x"), expected)


# ---- a module that several levels own --------------------------------------------------------------------------------
class Net(nn.Module):
    """Two parameters; ``forward`` needs both, ``size`` one of them."""

    def __init__(self, body: Tensor, head: Tensor):
        super().__init__()
        self.body, self.head = nn.Parameter(body.clone()), nn.Parameter(head.clone())

    def forward(self) -> Tensor:
        return self.head + B @ self.body

    def size(self) -> Tensor:
        return self.head.square().sum()

    def own(self) -> Tensor:
        return self.body * 1.0


@pytest.mark.parametrize("named", ["head", "body", "head, body"])
def test_a_loss_depends_on_every_owner_of_a_part_of_a_module_that_it_runs(named):
    """The top runs the net and names one owner, the other or both: the same gradient."""
    body0, head0 = A @ X0, normal(4, seed=21)
    net = Net(body0, head0)

    def loss(self, net):
        return (net() - TARGET).square().sum() / 2

    namespace = {"loss": loss}
    exec(f"def top(self, {named}): return loss(self, {named.split(',')[0]})", namespace)

    class Head(mlo.Level):
        def loss(self, x):
            return (self.module() - P @ x()).square().sum() + self.module.size()

    class Body(mlo.Level):
        def loss(self, x):
            return (self.module.own() - A @ x()).square().sum()

    levels = [
        level("x", X0, namespace["top"]),
        Head("head", net, parameters="head", optimizer=SGD, hypergradient=CG),
        Body("body", net, parameters="body", optimizer=SGD, hypergradient=CG),
    ]
    # 2 (head + B b - P x) + 2 head = 0 and b* = A x, so head* = (P x - B b*) / 2; all of it is linear
    jacobian = (P - B @ A) / 2 + B @ A
    residual = head0 + B @ body0 - TARGET
    assert_equal(gradient_of(mlo.Program(levels), "x"), jacobian.T @ residual)


def test_a_part_that_the_loss_does_not_reach_is_no_error():
    """The top runs a method of the net that needs the head alone: the body, which it does not name, adds nothing."""
    net = Net(A @ X0, normal(4, seed=22))

    class Top(mlo.Level):
        def loss(self, head):
            return head.size() / 2

    class Head(mlo.Level):
        def loss(self, x):
            return (self.module() - P @ x()).square().sum()

    class Body(mlo.Level):
        def loss(self):
            return self.module.own().square().sum()

    levels = [
        Top("x", Vector(X0), optimizer=SGD),
        Body("body", net, parameters="body", optimizer=SGD),
        Head("head", net, parameters="head", optimizer=SGD, hypergradient=CG),
    ]
    program = mlo.Program(levels)
    assert program.graph.uppers("head") == ["x", "body"] and program.graph.reads("head") == ["x"]
    assert_equal(gradient_of(program, "x"), P.T @ net.head.detach())


def test_without_a_dependence_there_is_still_nothing_to_choose():
    levels = [
        level("x", X0, lambda self, y, w: y().sum() + w().sum()),
        level("w", X0, lambda self, x: (self.module() - x()).square().sum()),
        level("y", X0, lambda self, z: (self.module() - z()).square().sum(), hypergradient=CG),
        level("z", X0, lambda self: self.module().square().sum()),
    ]
    with pytest.raises(ValueError, match="'y': hypergradient=ConjugateGradient.*no effect.*nor one below that does"):
        mlo.LevelGraph(levels)
