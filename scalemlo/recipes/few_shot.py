"""Learn an initialisation from which a few steps on a few examples of a new task suffice.

Above, the initialisation phi, on query examples of T tasks; below, the displacement delta_t of every task from it, on
its support examples:

    min_phi  1/T sum_t F_t(phi + delta_t(phi))
    s.t.     delta_t(phi) = argmin_delta  L_t(phi + delta) + lambda/2 |delta|^2

Displacements begin at zero for every batch of tasks, so that a lower step at phi + delta is a step of the adapted
weights from phi, and its dependence on phi is in the losses, where it is differentiated. MAML is ``Unrolled`` with
lambda = 0: K steps of gradient descent, as they were made. Implicit MAML is ``ConjugateGradient`` with lambda > 0: with
v the gradient of F_t and H the Hessian of L_t, the hypergradient v - H (H + lambda)^-1 v is the paper's
(1 + H / lambda)^-1 v.

Tasks: sinusoids of random amplitude and phase (regression); and classes made of digits and their quarter turns
(classification), where the test tasks have other digits than the training tasks. Baselines: adapt a random
initialisation, with as many steps and with many; or a network trained on all training tasks at once, that is on all
sinusoids, or on all classes with a head for all of them, which a new one replaces.

References: Finn et al. 2017, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks" (arXiv:1703.03400);
Rajeswaran et al. 2019, "Meta-Learning with Implicit Gradients" (arXiv:1909.04630).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

import scalemlo as mlo

from ..distributed.ranks import Ranks
from ..runs import config as cfg
from .data.few_shot_tasks import DIGITS, Sinusoids, TaskBatches, Tasks, TurnedDigits
from .study.recipe import Recipe
from .study.restart import Repeated, Restart
from .study.study import Cell, ComparisonConfig, Outcome, compared

Kind = Literal["sinusoids", "digits"]


@dataclass(kw_only=True)
class AdaptationConfig:
    """How networks are adapted to tasks of one kind, and learn to be.

    Args:
        steps: Steps of the initialisation.
        learning_rate: Of the gradient descent that adapts.
        unroll_steps: Steps of an adaptation, in training and in test.
        longer_steps: Steps of the longer adaptation from a random initialisation.
        proximity: lambda of implicit MAML, whose test adapts with it too.
        implicit_steps: Steps of implicit MAML's adaptations, in training and in test.
        initialisation: Optimizer of the initialisation, and of the network trained on all tasks.
    """

    __pydantic_config__ = cfg.STRICT
    steps: int = 300
    learning_rate: float = 0.05
    unroll_steps: int = 5
    longer_steps: int = 500
    proximity: float = 1.0
    implicit_steps: int = 10
    initialisation: cfg.OptimizerConfig = field(default_factory=cfg.OptimizerConfig)

    def __post_init__(self) -> None:
        for name in ("learning_rate", "proximity"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")


@dataclass(kw_only=True)
class FewShotConfig(ComparisonConfig):
    """Configuration of this recipe.

    Args:
        num_tasks: Tasks per step of the initialisation.
        num_test_tasks: Tasks that an initialisation is tested on.
        tested_on: Which tasks; ``validation`` is for the choice of settings.
        num_shots: Support examples of a sinusoid.
        num_ways: Classes of a task of digits.
        num_shots_per_class: Support images of each.
        num_query: Query examples of a sinusoid, and of every class of digits.
        hidden: Hidden units of each of two layers.
        sinusoids: Adaptation to sinusoids.
        digits: Adaptation to digits.
        hypergradient: How implicit MAML differentiates through adaptations.
    """

    num_tasks: int = 16
    num_test_tasks: int = 200
    tested_on: Literal["validation", "test"] = "test"
    num_shots: int = 10
    num_ways: int = 3
    num_shots_per_class: int = 5
    num_query: int = 10
    hidden: int = 40
    sinusoids: AdaptationConfig = field(default_factory=AdaptationConfig)
    digits: AdaptationConfig = field(default_factory=AdaptationConfig)
    hypergradient: cfg.HypergradientConfig = field(default_factory=cfg.ESTIMATOR_CONFIGS["conjugate_gradient"])

    def __post_init__(self) -> None:
        super().__post_init__()
        fewest = 4 * min(map(len, DIGITS.values()))
        if not 2 <= self.num_ways <= fewest:
            raise ValueError(f"num_ways={self.num_ways} must be in 2 .. {fewest}, the classes of the smallest part")


class Initialisation(nn.Module):
    """A network of two hidden layers, its weights in one vector, which may be displaced in another way for every task.

    Args:
        sizes: Inputs, units of the hidden layers, outputs.
    """

    def __init__(self, sizes: Sequence[int]):
        super().__init__()
        layers = [nn.Linear(*pair) for pair in pairwise(sizes)]
        parts = [part.detach() for layer in layers for part in (layer.weight.T, layer.bias.unsqueeze(0))]
        self._shapes = [part.shape for part in parts]
        self.weights = nn.Parameter(torch.cat([part.flatten() for part in parts]))

    def forward(self, x: Tensor, displacement: Tensor | None = None) -> Tensor:
        """Outputs ``[T, N, O]``.

        Args:
            x: Inputs ``[T, N, D]``.
            displacement: Of the weights, ``[T, P]``; None for none.
        """
        weights = self.weights.expand(len(x), -1) if displacement is None else self.weights + displacement
        flat = weights.split([shape.numel() for shape in self._shapes], 1)
        parts = [part.unflatten(1, shape) for part, shape in zip(flat, self._shapes, strict=True)]
        for i in range(0, len(parts), 2):
            x = torch.baddbmm(parts[i + 1], x if i == 0 else x.relu(), parts[i])
        return x

    def with_head_of(self, other: "Initialisation") -> "Initialisation":
        """The other network, with the hidden layers of this one."""
        hidden = sum(shape.numel() for shape in self._shapes[:-2])
        with torch.no_grad():
            other.weights[:hidden] = self.weights[:hidden]
        return other


class Displacement(nn.Module):
    """What adaptation adds to the weights of every task, zero at first.

    Args:
        num_tasks: Tasks T.
        num_weights: Weights P of the network.
    """

    def __init__(self, num_tasks: int, num_weights: int):
        super().__init__()
        self.num_tasks = num_tasks
        self.values = nn.Parameter(torch.zeros(num_tasks, num_weights))

    def forward(self, rows: Tensor) -> Tensor:
        """Those of some tasks, ``[T, P]``."""
        return self.values[rows]


class Initialise(mlo.Level):
    """Upper level: adapted networks should do well on the query examples of their tasks."""

    tasks: Tasks

    def loss(self, batch, adapted):
        """Mean loss over tasks."""
        rows, x, y = batch
        return mlo.mean(self.tasks.losses(self.module(x, adapted(rows)), y))


class Adapt(mlo.Level):
    """Lower level: every task's displacement, on its support examples."""

    tasks: Tasks
    proximity: float

    def loss(self, batch, initialisation):
        """Sum over tasks of the loss and ``proximity/2 |delta|^2``."""
        return adaptation_loss(self, initialisation, batch)


