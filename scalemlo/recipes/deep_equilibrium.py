"""Train a network of infinite depth: its output is the fixed point of a layer, differentiated implicitly.

Above, the parameters theta of the layer f and of the readout; below, the states z of the examples of a batch:

    min_theta  mean_i l_i(z_i*(theta), theta)
    s.t.       z* = argmin_z  1/2 |z - f(z, x; theta)|^2,      f = tanh(W z + U x + b)

where the minimum is the fixed point. With J = df/dz the lower Hessian is (I - J)^T (I - J) there, so that conjugate
gradients give the hypergradient (df/dtheta)^T (I - J)^-T v of deep equilibrium models. Rows of W are kept so small
(sum of absolute values below ``contraction``) that f has one fixed point. States begin at zero for every batch.

Jacobian-free: the lower loss is |z|^2/2 - <z, f(sg(z), x)>, whose gradient step of rate 1 is z <- f(z, x), with Hessian
I and the hypergradient (df/dtheta)^T v. Baselines: the same layer iterated as often, differentiated through all of its
iterations, and once.

References: Bai et al. 2019, "Deep Equilibrium Models" (arXiv:1909.01377); Fung et al. 2021, "JFB: Jacobian-Free
Backpropagation for Implicit Networks" (arXiv:2103.12803); rows of W: El Ghaoui et al. 2021, "Implicit Deep Learning"
(arXiv:1908.06315), section 2.3.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import scalemlo as mlo

from ..runs import config as cfg
from .data.images import accuracy, load_images, take_per_class
from .study.recipe import Recipe
from .study.restart import Repeated, Restart
from .study.study import Cell, ComparisonConfig, Outcome, compared

L = TypeVar("L", bound=mlo.Level)


@dataclass(kw_only=True)
class DeepEquilibriumConfig(ComparisonConfig):
    """Configuration of this recipe.

    Args:
        num_per_class: Training images of each digit.
        num_states: Width of the layer.
        contraction: Largest sum of absolute weights of a row of W, below 1.
        steps: Steps of the parameters.
        batch_size: Images per step.
        num_iterations: Lower steps per step of the parameters; of the baselines, iterations of the layer.
        num_test_iterations: Iterations of the layer in a test; the baselines test with theirs.
        state_rate: Learning rate of the states.
        state_momentum: Their momentum.
        network: Optimizer of the parameters.
        hypergradient: How the parameters are differentiated through the fixed point.
    """

    num_per_class: int = 100
    num_states: int = 64
    contraction: float = 0.9
    steps: int = 300
    batch_size: int = 100
    num_iterations: int = 12
    num_test_iterations: int = 50
    state_rate: float = 0.5
    state_momentum: float = 0.5
    network: cfg.OptimizerConfig = field(default_factory=cfg.OptimizerConfig)
    hypergradient: cfg.HypergradientConfig = field(default_factory=cfg.ESTIMATOR_CONFIGS["conjugate_gradient"])

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.contraction < 1:
            raise ValueError(f"contraction={self.contraction} must be between 0 and 1, for one fixed point to exist")
        if self.batch_size > 10 * self.num_per_class:
            raise ValueError(
                f"batch_size={self.batch_size} must not exceed the {10 * self.num_per_class} images; "
                "raise num_per_class"
            )


class Layer(nn.Module):
    """The layer f and the readout.

    Args:
        num_states: Width.
        contraction: Largest sum of absolute weights of a row of W.
    """

    def __init__(self, num_states: int, contraction: float):
        super().__init__()
        self._contraction = contraction
        self.recurrent = nn.Parameter(torch.randn(num_states, num_states) / num_states)
        self.inputs, self.readout = nn.Linear(64, num_states), nn.Linear(num_states, 10)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """``f(z, x)`` ``[B, S]`` of states ``[B, S]`` and images ``[B, 64]``."""
        sizes = self.recurrent.abs().sum(1, keepdim=True).clamp(min=self._contraction)
        return (z @ (self._contraction * self.recurrent / sizes).mT + self.inputs(x)).tanh()

    def logits(self, z: Tensor) -> Tensor:
        """Logits ``[B, 10]`` of states."""
        return self.readout(z)

    def iterated(self, x: Tensor, num_iterations: int) -> Tensor:
        """States after some iterations from zero."""
        z = x.new_zeros(len(x), len(self.recurrent))
        for _ in range(num_iterations):
            z = self(z, x)
        return z


class States(nn.Module):
    """States of the examples of a batch.

    Args:
        batch_size: Examples.
        num_states: Width.
    """

    def __init__(self, batch_size: int, num_states: int):
        super().__init__()
        self.values = nn.Parameter(torch.zeros(batch_size, num_states))

    def forward(self, rows: Tensor) -> Tensor:
        """Those of some rows of the batch, ``[B, S]``."""
        return self.values[rows]


class Learn(mlo.Level):
    """Upper level: the readout of the fixed points should be right."""

    def loss(self, batch, states):
        """Mean loss."""
        rows, _, labels = batch
        return mlo.mean(F.cross_entropy(self.module.logits(states(rows)), labels, reduction="none"))


class Settle(mlo.Level):
    """Lower level: the states become the fixed point."""

    batch_size: int

    def loss(self, batch, network):
        """``1/2 |z - f(z, x)|^2``, summed over examples."""
        rows, x, _ = batch
        z = self.module(rows)
        return self.batch_size * mlo.mean(0.5 * (z - network(z, x)).square().sum(1))


class Iterate(Settle):
    """Lower level: its gradient step of rate 1 is an iteration of f, and its Hessian the identity."""

    def loss(self, batch, network):
        """``1/2 |z|^2 - <z, f(sg(z), x)>``, summed over examples."""
        rows, x, _ = batch
        z = self.module(rows)
        return self.batch_size * mlo.mean((z * (0.5 * z - network(mlo.constant(z), x))).sum(1))


class Unroll(mlo.Level):
    """A baseline: backpropagation through ``num_iterations`` iterations from zero."""

    num_iterations: int

    def loss(self, batch):
        """Mean loss."""
        _, x, labels = batch
        logits = self.module.logits(self.module.iterated(x, self.num_iterations))
        return mlo.mean(F.cross_entropy(logits, labels, reduction="none"))


class Batches:
    """Shuffled batches of rows ``[B]``, images ``[B, 64]`` and labels, the same ones whenever it is made.

    Args:
        data: Images and labels.
        batch_size: Images of a batch.
        seed: Of the shuffling.
    """

    def __init__(self, data: TensorDataset, batch_size: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self._loader = DataLoader(data, batch_size, shuffle=True, drop_last=True, generator=generator)

    def __iter__(self):
        """Batches of one epoch."""
        for x, labels in self._loader:
            yield torch.arange(len(x)), x, labels


def training_data(config: DeepEquilibriumConfig, seed: int) -> TensorDataset:
    """Draw the training images, ``[N, 64]``, as many of each digit."""
    images = load_images("digits")
    generator = torch.Generator().manual_seed(seed)
    rows, _ = take_per_class(images.train_y, torch.arange(len(images.train_y)), [config.num_per_class] * 10, generator)
    return TensorDataset(images.train_x[rows].flatten(1), images.train_y[rows])


def _upper(cell: Cell[DeepEquilibriumConfig], kind: type[L], data: TensorDataset) -> L:
    config = cell.config
    return kind(
        "network", Layer(config.num_states, config.contraction), data=Batches(data, config.batch_size, cell.seed),
        optimizer=config.network.optimizer(), scheduler=config.network.scheduler(config.steps),
    )  # fmt: skip


def two_levels(cell: Cell[DeepEquilibriumConfig], data: TensorDataset, *, jacobian_free: bool) -> mlo.Program:
    """The program.

    Args:
        cell: The arm and its seed.
        data: Training images.
        jacobian_free: Whether the derivative of f by the states is left out.

    Returns:
        The two levels, untrained.
    """
    config = cell.config
    rate, momentum = (1.0, 0.0) if jacobian_free else (config.state_rate, config.state_momentum)
    lower = (Iterate if jacobian_free else Settle)(
        "states", States(config.batch_size, config.num_states), unroll_steps=config.num_iterations,
        data=Repeated(Batches(data, config.batch_size, cell.seed), config.num_iterations),
        optimizer=partial(torch.optim.SGD, lr=rate, momentum=momentum),
        hypergradient=mlo.Identity() if jacobian_free else config.hypergradient.build(),
    )  # fmt: skip
    lower.batch_size = config.batch_size
    return cell.program([_upper(cell, Learn, data), lower])


def _train(cell: Cell[DeepEquilibriumConfig], program: mlo.Program, num_iterations: int, callbacks=()) -> Outcome:
    """Train, then test with a number of iterations of the layer, and see how near the fixed point they come."""
    images = load_images("digits")

    def evaluate() -> dict[str, float]:
        x = images.test_x.flatten(1).to(program.device)
        with program.inference("network") as network:
            z = network.iterated(x, num_iterations)
            distance = (network(z, x) - z).norm() / z.norm()
            right = accuracy(lambda part: network.logits(network.iterated(part, num_iterations)), x, images.test_y)
        return {"accuracy, %": 100 * right, "relative residual": float(distance)}

    return Outcome(cell.train(program, cell.config.steps, evaluate, callbacks=callbacks))


def equilibrium(cell: Cell[DeepEquilibriumConfig], *, jacobian_free: bool = False) -> Outcome:
    """The two levels.

    Args:
        cell: The arm and its seed.
        jacobian_free: See :func:`two_levels`.

    Returns:
        What they found.
    """
    program = two_levels(cell, training_data(cell.config, cell.seed), jacobian_free=jacobian_free)
    return _train(cell, program, cell.config.num_test_iterations, [Restart(program, "states")])


def unrolled(cell: Cell[DeepEquilibriumConfig], *, once: bool = False) -> Outcome:
    """A baseline.

    Args:
        cell: The arm and its seed.
        once: Whether the layer is applied once, to no state; its W is then not trained.

    Returns:
        What it found.
    """
    config = cell.config
    level = _upper(cell, Unroll, training_data(config, cell.seed))
    level.num_iterations = 1 if once else config.num_iterations
    return _train(cell, cell.program([level]), level.num_iterations)


ARMS = {
    "one layer": partial(unrolled, once=True),
    "unrolled, equal depth": unrolled,
    "jacobian-free": partial(equilibrium, jacobian_free=True),
    "equilibrium": equilibrium,
}


def build(config: DeepEquilibriumConfig) -> mlo.Program:
    """The two levels of the equilibrium, untrained."""
    cell = Cell(config, "equilibrium", config.seed)
    torch.manual_seed(cell.seed)
    return two_levels(cell, training_data(config, config.seed), jacobian_free=False)


RECIPE = Recipe(
    DeepEquilibriumConfig,
    build,
    compared(ARMS),
    "train a network whose output is the fixed point of a layer, differentiated implicitly",
    "Bai et al. 2019, Deep Equilibrium Models (arXiv:1909.01377)",
)
