"""Tune the weight decay of every group of parameters, and a learning-rate schedule, by gradient.

Groups are the columns of the first layer, one for each input feature, and the last layer. Most features are noise,
which nobody is told. Above, decays d and learning rates eta, on validation images; below, the network:

    min_{d, eta}  mean_j l_j(w*(d, eta))
    s.t.          w* = argmin_w  L(w, d),      L = mean_i l_i(w) + 1/2 sum_g d_g |w_g|^2

The learning rate eta_t of step t of K has no influence on the minimum, but on the w_K that K steps of gradient descent
reach. It is written as a factor of the lower loss, whose optimizer has the rate 1 and no momentum: the step is
w - eta_t grad L, differentiated through like every other. (The options of an optimizer are numbers, through which no
hypergradient is taken; where the update is linear in the gradient, as here, this form does without.)

Arms have the same number of lower steps for their search, a number of trainings. Each then trains anew, from another
initialisation, on training and validation images with what it found. Implicit: decays alone, one network that goes on
training. Unrolled: decays and schedule, one whole training per step. Baselines: the default decay of all groups; the
best on the validation images of as many trainings, with one decay for all groups, or with one drawn for each.

References: Lorraine et al. 2020, "Optimizing Millions of Hyperparameters by Implicit Differentiation"
(arXiv:1911.02590); Maclaurin et al. 2015, "Gradient-based Hyperparameter Optimization through Reversible Learning"
(arXiv:1502.03492).
"""

import math
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import scalemlo as mlo

from ..distributed.ranks import Ranks
from ..runs import config as cfg
from .data.images import accuracy, load_images, take_per_class
from .study.recipe import Recipe
from .study.restart import Restart
from .study.study import Cell, ComparisonConfig, Outcome, compared


@dataclass(kw_only=True)
class HyperparametersConfig(ComparisonConfig):
    """Configuration of this recipe.

    Args:
        num_train_per_class: Training images of each digit.
        num_validation_per_class: Validation images of each digit.
        num_noise: Input features beside the 64 pixels, standard normal and without meaning.
        hidden: Hidden units of the network.
        steps: Steps of gradient descent of one training, each on all images.
        num_trainings: Lower steps of every search, in trainings; for the unrolled one also the steps above.
        learning_rate: Default learning rate, and where the schedule begins.
        weight_decay: Default decay of every group, and where the learned ones begin.
        decay_bounds: Decays are searched between the two, in the logarithm.
        rate_bounds: The same for learning rates.
        num_rates: Pieces of the learned schedule, constant each.
        unroll_steps: Lower steps between two steps above, where the decays are learned implicitly.
        decays: Optimizer of the decays, where they are learned implicitly.
        schedule: Optimizer of decays and rates, where they are learned by unrolling.
        hypergradient: How decays are differentiated through the network implicitly.
    """

    num_train_per_class: int = 10
    num_validation_per_class: int = 10
    num_noise: int = 64
    hidden: int = 32
    steps: int = 200
    num_trainings: int = 50
    learning_rate: float = 0.3
    weight_decay: float = 1e-3
    decay_bounds: tuple[float, float] = (1e-5, 1.0)
    rate_bounds: tuple[float, float] = (0.03, 1.0)
    num_rates: int = 10
    unroll_steps: int = 20
    decays: cfg.OptimizerConfig = field(default_factory=cfg.OptimizerConfig)
    schedule: cfg.OptimizerConfig = field(default_factory=cfg.OptimizerConfig)
    hypergradient: cfg.HypergradientConfig = field(default_factory=cfg.ESTIMATOR_CONFIGS["conjugate_gradient"])

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, bounds in (("weight_decay", self.decay_bounds), ("learning_rate", self.rate_bounds)):
            low, high = bounds
            if not 0 < low < getattr(self, name) < high:
                raise ValueError(f"{name}={getattr(self, name)} must be between its bounds, 0 < {low} < {high}")
        if not 1 <= self.num_rates <= self.steps:
            raise ValueError(f"num_rates={self.num_rates} must be in 1 .. steps={self.steps}")
        if not 1 <= self.unroll_steps <= self.num_trainings * self.steps:
            raise ValueError(
                f"unroll_steps={self.unroll_steps} must be in 1 .. num_trainings * steps = "
                f"{self.num_trainings * self.steps}, the lower steps of the search"
            )