class AdaptFixed(mlo.Level):
    """Displacements alone, from an initialisation that does not change."""

    tasks: Tasks
    proximity: float
    initialisation: Initialisation

    def loss(self, batch):
        """Sum over tasks of the loss and ``proximity/2 |delta|^2``."""
        return adaptation_loss(self, self.initialisation, batch)


def adaptation_loss(level: Adapt | AdaptFixed, initialisation, batch) -> Tensor:
    """``sum_t L_t(phi + delta_t) + lambda/2 |delta_t|^2``, whose gradient by each delta_t is that of its own task."""
    rows, x, y = batch
    displacement = level.module(rows)
    losses = level.tasks.losses(initialisation(x, displacement), y)
    return level.module.num_tasks * mlo.mean(losses + 0.5 * level.proximity * displacement.square().sum(1))


class TrainJointly(mlo.Level):
    """A baseline: one network for the examples of all tasks."""

    tasks: Tasks

    def loss(self, batch):
        """Mean loss."""
        _, x, y = batch
        return mlo.mean(self.tasks.losses(self.module(x), y))


def tasks_of(kind: Kind, config: FewShotConfig) -> Tasks:
    """The tasks of a kind."""
    if kind == "sinusoids":
        return Sinusoids(config.num_shots, config.num_query)
    return TurnedDigits(config.num_ways, config.num_shots_per_class, config.num_query)


