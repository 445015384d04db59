"""Gradients through three and four levels in closed form, in fp64, on quadratics whose Hessians are no identity.

Three levels: the adjoint formula of Giovannelli, Kent and Vicente 2025, "A stochastic gradient method for trilevel
optimization" (arXiv:2505.06805). Four levels: the unrolled gradient of Sato, Tanaka and Takeda 2021, "A Gradient Method
for Multilevel Optimization" (arXiv:2105.13954), by autograd alone. Low rank: the Nystrom approximation of Hataya and
Yamada 2023, with the inverse by Woodbury's formula.
"""

from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from torch import Tensor

import scalemlo as mlo
from tests.problems import Vector
from tests.ranks import run_ranks

X, Y, Z = 3, 5, 7  # odd: uneven shards on two ranks
SGD = partial(torch.optim.SGD, lr=0.1)
CG = mlo.ConjugateGradient(max_steps=50, tolerance=1e-14)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def symmetric(eigenvalues: Tensor, seed: int) -> Tensor:
    q = torch.linalg.qr(normal(len(eigenvalues), len(eigenvalues), seed=seed)).Q
    return q @ eigenvalues.double().diag() @ q.T


def gradient_of(program: mlo.Program, level: str) -> Tensor:
    gradient = program.gradients()[level]
    return program.trainers[level].engine.gather(dict(gradient))["value"]


