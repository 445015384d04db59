"""Solvers of ``H s = v``: on matrices of known spectrum in fp64, and inside programs on every engine."""

import math
import warnings
from functools import partial

import pytest
import torch

import scalemlo as mlo
from scalemlo.hypergradients.base import Status
from scalemlo.hypergradients.conjugate_gradient import ConjugateGradient, conjugate_gradient
from scalemlo.hypergradients.neumann import Neumann, neumann_series
from scalemlo.hypergradients.nystrom import Nystrom, Sketch
from scalemlo.hypergradients.soba import SOBA, gradient_steps
from tests.ranks import run_ranks
from tests.solver_cases import SIZE, Bilevel, Dense, normal, symmetric, to_flat, to_shards

V = to_shards(normal(SIZE, seed=9))
SPREAD = torch.linspace(1.0, 30.0, SIZE)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# ---- conjugate gradients -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("eigenvalues", [[2.0], [1.0, 3.0], [0.5, 1.0, 4.0], [1.0, 2.0, 5.0, 9.0], SPREAD.tolist()])
def test_cg_takes_as_many_steps_as_there_are_distinct_eigenvalues(eigenvalues):
    matvec = Dense(symmetric(torch.tensor(eigenvalues).repeat(SIZE)[:SIZE]))
    result = conjugate_gradient(matvec, V, max_steps=50, tolerance=1e-12)
    assert result.status is Status.CONVERGED
    assert result.num_iterations == len(eigenvalues)
    assert result.num_hvps == matvec.num_products == len(eigenvalues) + 1  # and the residual
    assert relative(to_flat(result.value), torch.linalg.solve(matvec.matrix, to_flat(V))) < 1e-12
    assert result.residual == pytest.approx(matvec.residual(result.value, V), abs=1e-15)


def test_cg_error_falls_with_the_root_of_the_condition_number():
    condition = 400.0
    matrix = symmetric(torch.logspace(0, math.log10(condition), SIZE))
    exact = torch.linalg.solve(matrix, to_flat(V))
    rate = (math.sqrt(condition) - 1) / (math.sqrt(condition) + 1)
    for k in range(1, SIZE):
        result = conjugate_gradient(Dense(matrix), V, max_steps=k)
        error = to_flat(result.value) - exact
        assert math.sqrt(error @ matrix @ error) <= 2 * rate**k * math.sqrt(exact @ matrix @ exact)
        assert result.status is Status.DONE and result.num_iterations == k and result.num_hvps == k + 1
        assert result.residual == pytest.approx(Dense(matrix).residual(result.value, V), rel=1e-12)


@pytest.mark.parametrize("damping", [0.1, 7.0])
def test_cg_solves_the_damped_system(damping):
    matvec = Dense(symmetric(SPREAD - 1.0))  # singular without
    result = conjugate_gradient(matvec, V, max_steps=40, tolerance=1e-13, damping=damping)
    exact = torch.linalg.solve(matvec.matrix + damping * torch.eye(SIZE, dtype=torch.float64), to_flat(V))
    assert relative(to_flat(result.value), exact) < 1e-12
    assert result.status is Status.CONVERGED and matvec.residual(result.value, V, damping) < 1e-13


def test_cg_stops_at_its_limit():
    result = conjugate_gradient(Dense(symmetric(SPREAD)), V, max_steps=3, tolerance=1e-6)
    assert result.status is Status.MAX_STEPS and result.num_iterations == 3 and result.residual > 1e-6


@pytest.mark.parametrize("num_distinct", [1, 3])
def test_cg_reports_singular_systems(num_distinct):
    """v has a part in the null space: no solution. The iterate before solves the rest as well as zero does."""
    eigenvalues = torch.linspace(1.0, 3.0, num_distinct).repeat(SIZE)[:SIZE]
    eigenvalues[3] = 0.0
    matvec = Dense(symmetric(eigenvalues))
    result = conjugate_gradient(matvec, V, max_steps=50, tolerance=1e-10)
    assert result.status is Status.SINGULAR
    assert result.num_iterations == num_distinct
    assert to_flat(result.value).isfinite().all() and to_flat(result.value).norm() < 1e3
    assert result.residual == pytest.approx(matvec.residual(result.value, V), rel=1e-10)