def _sizes(config: FewShotConfig, tasks: Tasks) -> list[int]:
    return [tasks.num_inputs, config.hidden, config.hidden, tasks.num_outputs]


def two_levels(cell: Cell[FewShotConfig], kind: Kind, *, implicit: bool) -> mlo.Program:
    """The program.

    Args:
        cell: The arm and its seed.
        kind: Of the tasks.
        implicit: Whether it is implicit MAML.

    Returns:
        The two levels, untrained.
    """
    config, tasks = cell.config, tasks_of(kind, cell.config)
    options: AdaptationConfig = getattr(config, kind)
    steps = options.implicit_steps if implicit else options.unroll_steps
    query, support = (TaskBatches(tasks, "train", config.num_tasks, cell.seed, part) for part in ("query", "support"))
    network = Initialisation(_sizes(config, tasks))
    upper = Initialise(
        "initialisation", network, data=query, optimizer=options.initialisation.optimizer(),
        scheduler=options.initialisation.scheduler(options.steps),
    )  # fmt: skip
    lower = Adapt(
        "adapted", Displacement(config.num_tasks, len(network.weights)), data=Repeated(support, steps),
        optimizer=partial(torch.optim.SGD, lr=options.learning_rate), unroll_steps=steps,
        hypergradient=config.hypergradient.build() if implicit else mlo.Unrolled(),
    )  # fmt: skip
    upper.tasks = lower.tasks = tasks
    lower.proximity = options.proximity if implicit else 0.0
    return cell.program([upper, lower])


def test(
    cell: Cell[FewShotConfig], kind: Kind, initialisation: Initialisation, steps: int, proximity: float = 0.0
) -> float:
    """Adapt to test tasks.

    Args:
        cell: The arm and its seed.
        kind: Of the tasks.
        initialisation: To adapt.
        steps: Of gradient descent.
        proximity: lambda.

    Returns:
        Mean score over the tasks.
    """
    config, tasks = cell.config, tasks_of(kind, cell.config)
    count = config.num_test_tasks
    batches = (TaskBatches(tasks, config.tested_on, count, cell.seed, part) for part in ("support", "query"))
    support, query = (next(iter(part)) for part in batches)
    level = AdaptFixed(
        "adapted", Displacement(count, len(initialisation.weights)), data=[support],
        optimizer=partial(torch.optim.SGD, lr=getattr(config, kind).learning_rate),
    )  # fmt: skip
    program = cell.program([level])
    level.tasks, level.proximity = tasks, proximity
    level.initialisation = initialisation.requires_grad_(False).to(program.device)
    cell.train(program, steps)
    rows, x, y = (part.to(program.device) for part in query)
    with program.inference("adapted") as adapted:
        return float(tasks.scores(level.initialisation(x, adapted(rows)), y).mean())


def _learned(program: mlo.Program, network: Initialisation) -> Initialisation:
    """A network with the weights of the level ``initialisation``."""
    network.load_state_dict(Ranks().from_main(program.state_dict("initialisation")))
    return network


def random_initialisation(cell: Cell[FewShotConfig], kind: Kind, *, is_longer: bool = False) -> float:
    """A baseline.

    Args:
        cell: The arm and its seed.
        kind: Of the tasks.
        is_longer: Whether to adapt with many steps.

    Returns:
        Mean score over test tasks.
    """
    options = getattr(cell.config, kind)
    network = Initialisation(_sizes(cell.config, tasks_of(kind, cell.config)))
    return test(cell, kind, network, options.longer_steps if is_longer else options.unroll_steps)