class Hyperparameters(nn.Module):
    """Decays and learning rates, each ``exp(low + (high - low) sigmoid(logit))`` between bounds.

    Above a decay of 2 over the learning rate, gradient descent would not converge; and noise is best decayed at once.

    Args:
        num_groups: Groups of parameters.
        num_rates: Pieces of the schedule.
        weight_decay: Of every group at first.
        learning_rate: Of every piece at first.
        decay_bounds: Of the decays.
        rate_bounds: Of the learning rates.
    """

    def __init__(
        self,
        num_groups: int,
        num_rates: int,
        weight_decay: float,
        learning_rate: float,
        decay_bounds: tuple[float, float],
        rate_bounds: tuple[float, float],
    ):
        super().__init__()
        self._decay_bounds, self._rate_bounds = decay_bounds, rate_bounds
        self.decay_logits = nn.Parameter(torch.full((num_groups,), _logit(weight_decay, decay_bounds)))
        self.rate_logits = nn.Parameter(torch.full((num_rates,), _logit(learning_rate, rate_bounds)))

    def decays(self) -> Tensor:
        """Decay of every group, ``[G]``."""
        return _between(self.decay_logits, self._decay_bounds)

    def rates(self, progress: Tensor) -> Tensor:
        """Learning rates ``[B]`` at shares ``[B]`` in [0, 1) of the training."""
        return _between(self.rate_logits, self._rate_bounds)[(progress * len(self.rate_logits)).long()]


def _between(logits: Tensor, bounds: tuple[float, float]) -> Tensor:
    low, high = map(math.log, bounds)
    return (low + (high - low) * logits.sigmoid()).exp()


def _logit(value: float, bounds: tuple[float, float]) -> float:
    low, high = map(math.log, bounds)
    share = (math.log(value) - low) / (high - low)
    return math.log(share / (1 - share))


