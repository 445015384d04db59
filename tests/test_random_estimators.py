"""Estimators that draw: forward gradients, two-point differences, scores."""

import itertools
import math
from dataclasses import replace
from functools import partial
from queue import SimpleQueue

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli

import scalemlo as mlo
from tests.problems import Problem, Vector, build_modules, full_tensors
from tests.ranks import run_ranks

ADAMW = partial(torch.optim.AdamW, lr=1e-2, betas=(0.8, 0.9), eps=1e-4, weight_decay=0.1)
CLIPPED = 1e-2
NUM_STEPS = 3


def measured(estimator: mlo.Hypergradient, spec, max_grad_norm: float | None = None) -> Tensor:
    """The hypergradient after one outer iteration of `Unrolled`, so that every estimator stands at one point."""
    problem = Problem(lower_optimizer=ADAMW)
    finetune, rater = problem.levels(*build_modules("mlp", torch.float64), mlo.Unrolled())
    finetune.unroll_steps, finetune.max_grad_norm = NUM_STEPS, max_grad_norm
    program = mlo.Program([rater, finetune], engine=spec)
    program.run(1, progress=False)
    program.trainers["finetune"].estimator = estimator
    gradient = full_tensors(program.trainers["rater"], program.gradients()["rater"])
    return torch.cat([gradient[n].flatten() for n in sorted(gradient)])


# ---- forward gradients -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("max_grad_norm", [None, CLIPPED])
def test_one_direction_gives_the_directional_derivative_times_the_direction(max_grad_norm):
    exact = measured(mlo.Unrolled(), mlo.Single(), max_grad_norm)
    for seed in range(3):
        found = measured(mlo.ForwardGradient(seed=seed), mlo.Single(), max_grad_norm)
        direction = found.sign()  # up to a common sign, which cancels
        torch.testing.assert_close(found, (exact @ direction) * direction, rtol=1e-9, atol=1e-16)


def test_directions_average_to_the_exact_gradient():
    """The projections of the exact gradient on the directions explain the mean over them."""
    exact = measured(mlo.Unrolled(), mlo.Single())
    found = measured(mlo.ForwardGradient(num_directions=100), mlo.Single())
    # E|mean of M - exact|^2 = (d - 1) |exact|^2 / M
    expected = math.sqrt((exact.numel() - 1) / 100) * float(exact.norm())
    assert 0.5 * expected < float((found - exact).norm()) < 1.5 * expected


@pytest.mark.parametrize("estimator", [mlo.ForwardGradient(num_directions=2), mlo.ZerothOrder(num_directions=2)])
@pytest.mark.parametrize("spec", [mlo.DDP(), mlo.FSDP()], ids=["ddp", "fsdp"])
def test_two_ranks_draw_what_one_draws(spec, estimator):
    expected = measured(estimator, mlo.Single())
    for found in run_ranks(lambda rank, world_size: measured(estimator, spec), 2):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-14)


# ---- two-point differences ---------------------------------------------------------------------------------------
def test_differences_come_closer_with_the_square_of_the_radius():
    exact = measured(mlo.Unrolled(), mlo.Single())
    errors = []
    for radius in (1e-2, 1e-3):
        found = measured(mlo.ZerothOrder(radius=radius), mlo.Single())
        direction = found.sign()
        errors.append(float((found - (exact @ direction) * direction).norm() / found.norm()))
    assert errors[1] < 1e-4
    assert 50 < errors[0] / errors[1] < 200


class Train(mlo.Level):
    def loss(self, batch, rater):
        losses = F.cross_entropy(self.module(batch[0]), batch[1], reduction="none")
        return mlo.weighted_mean(losses, rater(batch[0]).sigmoid()[:, 0])


class Accuracy(mlo.Level):
    def loss(self, batch, train):
        return -(train(batch[0]).argmax(1) == batch[1]).double().mean()


def accuracy_program(estimator: mlo.Hypergradient) -> mlo.Program:
    x = torch.randn(64, 4)
    data = [(x, (x[:, 0] > 0).long())]
    sgd = partial(torch.optim.SGD, lr=1.0)
    train = Train("train", nn.Linear(4, 2), data=data, optimizer=sgd, unroll_steps=2, hypergradient=estimator)
    return mlo.Program([Accuracy("rater", nn.Linear(4, 1), data=data, optimizer=sgd), train])


def test_a_loss_without_a_derivative_moves_the_upper_level():
    program = accuracy_program(mlo.ZerothOrder(num_directions=4, radius=0.5))
    before = [t.clone() for t in program.trainers["rater"].weights().values()]
    program.run(5, progress=False)
    assert any(not torch.equal(a, b) for a, b in zip(before, program.trainers["rater"].weights().values(), strict=True))


@pytest.mark.parametrize("estimator", [mlo.Identity(), mlo.SAMA(), mlo.Unrolled()])
def test_a_loss_without_a_derivative_is_refused_where_one_is_needed(estimator):
    with pytest.raises(ValueError, match="no gradient reaches that level's parameters.*ZerothOrder"):
        accuracy_program(estimator).step()


# ---- scores ------------------------------------------------------------------------------------------------------
PULLS = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
LOGITS = torch.tensor([0.3, -0.5, 1.0], dtype=torch.float64)


class Draws(mlo.Level):
    """One SGD step of rate 1 from w = 0 on -sum m_i c_i w gives w = sum m_i c_i."""

    def loss(self, selector):
        mask = mlo.sample(Bernoulli(logits=selector()))
        self.last = mask
        return -(mask * PULLS).sum() * self.module().sum()


class Outcome(mlo.Level):
    def loss(self, draws):
        return outcome(draws().sum()).round(decimals=3)  # of no derivative