def jointly(cell: Cell[FewShotConfig], kind: Kind) -> float:
    """A baseline: train on the examples of all tasks with as many steps; give the network a new head; adapt.

    The new head is that of a random initialisation, or the old one where all tasks have the same outputs.

    Args:
        cell: The arm and its seed.
        kind: Of the tasks.

    Returns:
        Mean score over test tasks.
    """
    config, tasks = cell.config, tasks_of(kind, cell.config)
    options, sizes = getattr(config, kind), _sizes(config, tasks)
    level = TrainJointly(
        "initialisation", Initialisation([*sizes[:-1], tasks.num_joint_outputs]),
        data=TaskBatches(tasks, "train", config.num_tasks, cell.seed, "joint"),
        optimizer=options.initialisation.optimizer(), scheduler=options.initialisation.scheduler(options.steps),
    )  # fmt: skip
    level.tasks = tasks
    program = cell.program([level])
    cell.train(program, options.steps)
    network = _learned(program, Initialisation([*sizes[:-1], tasks.num_joint_outputs]))
    if tasks.num_joint_outputs != tasks.num_outputs:
        network = network.with_head_of(Initialisation(sizes))
    return test(cell, kind, network, options.unroll_steps)


def maml(cell: Cell[FewShotConfig], kind: Kind, *, implicit: bool) -> float:
    """The two levels.

    Args:
        cell: The arm and its seed.
        kind: Of the tasks.
        implicit: Whether it is implicit MAML.

    Returns:
        Mean score over test tasks.
    """
    options = getattr(cell.config, kind)
    program = two_levels(cell, kind, implicit=implicit)
    cell.train(program, options.steps, callbacks=[Restart(program, "adapted")])
    network = _learned(program, Initialisation(_sizes(cell.config, tasks_of(kind, cell.config))))
    if implicit:
        return test(cell, kind, network, options.implicit_steps, options.proximity)
    return test(cell, kind, network, options.unroll_steps)


def both_kinds(cell: Cell[FewShotConfig], one: Callable[..., float], **options: bool) -> Outcome:
    """Run an arm on both kinds of tasks."""
    return Outcome(
        {
            "digits: accuracy, %": one(cell, "digits", **options),
            "sinusoids: squared error": one(cell, "sinusoids", **options),
        }
    )


def draw(axes, outcomes) -> None:
    """Squared error on sinusoids, a dot for every seed of every arm."""
    arms = list(outcomes)
    for row, arm in enumerate(reversed(arms)):
        errors = [outcome.scores["sinusoids: squared error"] for outcome in outcomes[arm]]
        axes.scatter(errors, [row] * len(errors), color="#4c78a8", alpha=0.6, s=42, linewidths=0)
    axes.set_yticks(range(len(arms)), list(reversed(arms)))
    axes.set_title("sinusoids: squared error (smaller is better)", fontsize=10, loc="left")
    axes.set_xscale("log")
    axes.grid(axis="x", color="#e3e5e8", zorder=0)


ARMS = {
    "random initialisation": partial(both_kinds, one=random_initialisation),
    "random initialisation, many steps": partial(both_kinds, one=random_initialisation, is_longer=True),
    "trained on all tasks": partial(both_kinds, one=jointly),
    "maml": partial(both_kinds, one=maml, implicit=False),
    "implicit maml": partial(both_kinds, one=maml, implicit=True),
}


def build(config: FewShotConfig) -> mlo.Program:
    """The two levels of MAML on digits, untrained."""
    cell = Cell(config, "maml", config.seed)
    torch.manual_seed(cell.seed)
    return two_levels(cell, "digits", implicit=False)


RECIPE = Recipe(
    FewShotConfig,
    build,
    compared(ARMS, draw),
    "learn an initialisation from which a few steps on a few examples of a new task suffice",
    "Finn et al. 2017, Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks (arXiv:1703.03400); "
    "Rajeswaran et al. 2019, Meta-Learning with Implicit Gradients (arXiv:1909.04630)",
)