class Network(nn.Module):
    """One hidden layer.

    Args:
        num_features: Inputs.
        hidden: Hidden units.
    """

    def __init__(self, num_features: int, hidden: int):
        super().__init__()
        self.first, self.last = nn.Linear(num_features, hidden), nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, 10]`` of features ``[B, D]``."""
        return self.last(self.first(x).tanh())

    def squares(self) -> Tensor:
        """Squared norm of every group, ``[D + 1]``: columns of the first layer, then the last one; no biases."""
        return torch.cat([self.first.weight.square().sum(0), self.last.weight.square().sum().unsqueeze(0)])


class Tune(mlo.Level):
    """Upper level: the network should do well on the validation images."""

    def loss(self, batch, network):
        """Mean loss."""
        return mlo.mean(F.cross_entropy(network(batch[0]), batch[1], reduction="none"))


class Train(mlo.Level):
    """Lower level: the network, with the decays and the learning rate of this step."""

    def loss(self, batch, hyperparameters):
        """The regularised loss times the learning rate."""
        return training_loss(self.module, batch, hyperparameters)


class TrainFixed(mlo.Level):
    """A network alone, with hyperparameters that do not change."""

    hyperparameters: Hyperparameters

    def loss(self, batch):
        """The regularised loss times the learning rate."""
        return training_loss(self.module, batch, self.hyperparameters)


def training_loss(network, batch, hyperparameters) -> Tensor:
    """``eta_t (mean_i l_i + 1/2 sum_g d_g |w_g|^2)`` of a batch of features, labels and progress."""
    x, labels, progress = batch
    penalty = 0.5 * (hyperparameters.decays() * network.squares()).sum()
    return mlo.mean(hyperparameters.rates(progress) * (F.cross_entropy(network(x), labels, reduction="none") + penalty))


@dataclass
class Split:
    """Features ``[N, 64 + num_noise]`` and labels of the parts."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    both: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def split(config: HyperparametersConfig, seed: int) -> Split:
    """Draw training and validation images, and the noise beside the pixels."""
    images = load_images("digits")
    generator = torch.Generator().manual_seed(seed)
    rows, left = [], torch.arange(len(images.train_y))
    for count in (config.num_train_per_class, config.num_validation_per_class):
        drawn, left = take_per_class(images.train_y, left, [count] * 10, generator)
        rows.append(drawn)

    def part(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        noise = torch.randn(len(x), config.num_noise, generator=generator)
        return torch.cat([x.flatten(1), noise], 1), y

    train, validation = (part(images.train_x[r], images.train_y[r]) for r in rows)
    both = torch.cat([train[0], validation[0]]), torch.cat([train[1], validation[1]])
    return Split(train, validation, both, part(images.test_x, images.test_y))


def _defaults(config: HyperparametersConfig) -> Hyperparameters:
    return Hyperparameters(
        65 + config.num_noise, config.num_rates, config.weight_decay, config.learning_rate, config.decay_bounds,
        config.rate_bounds,
    )  # fmt: skip


def _training(cell: Cell[HyperparametersConfig], part: tuple[Tensor, Tensor]) -> dict:
    """What the level of a network is made of: all images at each of the steps of one training."""
    steps = cell.config.steps
    return dict(
        module=Network(64 + cell.config.num_noise, cell.config.hidden),
        data=[(*part, torch.full((len(part[1]),), t / steps)) for t in range(steps)],
        optimizer=partial(torch.optim.SGD, lr=1.0),
    )


def two_levels(cell: Cell[HyperparametersConfig], data: Split, *, unrolled: bool) -> mlo.Program:
    """The program.

    Args:
        cell: The arm and its seed.
        data: The images.
        unrolled: Whether to go through whole trainings, for decays and schedule; else implicitly, for decays alone.

    Returns:
        The two levels, untrained.
    """
    config = cell.config
    upper = (config.schedule if unrolled else config.decays).optimizer()
    learned = None if unrolled else "decay_logits"
    estimator = mlo.Unrolled() if unrolled else config.hypergradient.build()
    steps = config.steps if unrolled else config.unroll_steps
    return cell.program(
        [
            Tune("hyperparameters", _defaults(config), data=[data.validation], optimizer=upper, parameters=learned),
            Train("network", hypergradient=estimator, unroll_steps=steps, **_training(cell, data.train)),
        ]
    )


def fit(
    cell: Cell[HyperparametersConfig],
    hyperparameters: Hyperparameters,
    train: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
) -> tuple[float, float]:
    """Train a network from scratch.

    Args:
        cell: The arm and its seed.
        hyperparameters: Decays and schedule.
        train: To train on.
        held_out: To evaluate on.

    Returns:
        Accuracy in [0, 1] and mean loss on what is held out.
    """
    level = TrainFixed("network", **_training(cell, train))
    program = cell.program([level])
    level.hyperparameters = hyperparameters.requires_grad_(False).to(program.device)

    def evaluate() -> dict[str, float]:
        with program.inference("network") as network:
            return {
                "accuracy": accuracy(network, *held_out),
                "loss": float(F.cross_entropy(network(held_out[0]), held_out[1])),
            }

    found = cell.train(program, cell.config.steps, evaluate)
    return found["accuracy"], found["loss"]


def _outcome(cell: Cell[HyperparametersConfig], found: Hyperparameters, data: Split) -> Outcome:
    """Train with what was found on all images, and test."""
    right, loss = fit(cell, found, data.both, data.test)
    decay = found.decays().detach().log()
    ratio = {"noise's decay over pixels'": float((decay[64:-1].mean() - decay[:64].mean()).exp())}
    scores = {"accuracy, %": 100 * right, "loss, nats": loss}
    return Outcome(scores | ratio, {"log_decay": decay.numpy()})


def default(cell: Cell[HyperparametersConfig]) -> Outcome:
    """A baseline: the default decay and rate, no search."""
    return _outcome(cell, _defaults(cell.config), split(cell.config, cell.seed))


def drawn(cell: Cell[HyperparametersConfig], *, is_shared: bool) -> Hyperparameters:
    """Hyperparameters at random.

    Args:
        cell: The arm and its seed.
        is_shared: Whether to draw one decay for all groups, and one learning rate for all steps; else a decay for each
            group, with the default learning rate.

    Returns:
        Them.
    """
    found = _defaults(cell.config)
    with torch.no_grad():  # a uniform share of the logarithm's range
        found.decay_logits.copy_(torch.rand(1 if is_shared else len(found.decay_logits)).logit(1e-6))
        if is_shared:
            found.rate_logits.copy_(torch.rand(1).logit(1e-6))
    return found


def random_search(cell: Cell[HyperparametersConfig], *, is_shared: bool) -> Outcome:
    """A baseline: the best of several draws on the validation images.

    Args:
        cell: The arm and its seed.
        is_shared: See :func:`drawn`.

    Returns:
        What it found.
    """
    config, data = cell.config, split(cell.config, cell.seed)
    candidates = [drawn(cell, is_shared=is_shared) for _ in range(config.num_trainings)]
    losses = [fit(cell, candidate, data.train, data.validation)[1] for candidate in candidates]
    return _outcome(cell, candidates[int(np.nanargmin(losses))], data)


def by_gradient(cell: Cell[HyperparametersConfig], *, unrolled: bool) -> Outcome:
    """The two levels.

    Args:
        cell: The arm and its seed.
        unrolled: See :func:`two_levels`.

    Returns:
        What they found.
    """
    config, data = cell.config, split(cell.config, cell.seed)
    program = two_levels(cell, data, unrolled=unrolled)
    steps = config.num_trainings if unrolled else config.num_trainings * config.steps // config.unroll_steps
    cell.train(program, steps, callbacks=[Restart(program, "network")] if unrolled else [])
    found = _defaults(config)
    found.load_state_dict(Ranks().from_main(program.state_dict("hyperparameters")))
    return _outcome(cell, found, data)


def draw(axes, outcomes, num_pixels: int = 64) -> None:
    """Decays of the first layer's columns, every seed: what pixels and what noise need."""
    for arm, color in {"implicit": "#2a7f62", "unrolled": "#4c78a8"}.items():
        for outcome in outcomes.get(arm, ()):
            decay = np.exp(outcome.arrays["log_decay"][:-1])
            axes.plot(np.arange(len(decay)), decay, ".", color=color, alpha=0.5, markersize=4)
    axes.set_title("Learned decays, every seed: implicit (green), unrolled (blue)", fontsize=10, loc="left")
    axes.axvline(num_pixels - 0.5, color="#8a8f98", linewidth=1, linestyle="--")
    axes.set(xlabel="input feature: 64 pixels, then noise", ylabel="learned weight decay", yscale="log")


ARMS = {
    "default": default,
    "random search, one decay and rate": partial(random_search, is_shared=True),
    "random search, every decay": partial(random_search, is_shared=False),
    "implicit": partial(by_gradient, unrolled=False),
    "unrolled": partial(by_gradient, unrolled=True),
}


def build(config: HyperparametersConfig) -> mlo.Program:
    """The two levels of the implicit search, untrained."""
    cell = Cell(config, "implicit", config.seed)
    torch.manual_seed(cell.seed)
    return two_levels(cell, split(config, config.seed), unrolled=False)


RECIPE = Recipe(
    HyperparametersConfig,
    build,
    compared(ARMS, draw),
    "tune a weight decay for every input feature and a learning-rate schedule, implicitly and by unrolling trainings",
    "Lorraine et al. 2020, Optimizing Millions of Hyperparameters by Implicit Differentiation (arXiv:1911.02590); "
    "Maclaurin et al. 2015, Gradient-based Hyperparameter Optimization through Reversible Learning (arXiv:1502.03492)",
)
