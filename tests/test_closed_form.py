"""Hypergradients and schedules known in closed form, in fp64, on graphs of every shape.

Every level here is a quadratic whose Hessian is the identity, also after the levels below it have answered, so that
`Identity` is exact and one Newton step gives a best response. The oracle composes best responses with plain autograd
and knows nothing of paths.
"""

import inspect
from functools import partial

import pytest
import torch
from torch import Tensor

import scalemlo as mlo
from tests.problems import Vector
from tests.ranks import run_ranks

SIZE = 5  # odd: uneven shards on two ranks


# Per graph: for each level, top to bottom, the levels above that its loss reads and the levels below that it reads.
GRAPHS: dict[str, dict[str, tuple[list[str], list[str]]]] = {
    "bilevel": {"a": ([], ["b"]), "b": (["a"], [])},
    "chain": {"a": ([], ["c"]), "b": (["a"], ["c"]), "c": (["b"], [])},
    "chain_of_four": {"a": ([], ["d"]), "b": (["a"], ["c"]), "c": (["b"], ["d"]), "d": (["c"], [])},
    "diamond": {"a": ([], ["b", "c"]), "b": (["a"], ["c"]), "c": (["a", "b"], [])},
    "two_paths": {"a": ([], ["d"]), "b": (["a"], []), "c": (["a"], []), "d": (["b", "c"], [])},
    "two_uppers": {"a": ([], ["c"]), "b": ([], ["c"]), "c": (["a", "b"], [])},
    "two_lowers": {"a": ([], ["b", "c"]), "b": (["a"], []), "c": (["a"], [])},
}
DAGS_ON_RANKS = ("chain", "diamond", "two_paths", "two_uppers", "two_lowers")


