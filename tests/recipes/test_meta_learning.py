"""Few-shot learning and hyperparameters: short runs of all arms, hypergradients against plain autograd in fp64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import scalemlo as mlo
from scalemlo.recipes import few_shot, hyperparameters
from scalemlo.recipes.data.few_shot_tasks import DIGITS, TaskBatches, TurnedDigits
from scalemlo.recipes.study.restart import Restart
from scalemlo.recipes.study.study import Cell
from scalemlo.runs import config as cfg
from tests.recipes.fast import run_fast

SHORT = ("steps=4", "unroll_steps=2", "implicit_steps=2", "longer_steps=4")
FAST = {
    "few_shot": (
        few_shot, "num_tasks=3", "num_test_tasks=5", "hidden=8",
        *(f"{kind}.{option}" for kind in ("sinusoids", "digits") for option in SHORT),
    ),
    "hyperparameters": (
        hyperparameters, "num_train_per_class=3", "num_validation_per_class=3", "num_noise=8", "hidden=8", "steps=6",
        "num_rates=3", "num_trainings=2", "unroll_steps=3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAST)
def test_all_arms_run(name):
    module, *overrides = FAST[name]
    result = run_fast(name, *overrides)
    assert list(result["arms"]) == list(module.ARMS)
    for scores in result["arms"].values():
        assert all(np.isfinite(value) for values in scores.values() for value in values)
        accuracy = next(values for score, values in scores.items() if "accuracy" in score)
        assert all(0 <= value <= 100 for value in accuracy)


# ---- few-shot learning -----------------------------------------------------------------------------------------------
def _few_shot(**options) -> few_shot.FewShotConfig:
    adaptation = few_shot.AdaptationConfig(learning_rate=0.02, unroll_steps=3, implicit_steps=3, **options)
    return few_shot.FewShotConfig(
        recipe="few_shot", output_dir="", num_tasks=3, num_shots=6, hidden=4, sinusoids=adaptation,
        hypergradient=cfg.ESTIMATOR_CONFIGS["conjugate_gradient"](max_steps=200, tolerance=1e-12),
    )  # fmt: skip


def _batches(program) -> list:
    """Support and query examples of the first batch of tasks."""
    return [next(iter(program.trainers[name].stream._data)) for name in ("adapted", "initialisation")]


def test_maml_is_the_derivative_through_every_task_s_own_steps(fp64):
    torch.manual_seed(0)
    program = few_shot.two_levels(Cell(_few_shot(), "", 0), "sinusoids", implicit=False)
    (_, x, y), (_, query_x, query_y) = _batches(program)
    phi = program.trainers["initialisation"].engine.module
    found = program.gradients()["initialisation"]["weights"]

    losses = []
    for t in range(len(x)):
        w = phi.weights * 1.0
        for _ in range(3):
            (gradient,) = torch.autograd.grad(_loss_at(phi, w, x[t], y[t]), w, create_graph=True)
            w = w - 0.02 * gradient
        losses.append(_loss_at(phi, w, query_x[t], query_y[t]))
    (expected,) = torch.autograd.grad(torch.stack(losses).mean(), phi.weights)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def _loss_at(network, w, x, y):
    """Mean squared error of a network of ReLUs with weights in one vector, written out."""
    sizes = [shape.numel() for shape in network._shapes]
    w1, b1, w2, b2, w3, b3 = (p.view(s) for p, s in zip(w.split(sizes), network._shapes, strict=True))
    return ((((x @ w1 + b1).relu() @ w2 + b2).relu() @ w3 + b3) - y).square().mean()


def test_implicit_maml_is_the_closed_form_of_the_paper(fp64):
    """``mean_t (1 + H_t / lambda)^-1 v_t`` at displacements that are not zero."""
    torch.manual_seed(0)
    proximity = 30.0  # above the largest negative curvature
    program = few_shot.two_levels(Cell(_few_shot(proximity=proximity), "", 0), "sinusoids", implicit=True)
    (_, x, y), (_, query_x, query_y) = _batches(program)
    phi = program.trainers["initialisation"].engine.module
    delta = program.trainers["adapted"].engine.module.values
    with torch.no_grad():
        delta.copy_(0.3 * torch.randn_like(delta))
    found = program.gradients()["initialisation"]["weights"]

    expected = torch.zeros_like(phi.weights)
    for t in range(len(x)):
        w = (phi.weights + delta[t]).detach().requires_grad_()
        (v,) = torch.autograd.grad(_loss_at(phi, w, query_x[t], query_y[t]), w)
        curvature = torch.autograd.functional.hessian(lambda w, t=t: _loss_at(phi, w, x[t], y[t]), w.detach())
        assert torch.linalg.eigvalsh(curvature)[0] > -proximity
        expected += torch.linalg.solve(torch.eye(len(v)) + curvature / proximity, v) / len(x)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_restart_puts_displacements_and_momentum_back():
    config = _few_shot()
    program = few_shot.two_levels(Cell(config, "", 0), "sinusoids", implicit=False)
    trainer = program.trainers["adapted"]
    trainer.optimizer.param_groups[0]["momentum"] = 0.9
    program.step()
    assert trainer.weights()["values"].abs().sum() > 0 and trainer.optimizer.state
    program = few_shot.two_levels(Cell(config, "", 0), "sinusoids", implicit=False)
    restart = Restart(program, "adapted")
    program.step()
    restart(program, {})
    trainer = program.trainers["adapted"]
    assert not trainer.weights()["values"].any() and not trainer.optimizer.state


def test_tasks_of_the_test_have_classes_and_images_of_their_own():
    assert len({digit for digits in DIGITS.values() for digit in digits}) == sum(map(len, DIGITS.values()))
    tasks = TurnedDigits(num_ways=3, num_support=2, num_query=4)
    _, x, y = next(iter(TaskBatches(tasks, "test", 5, 0, "support")))
    _, query, labels = next(iter(TaskBatches(tasks, "test", 5, 0, "query")))
    assert x.shape == (5, 6, 64) and query.shape == (5, 12, 64)
    assert torch.equal(y.flatten().bincount(), torch.tensor([10, 10, 10]))
    train = torch.cat(tasks._classes["train"]).unique(dim=0)
    assert not (x.flatten(0, 1)[:, None] == train[None]).all(2).any()
    assert not (x[:, :, None] == query[:, None]).all(3).any()  # no query image is a support image
    assert torch.equal(labels[0].bincount(), torch.tensor([4, 4, 4]))


def test_maml_learns_to_adapt():
    """After a few steps on sinusoids, adapted networks are nearer than those adapted from where it began."""
    adaptation = few_shot.AdaptationConfig(
        steps=40, learning_rate=0.01, unroll_steps=2, initialisation=cfg.OptimizerConfig(learning_rate=1e-2)
    )
    config = replace(_few_shot(), num_tasks=8, num_test_tasks=50, hidden=24, sinusoids=adaptation)
    errors = {}
    for name, arm in {"random": few_shot.random_initialisation, "maml": few_shot.maml}.items():
        torch.manual_seed(0)
        errors[name] = arm(Cell(config, name, 0), "sinusoids", **({"implicit": False} if name == "maml" else {}))
    assert errors["maml"] < 0.85 * errors["random"]


# ---- hyperparameters -------------------------------------------------------------------------------------------------
def _hyperparameters(**options) -> hyperparameters.HyperparametersConfig:
    return hyperparameters.HyperparametersConfig(
        **dict(
            recipe="hyperparameters", output_dir="", num_train_per_class=4, num_validation_per_class=4, num_noise=6,
            hidden=5, steps=4, num_rates=2, num_trainings=3, unroll_steps=3,
        ) | options
    )  # fmt: skip


def test_decays_and_rates_are_differentiated_through_the_training(fp64):
    torch.manual_seed(0)
    config = _hyperparameters(weight_decay=0.05, learning_rate=0.4)
    data = hyperparameters.split(config, 0)
    for name, (x, y) in vars(data).items():
        setattr(data, name, (x.double(), y))
    program = hyperparameters.two_levels(Cell(config, "", 0), data, unrolled=True)
    hyper = program.trainers["hyperparameters"].engine.module
    network = program.trainers["network"].engine.module
    with torch.no_grad():
        hyper.decay_logits += torch.randn_like(hyper.decay_logits)
        hyper.rate_logits += torch.tensor([0.3, -0.2])
    found = program.gradients()["hyperparameters"]

    def logits(w, x):
        return (x @ w["first.weight"].T + w["first.bias"]).tanh() @ w["last.weight"].T + w["last.bias"]

    w = {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters()}
    x, y = data.train
    low, high = np.log(config.decay_bounds)
    decay = (low + (high - low) * hyper.decay_logits.sigmoid()).exp()
    low, high = np.log(config.rate_bounds)
    rates = (low + (high - low) * hyper.rate_logits.sigmoid()).exp()
    for t in range(4):
        rate = rates[t // 2]
        squares = torch.cat([w["first.weight"].square().sum(0), w["last.weight"].square().sum()[None]])
        loss = F.cross_entropy(logits(w, x), y) + 0.5 * (decay * squares).sum()
        gradients = torch.autograd.grad(loss, list(w.values()), create_graph=True)
        w = {name: p - rate * g for (name, p), g in zip(w.items(), gradients, strict=True)}
    upper = F.cross_entropy(logits(w, data.validation[0]), data.validation[1])
    parameters = dict(hyper.named_parameters())
    for name, value in zip(parameters, torch.autograd.grad(upper, list(parameters.values())), strict=True):
        assert value.abs().max() > 1e-6
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-12)


def test_noise_is_found():
    """Planted: of the features half say nothing. Learned implicitly, their decay ends above that of the pixels."""
    config = _hyperparameters(
        num_train_per_class=10, num_validation_per_class=10, num_noise=64, hidden=16, steps=20, num_trainings=15,
        unroll_steps=5, decays=cfg.OptimizerConfig(learning_rate=0.2),
    )  # fmt: skip
    torch.manual_seed(0)
    program = hyperparameters.two_levels(Cell(config, "", 0), hyperparameters.split(config, 0), unrolled=False)
    program.run(60, progress=False)
    with program.inference("hyperparameters") as found:
        decay = found.decays().log()
    assert decay[64:-1].mean() - decay[:64].mean() > 0.5


def test_only_decays_are_learned_implicitly():
    config = _hyperparameters()
    program = hyperparameters.two_levels(Cell(config, "", 0), hyperparameters.split(config, 0), unrolled=False)
    assert isinstance(program.trainers["network"].estimator, mlo.ConjugateGradient)
    assert program.trainers["hyperparameters"].block.names == ("decay_logits",)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(weight_decay=2.0), "weight_decay=2.0 must be between its bounds, 0 < 1e-05 < 1.0"),
        (dict(rate_bounds=(1.0, 0.1)), "learning_rate=0.3 must be between its bounds, 0 < 1.0 < 0.1"),
        (dict(num_rates=5), "num_rates=5 must be in 1 .. steps=4"),
        (dict(unroll_steps=13), "unroll_steps=13 must be in 1 .. num_trainings"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        _hyperparameters(**options)
