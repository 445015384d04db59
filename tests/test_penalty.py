"""The penalty method against closed forms for a finite penalty, and its limits. Hessians are no multiple of I."""

from functools import partial

import pytest
import torch
from torch import Tensor

import scalemlo as mlo
from scalemlo.hypergradients import Status
from scalemlo.hypergradients.penalty import Penalty
from scalemlo.loop.lower_level import LowerLevel
from tests.problems import Problem, full_tensors, relative_error
from tests.ranks import run_ranks
from tests.test_closed_form import SIZE, Vector

SGD = partial(torch.optim.SGD, lr=0.05)
# Eigenvalues of the Hessians are in [1, 3], plus at most 1 / penalty: errors contract by 0.6 per step or faster.
MANY = dict(num_steps=60, learning_rate=0.5)
ENGINES = {"single": (mlo.Single, 1), "ddp-2": (mlo.DDP, 2), "fsdp-2": (mlo.FSDP, 2)}


class Bilevel:
    """L = (w - A x)' H (w - A x) / 2 + stopped * <sg(w) w, x>, F = (w - t)' M (w - t) / 2 + w' C x + |x|^2 / 2."""

    def __init__(self, *, direct: bool = True, stopped: float = 0.0):
        generator = torch.Generator().manual_seed(11)
        draw = partial(torch.randn, generator=generator, dtype=torch.float64)

        def symmetric(low: float, high: float) -> Tensor:
            q = torch.linalg.qr(draw(SIZE, SIZE)).Q
            return q @ torch.diag(torch.linspace(low, high, SIZE, dtype=torch.float64)) @ q.T

        self.H, self.M, self.A, self.C = symmetric(1.0, 3.0), symmetric(0.1, 1.0), draw(SIZE, SIZE), draw(SIZE, SIZE)
        self.t, self.x, self.w = draw(SIZE), draw(SIZE), draw(SIZE)
        self.C, self.direct, self.stopped = self.C * direct, direct, stopped

    def lower_loss(self, w: Tensor, x: Tensor) -> Tensor:
        d = w - self.A @ x
        return d @ self.H @ d / 2 + self.stopped * (w * mlo.constant(w) * x).sum()

    def upper_loss(self, w: Tensor, x: Tensor | None) -> Tensor:
        d = w - self.t
        loss = d @ self.M @ d / 2
        return loss if x is None else loss + w @ self.C @ x + x.square().sum() / 2

    def program(self, estimator: mlo.Hypergradient, spec=mlo.Single, rate: float = 0.05, **options) -> mlo.Program:
        problem = self

        class Lower(mlo.Level):
            def loss(self, upper):
                return problem.lower_loss(self.module(), upper())

        class Upper(mlo.Level):
            def loss(self, lower):
                return problem.upper_loss(lower(), self.module() if problem.direct else None)

        lower = Lower("lower", Vector(self.w), optimizer=partial(torch.optim.SGD, lr=rate), hypergradient=estimator)
        return mlo.Program([Upper("upper", Vector(self.x), optimizer=SGD), lower], engine=spec(), **options)

    # ---- by hand -------------------------------------------------------------------------------------------------
    def second_copy(self, penalty: float, z: Tensor) -> Tensor:
        """The y with ``dL/dy + dF/dy / penalty = 0``, stop-gradients held at z."""
        right = self.H @ self.A @ self.x - self.stopped * z * self.x + (self.M @ self.t - self.C @ self.x) / penalty
        return torch.linalg.solve(self.H + self.M / penalty, right)

    def penalised(self, penalty: float, z: Tensor) -> Tensor:
        y = self.second_copy(penalty, z)
        difference = -self.A.T @ self.H @ (y - z) + self.stopped * z * (y - z)
        return self.C.T @ y + self.x * self.direct + penalty * difference

    def exact(self, z: Tensor) -> Tensor:
        v = self.M @ (z - self.t) + self.C @ self.x
        s = torch.linalg.solve(self.H, v)
        return self.C.T @ z + self.x * self.direct + self.A.T @ v - self.stopped * z * s

    def settle(self) -> "Bilevel":
        """Put the lower weights at their best response."""
        self.w = torch.linalg.solve(self.H + self.stopped * torch.diag(self.x), self.H @ self.A @ self.x)
        return self


def measured(program: mlo.Program, level: str = "upper") -> Tensor:
    gradient = program.gradients()[level]
    return program.trainers[level].engine.gather(dict(gradient))["value"]