class Quadratic:
    """The losses of one graph, with random coefficients."""

    def __init__(self, shape: str):
        generator = torch.Generator().manual_seed(5)
        draw = partial(torch.randn, generator=generator, dtype=torch.float64)
        self.graph = GRAPHS[shape]
        self.matrix = {(n, u): draw(SIZE, SIZE) for n, (uppers, _) in self.graph.items() for u in uppers}
        self.pull = {(n, low): draw(SIZE) for n, (_, lowers) in self.graph.items() for low in lowers}
        self.centre = {n: draw(SIZE) for n in self.graph}
        self.start = {n: draw(SIZE) for n in self.graph}

    def loss(self, name: str, values: dict[str, Tensor]) -> Tensor:
        uppers, lowers = self.graph[name]
        response = self.centre[name] + sum(self.matrix[name, u] @ values[u] for u in uppers)
        loss = (values[name] - response).square().sum() / 2
        for low in lowers:
            loss = loss + self.pull[name, low] @ values[low]  # linear: the Hessian of a middle level stays the identity
            if not uppers:
                loss = loss + values[low].square().sum() / 2
        if not uppers and len(lowers) > 1:  # the directions of the two lower levels depend on each other
            loss = loss + values[lowers[0]] @ values[lowers[1]]
        return loss

    # ---- the oracle ------------------------------------------------------------------------------------------------
    def answering(self, name: str) -> list[str]:
        """Levels whose best response depends on `name`, upper ones first."""
        found: list[str] = []
        for other, (uppers, _) in self.graph.items():
            if set(uppers) & {name, *found}:
                found.append(other)
        return found

    def total(self, name: str, values: dict[str, Tensor]) -> Tensor:
        """The loss of a level once everyone who depends on it has answered."""
        for other in self.answering(name):
            values = values | {other: self.best_response(other, values)}
        return self.loss(name, values)

    def best_response(self, name: str, values: dict[str, Tensor]) -> Tensor:
        zero = torch.zeros(SIZE, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(self.total(name, values | {name: zero}), zero, create_graph=True)
        return zero - gradient  # a Newton step

    def values_for(self, name: str) -> dict[str, Tensor]:
        """Where the gradient of `name` is compared: those who depend on it have answered, the others are anywhere."""
        values = dict(self.start)
        for other in self.answering(name):
            values[other] = self.best_response(other, values).detach()
        return values

    def expected(self, name: str) -> Tensor:
        own = self.start[name].clone().requires_grad_()
        values = self.values_for(name) | {name: own}
        return torch.autograd.grad(self.total(name, values), own)[0]

    # ---- the program ---------------------------------------------------------------------------------------------
    def level(self, name: str, value: Tensor, estimator: mlo.Hypergradient | None = None) -> mlo.Level:
        problem, reads = self, [*self.graph[name][0], *self.graph[name][1]]

        class Own(mlo.Level):
            def loss(self, **views):
                values = {other: view() for other, view in views.items()}
                return problem.loss(name, values | {name: self.module()})

        kinds = inspect.Parameter
        Own.loss.__signature__ = inspect.Signature(
            [kinds("self", kinds.POSITIONAL_OR_KEYWORD), *(kinds(n, kinds.POSITIONAL_OR_KEYWORD) for n in reads)]
        )
        estimator = estimator if self.graph[name][0] else None  # a level that reads none above has no use for one
        return Own(name, Vector(value), optimizer=partial(torch.optim.SGD, lr=1.0), hypergradient=estimator)

    def measured(
        self, name: str, spec: mlo.engines.EngineSpec, estimators: dict[str, mlo.Hypergradient] | None = None
    ) -> Tensor:
        values = self.values_for(name)
        levels = [self.level(n, values[n], (estimators or {}).get(n)) for n in self.graph]
        program = mlo.Program(levels, engine=spec)
        gradient = program.gradients()[name]
        return program.trainers[name].engine.gather(dict(gradient))["value"]


def test_bilevel_quadratic():
    """L = |w - A x|^2 / 2 and F = |w - t|^2 / 2 at w = A x: dF/dx = A^T (w - t)."""
    a, t = torch.randn(SIZE, 3, dtype=torch.float64), torch.randn(SIZE, dtype=torch.float64)
    x = torch.randn(3, dtype=torch.float64)

    class Lower(mlo.Level):
        def loss(self, upper):
            return (self.module() - a @ upper()).square().sum() / 2

    class Up(mlo.Level):
        def loss(self, lower):
            return (lower() - t).square().sum() / 2

    sgd = partial(torch.optim.SGD, lr=0.1)
    program = mlo.Program([Up("upper", Vector(x), optimizer=sgd), Lower("lower", Vector(a @ x), optimizer=sgd)])
    gradients = program.gradients()
    torch.testing.assert_close(gradients["upper"]["value"], a.T @ (a @ x - t), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients["lower"]["value"], torch.zeros(SIZE, dtype=torch.float64), rtol=0, atol=1e-14)


def test_oracle_agrees_with_the_formula_of_a_chain():
    """The oracle itself: a chain's hypergradient is the product of the hops."""
    problem = Quadratic("chain")
    a, c = problem.start["a"], problem.values_for("a")["c"]
    v = problem.pull["a", "c"] + c
    direct = a - problem.centre["a"]
    product = problem.matrix["b", "a"].T @ problem.matrix["c", "b"].T @ v
    torch.testing.assert_close(problem.expected("a"), direct + product, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", GRAPHS)
def test_gradients_of_every_level(shape):
    problem = Quadratic(shape)
    for name in problem.graph:
        expected = problem.expected(name)
        assert expected.norm() > 0.1
        torch.testing.assert_close(problem.measured(name, mlo.Single()), expected, rtol=1e-12, atol=1e-12)


# Exact where the Hessian is the identity and a step of gradient descent is a Newton step. Gradients are compared where
# the lower levels have answered, and such a step stays there: unrolling it changes nothing but the derivative.
EXACT = {
    "sama": mlo.SAMA(),
    "neumann": mlo.Neumann(num_terms=2),
    "conjugate gradient": mlo.ConjugateGradient(tolerance=1e-14),
    "soba": mlo.SOBA(step_size=1.0),
    "unrolled": mlo.Unrolled(),
}


@pytest.mark.parametrize("estimator", EXACT)
@pytest.mark.parametrize("shape", GRAPHS)
def test_any_estimator_on_any_hop(shape, estimator):
    """One hop at a time, the others by the identity; then the same estimator on all of them."""
    problem = Quadratic(shape)
    exact = EXACT[estimator]
    hops = [n for n, (uppers, _) in problem.graph.items() if uppers]
    if exact.unrolls:  # refused for levels above others, whose steps come first
        above = {upper for uppers, _ in problem.graph.values() for upper in uppers}
        hops = [n for n in hops if n not in above]
    for chosen in [*([hop] for hop in hops), hops]:
        for name in problem.graph:
            if exact.unrolls and name in chosen:  # seen after its steps, where its own gradient is another
                continue
            found = problem.measured(name, mlo.Single(), dict.fromkeys(chosen, exact))
            torch.testing.assert_close(found, problem.expected(name), rtol=1e-9, atol=1e-9)


def test_gradients_of_every_level_on_two_ranks():
    """Replicated and sharded: the same numbers, neither doubled nor halved by the number of ranks."""

    def body(rank, world_size):
        return {
            (shape, type(spec).__name__, name): Quadratic(shape).measured(name, spec)
            for shape in DAGS_ON_RANKS
            for spec in (mlo.DDP(), mlo.FSDP())
            for name in GRAPHS[shape]
        }

    for by_rank in run_ranks(body, 2):
        assert len(by_rank) == 2 * sum(len(GRAPHS[shape]) for shape in DAGS_ON_RANKS)
        for (shape, _, name), found in by_rank.items():
            torch.testing.assert_close(found, Quadratic(shape).expected(name), rtol=1e-12, atol=1e-12)


def test_fixed_point_is_where_the_levels_meet():
    """Long runs end where the composed problem has its minimum, by direct solution."""
    problem = Quadratic("bilevel")
    problem.matrix["b", "a"] = torch.linalg.qr(problem.matrix["b", "a"]).Q  # condition number 1: few steps suffice
    program = mlo.Program([problem.level(n, problem.start[n]) for n in problem.graph])
    for level, rate in (("a", 0.2), ("b", 1.0)):
        program.trainers[level].optimizer.param_groups[0]["lr"] = rate
    program.run(150, progress=False)
    a = program.trainers["a"].weights()["value"]
    own = a.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(problem.total("a", problem.start | {"a": own}), own)
    assert gradient.norm() < 1e-10
    best = problem.best_response("b", {"a": a}).detach()
    torch.testing.assert_close(program.trainers["b"].weights()["value"], best, rtol=1e-9, atol=1e-9)


# Per case: graph, unroll steps, and the steps that each level takes in one outer iteration.
SCHEDULES = [
    ("bilevel", dict(b=3), dict(a=1, b=3)),
    ("chain", dict(b=2, c=3), dict(a=1, b=2, c=6)),
    ("chain", dict(b=3, c=2), dict(a=1, b=3, c=6)),
    ("chain_of_four", dict(b=2, c=3, d=2), dict(a=1, b=2, c=6, d=12)),
    ("diamond", dict(b=2, c=3), dict(a=1, b=2, c=6)),
    ("two_paths", dict(b=2, c=3, d=2), dict(a=1, b=6, c=6, d=12)),
    ("two_uppers", dict(c=3), dict(a=1, b=1, c=3)),
    ("two_lowers", dict(b=2, c=3), dict(a=1, b=6, c=6)),
    ("two_lowers", dict(b=2, c=4), dict(a=1, b=4, c=4)),
]


@pytest.mark.parametrize(("shape", "unroll", "expected"), SCHEDULES)
def test_number_of_steps(shape, unroll, expected):
    problem = Quadratic(shape)
    levels = [problem.level(n, 0.01 * problem.start[n]) for n in problem.graph]
    for level in levels:
        level.unroll_steps = unroll.get(level.name, 1)
        level.optimizer = partial(torch.optim.SGD, lr=1e-3)
    program = mlo.Program(levels)
    order: list[str] = []
    for trainer in program.trainers.values():

        def step(gradient, trainer=trainer, original=trainer.step):
            order.append(trainer.name)
            original(gradient)

        trainer.step = step
    program.run(2, progress=False)
    assert {n: t.num_steps for n, t in program.trainers.items()} == {n: 2 * k for n, k in expected.items()}
    assert len(program.history.column("loss/a")) == 2
    # The top level steps in the last tick of an iteration, where everyone below steps too.
    first = order[: len(order) // 2]
    assert first == order[len(order) // 2 :]
    assert "a" not in first[: -len(problem.graph)]
    assert sorted(first[-len(problem.graph) :]) == sorted(problem.graph)


def test_number_of_steps_of_programs_that_interlock():
    """Two top levels whose lower levels differ in their unroll steps: one outer iteration lasts until both step."""

    class Top(mlo.Level):
        def loss(self, c, d):
            return c().sum() * d().sum() + self.module().sum()

    class Other(mlo.Level):
        def loss(self, d):
            return d().sum() + self.module().sum()

    class Low(mlo.Level):
        def loss(self, a):
            return (self.module() - a()).square().sum()

    class LowOfBoth(mlo.Level):
        def loss(self, a, b):
            return (self.module() - a() * b()).square().sum()

    def level(kind, name, **options):
        return kind(name, Vector(torch.randn(SIZE)), optimizer=partial(torch.optim.SGD, lr=1e-3), **options)

    lowers = [level(Low, "c", unroll_steps=3), level(LowOfBoth, "d", unroll_steps=2)]
    program = mlo.Program([level(Top, "a"), level(Other, "b"), *lowers])
    program.run(1, progress=False)
    assert {n: t.num_steps for n, t in program.trainers.items()} == dict(a=1, b=3, c=6, d=6)