def test_cg_on_zero_gives_the_estimate_of_the_identity():
    result = conjugate_gradient(Dense(torch.zeros(SIZE, SIZE, dtype=torch.float64)), V, max_steps=5, tolerance=1e-5)
    assert result.status is Status.SINGULAR and torch.equal(to_flat(result.value), to_flat(V))
    assert result.residual == 1.0 and result.num_hvps == 1


def test_cg_reports_negative_curvature():
    eigenvalues = SPREAD.clone()
    eigenvalues[5] = -0.5
    matvec = Dense(symmetric(eigenvalues))
    result = conjugate_gradient(matvec, V, max_steps=50, tolerance=1e-10)
    assert result.status is Status.INDEFINITE and 0 < result.num_iterations < SIZE
    assert result.residual == pytest.approx(matvec.residual(result.value, V), rel=1e-10)
    damped = conjugate_gradient(matvec, V, max_steps=50, tolerance=1e-10, damping=0.6)  # as the message advises
    assert damped.status is Status.CONVERGED

    at_once = Dense(-symmetric(SPREAD))
    result = conjugate_gradient(at_once, V, max_steps=50, tolerance=1e-10)
    assert result.status is Status.INDEFINITE and result.num_iterations == 0
    assert torch.equal(to_flat(result.value), to_flat(V))
    assert result.residual == pytest.approx(at_once.residual(V, V), rel=1e-12)


def test_cg_believes_the_true_residual_not_the_recurrence():
    """In fp32 on an ill-conditioned matrix the recurrence reaches what the true residual has not."""
    matrix = symmetric(torch.logspace(0, 3, SIZE)).float()
    v = V.map(torch.Tensor.float)
    result = conjugate_gradient(Dense(matrix), v, max_steps=100, tolerance=1e-5)
    assert result.status is Status.CONVERGED
    assert Dense(matrix.double()).residual(result.value.map(torch.Tensor.double), V) < 1e-5
    assert result.num_hvps > result.num_iterations + 1  # claimed more than once


# ---- Neumann series ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("num_terms", [1, 2, 7, 20])
def test_neumann_equals_the_dense_series(num_terms):
    matvec, step_size, eye = Dense(symmetric(SPREAD)), 0.05, torch.eye(SIZE, dtype=torch.float64)
    result = neumann_series(matvec, V, scale=step_size, num_terms=num_terms)
    powers = [torch.linalg.matrix_power(eye - step_size * matvec.matrix, k) for k in range(num_terms + 1)]
    expected = step_size * sum(powers[:-1]) @ to_flat(V)
    assert relative(to_flat(result.value), expected) < 1e-12
    assert result.residual == pytest.approx(float((powers[-1] @ to_flat(V)).norm() / to_flat(V).norm()), rel=1e-10)
    assert result.residual == pytest.approx(matvec.residual(result.value, V), rel=1e-10)
    assert result.status is Status.DONE and result.num_hvps == matvec.num_products == num_terms


def test_preconditioned_neumann_equals_its_dense_series():
    matvec, eye = Dense(symmetric(SPREAD)), torch.eye(SIZE, dtype=torch.float64)
    diagonal = torch.linspace(0.01, 0.06, SIZE, dtype=torch.float64)
    step = eye - diagonal.diag() @ matvec.matrix
    result = neumann_series(matvec, V, scale=to_shards(diagonal), num_terms=9)
    expected = sum(torch.linalg.matrix_power(step, k) for k in range(9)) @ (diagonal * to_flat(V))
    assert relative(to_flat(result.value), expected) < 1e-12
    assert result.residual == pytest.approx(matvec.residual(result.value, V), rel=1e-10)


def test_neumann_stops_at_its_tolerance():
    matvec = Dense(symmetric(torch.linspace(1.0, 2.0, SIZE)))  # residuals fall threefold at least
    result = neumann_series(matvec, V, scale=2 / 3, num_terms=100, tolerance=1e-6)
    assert result.status is Status.CONVERGED and result.num_iterations <= math.ceil(math.log(1e6, 3))
    assert matvec.residual(result.value, V) <= 1e-6
    assert neumann_series(matvec, V, scale=2 / 3, num_terms=3, tolerance=1e-6).status is Status.MAX_STEPS