def outcome(w: Tensor) -> Tensor:
    return (w - 1.0) ** 2


def expectation_of(logits: Tensor) -> Tensor:
    """Of the outcome, over all draws."""
    p, total = logits.sigmoid(), torch.zeros((), dtype=torch.float64)
    for mask in itertools.product((0.0, 1.0), repeat=len(PULLS)):
        m = torch.tensor(mask, dtype=torch.float64)
        total = total + (p**m * (1 - p) ** (1 - m)).prod() * outcome((m * PULLS).sum()).round(decimals=3)
    return total


def draws_program(seed: int, estimator=None) -> mlo.Program:
    sgd = partial(torch.optim.SGD, lr=1.0)
    zero = Vector(torch.zeros(1, dtype=torch.float64))
    draws = Draws("draws", zero, optimizer=sgd, hypergradient=estimator or mlo.Reinforce())
    return mlo.Program([Outcome("selector", Vector(LOGITS), optimizer=sgd), draws], seed=seed)


def test_scores_weighted_by_their_probability_are_the_gradient_of_the_expectation():
    baseline, found = 0.7, {}
    for seed in itertools.count():
        program = draws_program(seed)
        trainer = program.trainers["draws"]
        trainer.memory["selector"] = {"baseline": baseline}
        gradient = program.gradients()["selector"]["value"]
        found[tuple(trainer.level.last.tolist())] = gradient
        if len(found) == 2 ** len(LOGITS):
            break
    logits = LOGITS.clone().requires_grad_()
    p = logits.sigmoid()
    mean = torch.zeros(3, dtype=torch.float64)
    for mask, gradient in found.items():
        m = torch.tensor(mask, dtype=torch.float64)
        mean += (p**m * (1 - p) ** (1 - m)).prod().detach() * gradient
    expected = torch.autograd.grad(expectation_of(logits), logits)[0]
    torch.testing.assert_close(mean, expected, rtol=1e-10, atol=1e-12)


def test_the_first_outcome_only_sets_the_baseline():
    program = draws_program(0)
    torch.testing.assert_close(program.gradients()["selector"]["value"], torch.zeros(3, dtype=torch.float64))
    program.run(3, progress=False)
    assert "baseline" in program.trainers["draws"].memory["selector"]


def test_scores_learn_what_differentiation_cannot():
    program = draws_program(1)
    for _ in range(300):
        program.step()
        with torch.no_grad():
            program.trainers["draws"].weights()["value"].zero_()
    logits = program.trainers["selector"].weights()["value"]
    # from 1.9 at the start; the second best draw costs 0.25
    assert expectation_of(logits) < 0.2 * expectation_of(LOGITS)


def test_draws_are_the_same_in_every_pass_of_a_step_whatever_dropout_takes():
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    drawn = SimpleQueue()  # a list would hold what one pass has drawn: the others leave nothing behind

    class Noisy(mlo.Level):
        def loss(self, batch, rater):
            x = self.module(batch)
            mask = mlo.sample(Bernoulli(logits=rater(batch)[:, 0]))
            drawn.put(mask)
            return (x.square().mean(1) * mask).mean()

    class Up(mlo.Level):
        def loss(self, batch, noisy):
            return noisy(batch).square().mean()

    sgd = partial(torch.optim.SGD, lr=0.1)
    data = [torch.randn(32, 4)]
    low = Noisy("noisy", module, data=data, optimizer=sgd, hypergradient=mlo.Reinforce(baseline_decay=0.0))
    mlo.Program([Up("rater", nn.Linear(4, 1), data=data, optimizer=sgd), low]).step()
    seen = [drawn.get() for _ in range(drawn.qsize())]
    assert len(seen) >= 2
    assert all(torch.equal(seen[0], s) for s in seen)
    assert 0 < seen[0].mean() < 1


# ---- bad input ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mlo.ForwardGradient(num_directions=0), "num_directions=0"),
        (lambda: mlo.ZerothOrder(num_directions=0), "num_directions=0"),
        (lambda: mlo.ZerothOrder(radius=0.0), "radius=0.0 must be a finite number greater than 0"),
        (lambda: mlo.Reinforce(baseline_decay=1.0), "baseline_decay=1.0"),
        (lambda: replace(mlo.ForwardGradient(), num_steps=-1), "num_steps=-1"),
    ],
)
def test_values_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_loss_that_draws_nothing_is_refused():
    problem = Problem(lower_optimizer=ADAMW)
    program = problem.program(mlo.Reinforce(), mlo.Single())
    with pytest.raises(ValueError, match="draws with scalemlo.sample"):
        program.step()


def test_a_level_that_reads_through_others_is_refused():
    """`top` depends on `bottom` through `middle` only, yet stands above both."""
    sgd = partial(torch.optim.SGD, lr=0.1)

    class Top(mlo.Level):
        def loss(self, middle):
            return middle().sum() + self.module().sum()

    class Middle(mlo.Level):
        def loss(self, bottom):
            return self.module().square().sum() + (self.module() * bottom()).sum()

    class Bottom(mlo.Level):
        def loss(self, top, middle):
            return (self.module() - middle() * top()).square().sum()

    v = torch.randn(2, dtype=torch.float64)
    levels = [Top("top", Vector(v), optimizer=sgd), Middle("middle", Vector(v), optimizer=sgd)]
    bottom = Bottom("bottom", Vector(v), optimizer=sgd, hypergradient=mlo.ZerothOrder())
    try:
        mlo.Program([*levels, bottom]).gradients()
    except ValueError as error:
        assert "evaluates the loss of 'top'" in str(error)