# ---- three levels --------------------------------------------------------------------------------------------------
@dataclass
class Trilevel:
    """x above y above z, each level reading both others.

    With ``f1 = |x|^2/2 + |y - t|^2/2 + |z - u|^2/2``, ``f2 = y'By/2 - y'(Px + b) + q'z + c |z|^2/2`` and
    ``f3 = z'Cz/2 - z'(Sy + Tx + d)``: the curvature c is what the middle level sees of the lower one.
    """

    curvature: float = 0.0
    b: Tensor = field(default_factory=lambda: symmetric(torch.linspace(0.5, 3, Y), 1))
    c: Tensor = field(default_factory=lambda: symmetric(torch.linspace(0.7, 4, Z), 2))
    p: Tensor = field(default_factory=lambda: normal(Y, X, seed=3))
    s: Tensor = field(default_factory=lambda: normal(Z, Y, seed=4))
    t: Tensor = field(default_factory=lambda: normal(Z, X, seed=5))

    def __post_init__(self):
        self.y0, self.z0, self.q, self.x0 = (normal(n, seed=6 + i) for i, n in enumerate((Y, Z, Z, X)))

    def best_z(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.linalg.solve(self.c, self.s @ y + self.t @ x)

    def best_y(self, x: Tensor) -> Tensor:
        """The minimum of ``f2(x, y, z*(x, y))``, from its normal equations."""
        z_y, z_x = torch.linalg.solve(self.c, self.s), torch.linalg.solve(self.c, self.t)
        hessian = self.b + self.curvature * z_y.T @ z_y
        return torch.linalg.solve(hessian, self.p @ x - z_y.T @ (self.q + self.curvature * z_x @ x))

    def total(self, x: Tensor) -> Tensor:
        """f1 once both levels below have answered."""
        y = self.best_y(x)
        return self.f1(x, y, self.best_z(x, y))

    def f1(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return (x.square().sum() + (y - self.y0).square().sum() + (z - self.z0).square().sum()) / 2

    def adjoint(self, *, with_curvature: bool) -> Tensor:
        """Giovannelli, Kent and Vicente: from z to y to x, one linear system with f3's Hessian and one with f2's.

        f2's second derivatives are total ones, through z*(x, y), ``with_curvature``, and partial ones without.
        """
        x = self.x0
        y = self.best_y(x)
        z = self.best_z(x, y)
        curvature = self.curvature if with_curvature else 0.0
        z_y, z_x = torch.linalg.solve(self.c, self.s), torch.linalg.solve(self.c, self.t)
        hessian, mixed = self.b + curvature * z_y.T @ z_y, self.p - curvature * z_y.T @ z_x
        by_z = z - self.z0
        by_y = y - self.y0 + z_y.T @ by_z
        return x + z_x.T @ by_z + mixed.T @ torch.linalg.solve(hessian, by_y)

    def program(self, spec: mlo.engines.EngineSpec) -> mlo.Program:
        problem = self

        class First(mlo.Level):
            def loss(self, y, z):
                return problem.f1(self.module(), y(), z())

        class Second(mlo.Level):
            def loss(self, x, z):
                own, low = self.module(), z()
                loss = own @ problem.b @ own / 2 - own @ (problem.p @ x()) + problem.q @ low
                return loss + problem.curvature * low.square().sum() / 2

        class Third(mlo.Level):
            def loss(self, x, y):
                own = self.module()
                return own @ problem.c @ own / 2 - own @ (problem.s @ y() + problem.t @ x())

        best_y = self.best_y(self.x0)
        levels = [
            First("x", Vector(self.x0), optimizer=SGD),
            Second("y", Vector(best_y), optimizer=SGD, hypergradient=CG),
            Third("z", Vector(self.best_z(self.x0, best_y)), optimizer=SGD, hypergradient=CG),
        ]
        return mlo.Program(levels, engine=spec)


def total_gradient(problem: Trilevel) -> Tensor:
    x = problem.x0.clone().requires_grad_()
    return torch.autograd.grad(problem.total(x), x)[0]


@pytest.mark.parametrize("curvature", [0.0, 2.0])
def test_the_adjoint_formula_is_the_total_derivative(curvature):
    """The oracle itself, and that the curvature is no small thing."""
    problem = Trilevel(curvature)
    torch.testing.assert_close(problem.adjoint(with_curvature=True), total_gradient(problem), rtol=1e-11, atol=1e-12)


def test_trilevel_gradient_is_the_adjoint_through_three_levels():
    problem = Trilevel()
    torch.testing.assert_close(
        gradient_of(problem.program(mlo.Single()), "x"), problem.adjoint(with_curvature=True), rtol=1e-10, atol=1e-11
    )


def test_the_middle_level_is_at_its_minimum_where_its_total_gradient_vanishes():
    """``df2/dy = f2_y + (dz*/dy)' f2_z``: with either curvature, since this is of first order."""
    for curvature in (0.0, 2.0):
        found = gradient_of(Trilevel(curvature).program(mlo.Single()), "y")
        torch.testing.assert_close(found, torch.zeros(Y, dtype=torch.float64), rtol=0, atol=1e-11)


def test_second_derivatives_of_a_middle_level_are_partial_ones():
    """A limit that users must know: curvature of f2 in z does not reach the system that is solved for y."""
    problem = Trilevel(curvature=2.0)
    found = gradient_of(problem.program(mlo.Single()), "x")
    torch.testing.assert_close(found, problem.adjoint(with_curvature=False), rtol=1e-10, atol=1e-11)
    exact = problem.adjoint(with_curvature=True)
    assert (found - exact).norm() > 0.1 * exact.norm()


def test_trilevel_gradient_on_two_ranks():
    """Replicated and sharded: the adjoint, at every level."""

    def body(rank, world_size):
        return [
            {name: gradient_of(Trilevel().program(spec), name) for name in ("x", "y", "z")}
            for spec in (mlo.DDP(), mlo.FSDP())
        ]

    expected = {"x": Trilevel().adjoint(with_curvature=True)}
    expected |= {name: torch.zeros(size, dtype=torch.float64) for name, size in (("y", Y), ("z", Z))}
    for by_engine in run_ranks(body, 2):
        for found in by_engine:
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10)


# ---- four levels ---------------------------------------------------------------------------------------------------
SIZES = (3, 5, 4, 6)
STEP_SIZES = (0.0, 0.15, 0.2, 0.25)
NAMES = ("first", "second", "third", "fourth")


class FourLevels:
    """Level i is ``w_i' H_i w_i / 2 - w_i' (sum_{j<i} M_ij w_j) + sum_{k>i} p_ik' w_k``; the top adds ``|w_k|^2 / 2``.

    Everyone takes ``num_steps`` steps of gradient descent, with the step size of its level, from its start.
    """

    def __init__(self, num_steps: int):
        self.num_steps = num_steps
        self.start = [normal(n, seed=20 + i) for i, n in enumerate(SIZES)]
        self.hessian = [symmetric(torch.linspace(0.3, 3, n), 30 + i) for i, n in enumerate(SIZES)]
        pairs = [(i, j) for i in range(4) for j in range(i)]
        self.above = {(i, j): normal(SIZES[i], SIZES[j], seed=40 + 4 * i + j) for i, j in pairs}
        self.below = {(j, i): normal(SIZES[i], seed=60 + 4 * j + i) for i, j in pairs}

    def loss(self, i: int, w: list[Tensor]) -> Tensor:
        loss = w[i] @ self.hessian[i] @ w[i] / 2
        loss = loss - w[i] @ sum((self.above[i, j] @ w[j] for j in range(i)), torch.zeros(SIZES[i]).double())
        loss = loss + sum(self.below[i, k] @ w[k] for k in range(i + 1, 4))
        return loss + sum(w[k].square().sum() for k in range(1, 4)) / 2 if i == 0 else loss

    def unroll(self, above: list[Tensor]) -> list[Tensor]:
        """The iterates of all levels below ``above``, whose total gradients go through those below them."""
        i = len(above)
        if i == 4:
            return above
        w = self.start[i].clone().requires_grad_()
        for _ in range(self.num_steps):
            whole = self.unroll([*above, w])
            (gradient,) = torch.autograd.grad(self.loss(i, whole), w, create_graph=True)
            w = w - STEP_SIZES[i] * gradient
        return self.unroll([*above, w])

    def expected(self) -> tuple[Tensor, list[Tensor]]:
        """Gradient by the top level's weights, and the point that it is taken at."""
        top = self.start[0].clone().requires_grad_()
        whole = self.unroll([top])
        (gradient,) = torch.autograd.grad(self.loss(0, whole), top)
        return gradient, [w.detach() for w in whole]

    def program(self, point: list[Tensor]) -> mlo.Program:
        """Middle levels where their steps ended, the last one where its steps start."""
        solver = {i: mlo.Neumann(num_terms=self.num_steps, step_size=STEP_SIZES[i]) for i in (1, 2)}
        solver[3] = mlo.Unrolled()
        levels = []
        for i, kind in enumerate(self._kinds()):
            start = self.start[3] if i == 3 else point[i]
            options = dict(optimizer=partial(torch.optim.SGD, lr=STEP_SIZES[i] or 0.1))
            if i > 0:
                options |= dict(hypergradient=solver[i])
            if i == 3:
                options |= dict(unroll_steps=self.num_steps)
            levels.append(kind(NAMES[i], Vector(start), **options))
        return mlo.Program(levels)

    def _kinds(self) -> list[type[mlo.Level]]:
        problem = self

        class First(mlo.Level):
            def loss(self, second, third, fourth):
                return problem.loss(0, [self.module(), second(), third(), fourth()])

        class Second(mlo.Level):
            def loss(self, first, third, fourth):
                return problem.loss(1, [first(), self.module(), third(), fourth()])

        class Third(mlo.Level):
            def loss(self, first, second, fourth):
                return problem.loss(2, [first(), second(), self.module(), fourth()])

        class Fourth(mlo.Level):
            def loss(self, first, second, third):
                return problem.loss(3, [first(), second(), third(), self.module()])

        return [First, Second, Third, Fourth]


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_four_levels_unrolled(num_steps):
    """A Neumann series of K terms is K steps of gradient descent on a quadratic; the last level's steps are real."""
    problem = FourLevels(num_steps)
    expected, point = problem.expected()
    found = gradient_of(problem.program(point), "first")
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


# ---- Nystrom on a Hessian of known rank ------------------------------------------------------------------------------
RANK, DIMENSION, RIDGE = 3, 9, 0.2


@pytest.mark.parametrize(("rank", "is_exact"), [(RANK - 1, False), (RANK, True), (RANK + 2, True)])
def test_nystrom_on_a_hessian_of_known_rank(rank, is_exact):
    """``H = U D U'`` of rank 3: with k >= 3 products ``(H + ridge I)^-1`` is exact, with 2 it is not."""
    u, d = torch.linalg.qr(normal(DIMENSION, RANK, seed=70)).Q, torch.tensor([5.0, 1.0, 0.5]).double()
    a, x, w, target = (normal(*shape, seed=71 + i) for i, shape in enumerate(((DIMENSION, 4), (4,), (9,), (9,))))

    class Lower(mlo.Level):
        def loss(self, upper):
            own = self.module()
            return (d * (u.T @ own).square()).sum() / 2 - own @ (a @ upper())

    class Upper(mlo.Level):
        def loss(self, lower):
            return (lower() - target).square().sum() / 2 + self.module().square().sum() / 2

    estimator = mlo.Nystrom(rank=rank, damping=RIDGE)
    levels = [
        Upper("upper", Vector(x), optimizer=SGD),
        Lower("lower", Vector(w), optimizer=SGD, hypergradient=estimator),
    ]
    found = gradient_of(mlo.Program(levels), "upper")
    v = w - target
    solved = v / RIDGE - u @ ((u.T @ v) / (1 / d + 1 / RIDGE)) / RIDGE**2  # Woodbury
    error = float((found - (x + a.T @ solved)).norm() / found.norm())
    assert error < 1e-10 if is_exact else error > 1e-2