@pytest.mark.parametrize("step_size", [0.07, 0.2, 100.0])  # 2 / h_max = 0.0667
def test_neumann_reports_divergence(step_size):
    result = neumann_series(Dense(symmetric(SPREAD)), V, scale=step_size, num_terms=60)
    assert result.status is Status.DIVERGED and result.residual > 1.0
    assert to_flat(result.value).isfinite().all()
    assert step_size == 0.07 or result.num_iterations < 10  # no products wasted on it


# ---- Nystrom -------------------------------------------------------------------------------------------------------
def draw(i: int) -> mlo.Shards:
    return to_shards(normal(SIZE, seed=100 + i))


@pytest.mark.parametrize("rank", [SIZE, 2 * SIZE])
def test_nystrom_is_exact_with_enough_test_vectors(rank):
    matvec, damping = Dense(symmetric(SPREAD)), 0.3
    sketch = Sketch.of(matvec, draw, rank)
    expected = torch.linalg.solve(matvec.matrix + damping * torch.eye(SIZE, dtype=torch.float64), to_flat(V))
    assert relative(to_flat(sketch.solve(V, damping)), expected) < 1e-9
    assert not sketch.is_indefinite and matvec.num_products == rank


@pytest.mark.parametrize("damping", [1e-8, 1e-2, 10.0])
def test_nystrom_is_exact_on_low_rank_hessians(damping):
    eigenvalues = torch.zeros(SIZE)
    eigenvalues[:3] = torch.tensor([5.0, 1.0, 0.2])
    matrix = symmetric(eigenvalues)
    sketch = Sketch.of(Dense(matrix), draw, 6)
    inverse = symmetric(1 / (eigenvalues.double() + damping))
    tolerance = 1e-13 + 1e-15 * 5.0 / damping  # rounding error of H over the smallest eigenvalue of the damped system
    assert relative(to_flat(sketch.solve(V, damping)), inverse @ to_flat(V)) < tolerance
    top = sketch.eigenvalues.sort(descending=True).values
    torch.testing.assert_close(top[:3], eigenvalues[:3].double(), rtol=1e-10, atol=0)
    assert (top[3:].abs() < 1e-12).all()


def test_nystrom_solve_equals_woodbury():
    """The textbook formula, rank below the dimension."""
    matrix, damping = symmetric(SPREAD), 0.5
    x = torch.stack([to_flat(draw(i)) for i in range(4)], 1)
    y, v = matrix @ x, to_flat(V)
    expected = v / damping - y @ torch.linalg.solve(x.T @ y + y.T @ y / damping, y.T @ v) / damping**2
    assert relative(to_flat(Sketch.of(Dense(matrix), draw, 4).solve(V, damping)), expected) < 1e-11


def test_nystrom_stays_finite_on_indefinite_hessians():
    eigenvalues = SPREAD * (-1) ** torch.arange(SIZE)
    matrix, damping = symmetric(eigenvalues), 1e-3
    sketch = Sketch.of(Dense(matrix), draw, 2 * SIZE)
    assert sketch.is_indefinite
    q = torch.linalg.eigh(matrix)
    expected = q.eigenvectors @ ((q.eigenvectors.T @ to_flat(V)) / (q.eigenvalues.abs() + damping))
    assert relative(to_flat(sketch.solve(V, damping)), expected) < 1e-9


def test_nystrom_on_a_zero_hessian():
    sketch = Sketch.of(Dense(torch.zeros(SIZE, SIZE, dtype=torch.float64)), draw, 3)
    torch.testing.assert_close(to_flat(sketch.solve(V, 0.5)), 2 * to_flat(V))


def test_nystrom_reuses_its_sketch():
    problem = Bilevel(SPREAD)
    program = problem.program(Nystrom(rank=5, damping=0.1, refresh_every=3), mlo.Single())
    history = program.run(7, progress=False)
    assert [record.get("hvps/lower", 0) for record in history.steps] == [5, 0, 0, 5, 0, 0, 5]
    memory = program.trainers["lower"].memory["upper"]
    assert memory["num_solves"] == 7
    assert all(isinstance(x, mlo.Shards | torch.Tensor | int | float) for x in memory.values())
    state = torch.get_rng_state()
    program.gradients()
    assert torch.equal(torch.get_rng_state(), state)


def test_nystrom_draws_a_new_sketch_each_time():
    program = Bilevel(SPREAD).program(Nystrom(rank=2), mlo.Single())
    found = []
    for _ in range(2):
        program.gradients()
        found.append(program.trainers["lower"].memory["upper"]["basis_0"]["a"])
    assert not torch.allclose(*found)