CASES = {"plain": {}, "no_direct_gradient": dict(direct=False), "stop_gradient": dict(stopped=0.2)}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("engine", ENGINES)
def test_equals_the_closed_form_for_a_finite_penalty(engine, case):
    (spec, world_size), problem = ENGINES[engine], Bilevel(**CASES[case])

    def body(rank, world_size):
        program = problem.program(Penalty(penalty=7.0, **MANY), spec)
        lower = program.trainers["lower"]
        before = {n: t.clone() for n, t in lower.weights().items()}
        found = measured(program)
        assert all(torch.equal(before[n], t) for n, t in lower.weights().items())
        memory = lower.memory["upper"]
        assert memory["weights"].nbytes == lower.weights().nbytes
        return found, full_tensors(lower, memory["weights"])["value"], memory["weights"].nbytes

    by_rank = run_ranks(body, world_size)
    for found, second_copy, _ in by_rank:
        torch.testing.assert_close(second_copy, problem.second_copy(7.0, problem.w), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found, problem.penalised(7.0, problem.w), rtol=1e-10, atol=1e-10)
    copies = 2 if engine == "ddp-2" else 1
    assert sum(nbytes for *_, nbytes in by_rank) == 8 * SIZE * copies  # sharded like the weights


@pytest.mark.parametrize("case", CASES)
def test_bias_falls_as_one_over_the_penalty(case):
    problem = Bilevel(**CASES[case]).settle()
    bias = []
    for penalty in (100.0, 1000.0, 10000.0):
        found = measured(problem.program(Penalty(penalty=penalty, **MANY)))
        bias.append(float((found - problem.exact(problem.w)).norm()))
    assert bias[0] / problem.exact(problem.w).norm() < 0.1
    assert bias[0] / bias[1] == pytest.approx(10, rel=0.05)
    assert bias[1] / bias[2] == pytest.approx(10, rel=0.05)


def test_result_is_an_estimate_of_the_solve():
    problem = Bilevel().settle()
    program = problem.program(Penalty(penalty=1e5, **MANY))
    program.gradients()  # takes batches
    lower, upper = program.trainers["lower"], program.trainers["upper"]
    v = upper.compute_gradient([lower]).gradients["lower"]
    _, result = lower.estimator.pull_back(v, LowerLevel(lower, upper, [upper], program.iteration.gradients.of))
    expected = torch.linalg.solve(problem.H, v["value"])
    assert relative_error(dict(result.value), {"value": expected}) < 1e-4
    assert (result.status, result.num_iterations, result.num_hvps, result.residual) == (Status.DONE, 60, 0, None)


def test_second_copy_is_its_own_iterate():
    """Two solves of n steps are one of 2n, the lower weights staying; and the penalty grows in between."""
    problem = Bilevel()
    steps = dict(learning_rate=0.1, penalty=5.0)
    twice, once = problem.program(Penalty(num_steps=3, **steps)), problem.program(Penalty(num_steps=6, **steps))
    twice.gradients()
    torch.testing.assert_close(measured(twice), measured(once), rtol=1e-12, atol=1e-12)

    growing = problem.program(Penalty(penalty=5.0, penalty_growth=2.0, **MANY))
    for penalty in (5.0, 7.0, 9.0):
        torch.testing.assert_close(measured(growing), problem.penalised(penalty, problem.w), rtol=1e-10, atol=1e-10)