# ---- SOBA ----------------------------------------------------------------------------------------------------------
def test_soba_converges_over_solves_at_its_rate():
    """On an eigenvector the error is multiplied by 1 - a h at each step, exactly."""
    matvec, step_size = Dense(symmetric(SPREAD)), 0.05
    h, q = torch.linalg.eigh(matvec.matrix)
    for i in (0, 3, SIZE - 1):
        v = to_shards(q[:, i])
        s = to_shards(torch.zeros(SIZE, dtype=torch.float64))
        for t in range(1, 30):
            before = matvec.residual(s, v)
            result = gradient_steps(matvec, v, s, step_size=step_size, num_steps=1)
            assert result.residual == pytest.approx(before, rel=1e-9) and result.status is Status.DONE
            s = result.value
            error = (to_flat(s) - q[:, i] / h[i]).norm() * h[i]
            assert float(error) == pytest.approx(float((1 - step_size * h[i]).abs() ** t), rel=1e-8, abs=1e-12)


def test_soba_goes_on_where_it_was():
    problem = Bilevel(torch.linspace(1.0, 2.0, SIZE))
    program = problem.program(SOBA(step_size=0.5, num_steps=2), mlo.Single())
    v, exact = problem.w - problem.t, torch.linalg.solve(problem.h, problem.w - problem.t)
    s = torch.zeros(SIZE, dtype=torch.float64)
    for _ in range(20):
        program.gradients()
        for _ in range(2):
            s = s - 0.5 * (problem.h @ s - v)
        torch.testing.assert_close(to_flat(program.trainers["lower"].memory["upper"]["s"]), s, rtol=1e-12, atol=1e-13)
    assert relative(s, exact) < 1e-11


def test_soba_forgets_what_diverged():
    program = Bilevel(SPREAD).program(SOBA(step_size=1.0, num_steps=4), mlo.Single())
    with pytest.warns(UserWarning, match="SOBA: the residual grew"):
        program.run(1, progress=False)
    assert "s" not in program.trainers["lower"].memory["upper"]


# ---- in programs -----------------------------------------------------------------------------------------------------
NARROW = torch.linspace(1.0, 2.0, SIZE)
EXACT: dict[str, mlo.Hypergradient] = {
    "cg": ConjugateGradient(max_steps=30, tolerance=1e-13),
    "cg-retain": ConjugateGradient(max_steps=30, tolerance=1e-13, products="retain"),
    "cg-remat": ConjugateGradient(max_steps=30, tolerance=1e-13, products="remat"),
    "cg-all-steps": ConjugateGradient(max_steps=SIZE, tolerance=None),
    "neumann": Neumann(step_size=2 / 3, num_terms=30),
    "neumann-optimizer": Neumann(preconditioner="optimizer", step_size=0.9, num_terms=100, tolerance=1e-13),
    "nystrom": Nystrom(rank=2 * SIZE, damping=0.3),
    "soba": SOBA(step_size=2 / 3, num_steps=30),
}
OPTIMIZERS = {"neumann-optimizer": partial(torch.optim.SGD, lr=0.7)}


def hypergradients(rank, world_size, spec):
    return {name: Bilevel(NARROW, OPTIMIZERS.get(name)).measured(e, spec) for name, e in EXACT.items()}


@pytest.mark.parametrize("engine", ["single-1", "ddp-2", "fsdp-1", "fsdp-2"])
def test_hypergradient_equals_the_closed_form(engine):
    kind, world_size = engine.split("-")
    spec = {"single": mlo.Single, "ddp": mlo.DDP, "fsdp": mlo.FSDP}[kind]()
    damping = {"nystrom": 0.3}  # of the system that it solves exactly
    for by_rank in run_ranks(hypergradients, int(world_size), spec):
        errors = {n: relative(found, Bilevel(NARROW).expected(damping.get(n, 0.0))) for n, found in by_rank.items()}
        assert max(errors.values()) < 1e-10, errors


TRUNCATED: dict[str, mlo.Hypergradient] = {
    "cg": ConjugateGradient(max_steps=3, tolerance=None),
    "neumann": Neumann(step_size=0.05, num_terms=4),
    "neumann-optimizer": Neumann(preconditioner="optimizer", num_terms=4),
    "nystrom": Nystrom(rank=4, damping=0.1),
    "soba": SOBA(step_size=0.05, num_steps=3),
}


def trajectories(rank, world_size, spec):
    """Upper weights after some steps, with an adaptive optimizer and clipping below."""
    found = {}
    for name, estimator in TRUNCATED.items():
        program = Bilevel(SPREAD, partial(torch.optim.AdamW, lr=1e-2)).program(estimator, spec)
        program.trainers["lower"].level.max_grad_norm = 1.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the optimizer's series may diverge here; every engine must see the same
            program.run(3, progress=False)
        upper = program.trainers["upper"]
        found[name] = upper.engine.gather(dict(upper.weights()))["x"].detach()
    return found


def test_inexact_estimates_do_not_depend_on_the_engine():
    (expected,) = run_ranks(trajectories, 1, mlo.Single())
    for spec in (mlo.DDP(), mlo.FSDP()):
        for by_rank in run_ranks(trajectories, 2, spec):
            errors = {name: relative(found, expected[name]) for name, found in by_rank.items()}
            assert max(errors.values()) < 1e-10, errors


def test_history_records_solves_and_a_bad_one_warns_once():
    program = Bilevel(SPREAD).program(ConjugateGradient(max_steps=2, tolerance=1e-9), mlo.Single())
    with pytest.warns(UserWarning, match="level 'lower'.*ConjugateGradient: stopped at its limit of steps") as caught:
        history = program.run(3, progress=False)
    assert len(caught) == 1
    assert history.solves == {"lower/max_steps": 3}
    for record in history.steps:
        assert record["hvps/lower"] == 3 and record["iterations/lower"] == 2 and 1e-9 < record["residual/lower"] < 1


def test_ghost_products_take_the_gradient_themselves():
    assert Neumann().needs_gradient is False and Neumann(mixed="ghost").mixed == "ghost"
    assert Neumann(preconditioner="optimizer").needs_gradient is True
    with pytest.raises(ValueError, match="Neumann needs that gradient first"):
        Neumann(preconditioner="optimizer", mixed="ghost")


def test_a_product_that_is_not_finite_shows():
    """No estimate may look healthy, and no later one may inherit it."""
    bad = Dense(torch.full((SIZE, SIZE), torch.nan, dtype=torch.float64))
    results = [
        conjugate_gradient(bad, V, max_steps=5, tolerance=1e-5),
        neumann_series(bad, V, scale=0.1, num_terms=5),
        gradient_steps(bad, V, V, step_size=0.1, num_steps=2),
    ]
    assert [r.status for r in results] == [Status.DIVERGED] * 3
    assert not to_flat(results[0].value).isfinite().any()
    assert Sketch.of(bad, draw, 3) is None


def test_a_zero_direction_needs_no_products():
    matvec, zero = Dense(symmetric(SPREAD)), V * 0.0
    for result in (
        conjugate_gradient(matvec, zero, max_steps=5, tolerance=1e-5),
        neumann_series(matvec, zero, scale=0.05, num_terms=5),
    ):
        assert result.status is Status.EXACT and not to_flat(result.value).any() and matvec.num_products == 0
    assert gradient_steps(matvec, zero, V, step_size=0.05, num_steps=1).residual is None


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (Neumann, dict(num_terms=0)),
        (Neumann, dict(num_terms=2.5)),
        (Neumann, dict(step_size=0.0)),
        (Neumann, dict(step_size=math.nan)),
        (Neumann, dict(tolerance=-1e-3)),
        (Neumann, dict(preconditioner="adam")),
        (Neumann, dict(products="both")),
        (ConjugateGradient, dict(max_steps=0)),
        (ConjugateGradient, dict(max_steps=True)),
        (ConjugateGradient, dict(tolerance=0.0)),
        (ConjugateGradient, dict(damping=-1.0)),
        (Nystrom, dict(rank=0)),
        (Nystrom, dict(damping=0.0)),
        (Nystrom, dict(refresh_every=0)),
        (Nystrom, dict(seed=-1)),
        (SOBA, dict(step_size=math.inf)),
        (SOBA, dict(step_size=0.1, num_steps=0)),
        (SOBA, dict(step_size=0.1, mixed="exact")),
    ],
)
def test_fields_out_of_range(cls, options):
    (name, value) = list(options.items())[-1]
    with pytest.raises(ValueError) as raised:
        cls(**options)
    assert f"{name}={value!r}" in str(raised.value)