def test_training_follows_the_recursion_of_the_paper():
    """F2SA by hand, both levels moving at every step, the penalty growing."""
    problem = Bilevel()
    estimator = Penalty(penalty=3.0, penalty_growth=0.5, num_steps=2, learning_rate=0.3)
    program = problem.program(estimator, rate=0.2)
    program.trainers["upper"].optimizer.param_groups[0]["lr"] = 0.01
    program.run(10, progress=False)

    x, y, z, penalty = problem.x, problem.w, problem.w, 3.0
    for _ in range(10):
        for _ in range(2):
            slope_of_upper = problem.M @ (y - problem.t) + problem.C @ x
            y = y - 0.3 * (problem.H @ (y - problem.A @ x) + slope_of_upper / penalty)
        gradient = problem.C.T @ y + x + penalty * -problem.A.T @ problem.H @ (y - z)
        x, z = x - 0.01 * gradient, z - 0.2 * problem.H @ (z - problem.A @ x)
        penalty += 0.5
    assert (z - problem.w).norm() > 0.1
    torch.testing.assert_close(program.trainers["upper"].weights()["value"], x, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(program.trainers["lower"].weights()["value"], z, rtol=1e-11, atol=1e-11)


def test_diverged_copy_starts_again():
    problem = Bilevel()
    program = problem.program(Penalty(num_steps=3, learning_rate=1e200), nonfinite="skip")
    with pytest.warns(UserWarning, match="level 'lower'.*Penalty"):
        program.run(2, progress=False)
    assert program.history.solves == {"lower/diverged": 2}
    assert program.trainers["lower"].memory["upper"]["weights"] is None


class Chain:
    """a over b over c: F = |c - t|^2 / 2 + reads * |b|^2 / 2, b = A a with a Hessian H, c = B b."""

    def __init__(self, reads_middle: bool):
        base = Bilevel()
        self.H, self.A, self.B, self.t, self.a = base.H, base.A, base.C, base.t, base.x
        self.b = self.A @ self.a
        self.c, self.reads = self.B @ self.b, float(reads_middle)

    def program(self, estimator: mlo.Hypergradient, spec) -> mlo.Program:
        p = self

        class Top(mlo.Level):
            def loss(self, c):
                return (c() - p.t).square().sum() / 2 + 0.0 * self.module().sum()

        class TopOfBoth(mlo.Level):
            def loss(self, b, c):
                return (c() - p.t).square().sum() / 2 + b().square().sum() / 2

        class Middle(mlo.Level):
            def loss(self, a):
                d = self.module() - p.A @ a()
                return d @ p.H @ d / 2

        class Bottom(mlo.Level):
            def loss(self, b):
                return (self.module() - p.B @ b()).square().sum() / 2

        levels = [
            (TopOfBoth if self.reads else Top)("a", Vector(self.a), optimizer=SGD),
            Middle("b", Vector(self.b), optimizer=SGD, hypergradient=estimator),
            Bottom("c", Vector(self.c), optimizer=SGD),  # Identity is exact
        ]
        return mlo.Program(levels, engine=spec())

    def expected(self, penalty: float) -> Tensor:
        """The part of c is linear in b, with slope B'(c - t); the direct one is |y|^2 / 2."""
        through_c = self.B.T @ (self.c - self.t)
        eye = torch.eye(SIZE, dtype=torch.float64)
        y = torch.linalg.solve(self.H + self.reads * eye / penalty, self.H @ self.b - through_c / penalty)
        return -penalty * self.A.T @ self.H @ (y - self.b)


@pytest.mark.parametrize("reads_middle", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_middle_of_a_chain(engine, reads_middle):
    """What reaches the middle level through the one below is linear in y; without a direct part that is exact."""
    (spec, world_size), problem = ENGINES[engine], Chain(reads_middle)
    found = run_ranks(lambda rank, world_size: measured(problem.program(Penalty(**MANY), spec), "a"), world_size)
    for gradient in found:
        torch.testing.assert_close(gradient, problem.expected(10.0), rtol=1e-10, atol=1e-10)
    if not reads_middle:
        exact = problem.A.T @ problem.B.T @ (problem.c - problem.t)
        torch.testing.assert_close(problem.expected(10.0), exact, rtol=1e-10, atol=1e-10)


def test_language_model_is_the_same_on_every_engine():
    """Batches split over ranks, weights sharded, example weights behind detach(): one process's numbers."""
    problem = Problem(kind="llama", lower_optimizer=SGD, warm_up_steps=2)

    def body(rank, world_size, spec):
        result = problem.hypergradient(Penalty(num_steps=3, learning_rate=0.1), spec())
        assert result.weights_untouched
        return result.gradient

    (expected,) = run_ranks(body, 1, mlo.Single)
    for spec in (mlo.DDP, mlo.FSDP):
        for found in run_ranks(body, 2, spec):
            assert relative_error(found, expected) < 1e-10


@pytest.mark.parametrize("accumulation", [1, 4])
def test_difference_of_gradients_is_a_mixed_partial_where_the_copy_is_near(accumulation):
    """Stop-gradients included: the weights of examples are made from detached losses, which move with the copy."""
    problem = Problem(lower_optimizer=SGD, warm_up_steps=0, accumulation=accumulation)
    program = problem.program(Penalty(penalty=1e6, learning_rate=1e-6), mlo.Single())
    program.gradients()  # takes batches
    lower, rater = program.trainers["finetune"], program.trainers["rater"]
    lower.memory.clear()
    v = rater.compute_gradient([lower]).gradients["finetune"]
    found, result = lower.estimator.pull_back(v, LowerLevel(lower, rater, [rater], program.iteration.gradients.of))
    expected = lower.loss_at().tangents([(lower.block, -result.value)], {"rater": rater.block})["rater"]
    assert relative_error(dict(found["rater"]), dict(expected)) < 1e-5


BAD = [
    (dict(penalty=0.0), "penalty=0.0 must be a finite number greater than 0"),
    (dict(penalty=float("inf")), "penalty=inf"),
    (dict(penalty_growth=-1.0), "penalty_growth=-1.0 must be a finite number of at least 0"),
    (dict(learning_rate=-0.1), "learning_rate=-0.1"),
    (dict(num_steps=0), "num_steps=0 must be an integer of at least 1"),
    (dict(num_steps=1.5), "num_steps=1.5"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Penalty(**{"learning_rate": 0.1} | options)


def test_options_of_other_estimators_are_refused():
    with pytest.raises(TypeError, match="mixed"):
        Penalty(learning_rate=0.1, mixed="ghost")
