"""Search the operations of a small cell of convolutions, then train the network that was found from scratch.

A cell has nodes 0 to M; the input is node 0, and node j is the sum over its edges (i, j), i < j, of mixed operations:

    x_j = sum_{i<j} sum_o softmax(alpha_ij)_o o(x_i)

Above, the architecture alpha on one half of the labelled images; below, the network w on the other half:

    min_alpha  mean_j l_j(w*(alpha), alpha)
    s.t.       w*(alpha) = argmin_w  mean_i l_i(w, alpha)

Every edge then keeps its heaviest operation, and the discrete network is trained on both halves. Baselines, trained on
both halves with the same number of steps: an architecture drawn at random; the best one on the second half of several
that are drawn and trained on the first half, with as many steps in all as the search takes; all operations, equally
mixed.

Reference: Liu et al. 2019, "DARTS: Differentiable Architecture Search" (arXiv:1806.09055).
"""

from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import scalemlo as mlo

from ..runs import config as cfg
from .data.images import accuracy, load_images, take_per_class
from .study.recipe import Recipe
from .study.study import Cell, ComparisonConfig, Outcome, compared

OPERATIONS = ("zero", "identity", "average pool", "max pool", "conv 1x1", "conv 3x3")


@dataclass(kw_only=True)
class DartsConfig(ComparisonConfig):
    """Configuration of this recipe.

    Args:
        num_per_class: Labelled images of each digit; one half trains the network of the search, the other one the
            architecture.
        num_nodes: Nodes of the cell that are computed.
        num_channels: Of every node.
        search_steps: Steps of the search, of both levels.
        steps: Steps of every network whose test accuracy is reported.
        num_random: Architectures that the random search tries, each for ``search_steps / num_random`` steps.
        batch_size: Images per step.
        network: Its optimizer.
        architecture: The optimizer of the architecture.
        hypergradient: How the architecture is differentiated through the network; ``unrolled`` over one step is the
            second-order approximation of DARTS.
    """

    num_per_class: int = 20
    num_nodes: int = 3
    num_channels: int = 8
    search_steps: int = 300
    steps: int = 300
    num_random: int = 6
    batch_size: int = 50
    network: cfg.OptimizerConfig = field(default_factory=cfg.OptimizerConfig)
    architecture: cfg.OptimizerConfig = field(default_factory=cfg.OptimizerConfig)
    hypergradient: cfg.HypergradientConfig = field(default_factory=cfg.ESTIMATOR_CONFIGS["unrolled"])

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.num_random <= self.search_steps:
            raise ValueError(f"num_random={self.num_random} must be in 1 .. search_steps={self.search_steps}")
        if self.batch_size > 5 * self.num_per_class:
            raise ValueError(
                f"batch_size={self.batch_size} must not exceed one half of the {10 * self.num_per_class} images; "
                "raise num_per_class"
            )


class Architecture(nn.Module):
    """Shares of the operations on every edge, equal at first.

    Args:
        num_edges: Edges of the cell.
    """

    def __init__(self, num_edges: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(num_edges, len(OPERATIONS)))

    def forward(self) -> Tensor:
        """``softmax(alpha)`` ``[E, O]``."""
        return self.alpha.softmax(1)


class Network(nn.Module):
    """A convolution, the cell, and a linear layer on the mean of the last node over the image.

    Args:
        num_nodes: Nodes that are computed.
        num_channels: Of every node.
    """

    def __init__(self, num_nodes: int, num_channels: int):
        super().__init__()
        self.edges = list(combinations(range(num_nodes + 1), 2))
        self.stem = nn.Conv2d(1, num_channels, 1)
        self.pointwise = nn.ModuleList(nn.Conv2d(num_channels, num_channels, 1) for _ in self.edges)
        self.spatial = nn.ModuleList(nn.Conv2d(num_channels, num_channels, 3, padding=1) for _ in self.edges)
        self.head = nn.Linear(num_channels, 10)

    def forward(self, images: Tensor, shares: Tensor) -> Tensor:
        """Logits ``[B, 10]`` of images ``[B, 1, H, W]`` with shares ``[E, O]`` of the operations."""
        nodes: list[Any] = [self.stem(images)]
        for j in range(1, self.edges[-1][1] + 1):
            incoming = [(e, i) for e, (i, end) in enumerate(self.edges) if end == j]
            nodes.append(sum(self._mixed(e, nodes[i], shares[e]) for e, i in incoming))
        return self.head(nodes[-1].mean((2, 3)))

    def _mixed(self, edge: int, x: Tensor, shares: Tensor) -> Tensor:
        found = (
            x, F.avg_pool2d(x, 3, 1, 1), F.max_pool2d(x, 3, 1, 1),
            self.pointwise[edge](x).relu(), self.spatial[edge](x).relu(),
        )  # fmt: skip
        return sum(share * y for share, y in zip(shares[1:], found, strict=True))


class Search(mlo.Level):
    """Upper level: the mixed network should do well on images that it was not trained on."""

    def loss(self, batch, network):
        """Mean loss."""
        return mlo.mean(losses(network, batch, self.module()))


class Fit(mlo.Level):
    """Lower level: the network, given the architecture."""

    def loss(self, batch, architecture):
        """Mean loss."""
        return mlo.mean(losses(self.module, batch, architecture()))


class FitFixed(mlo.Level):
    """A network alone, with ``shares`` ``[E, O]`` that do not change."""

    shares: Tensor

    def loss(self, batch):
        """Mean loss."""
        return mlo.mean(losses(self.module, batch, self.shares))


def losses(network, batch, shares: Tensor) -> Tensor:
    """Loss of every image."""
    return F.cross_entropy(network(batch[0], shares), batch[1], reduction="none")


@dataclass
class Split:
    """Images and labels of the parts."""

    train: TensorDataset
    validation: TensorDataset
    both: TensorDataset
    test: TensorDataset


def split(config: DartsConfig, seed: int) -> Split:
    """Draw the labelled images, as many of each digit."""
    images = load_images("digits")
    counts = [config.num_per_class] * 10
    rows, _ = take_per_class(
        images.train_y, torch.arange(len(images.train_y)), counts, torch.Generator().manual_seed(seed)
    )
    half = len(rows) // 2
    parts = [TensorDataset(images.train_x[r], images.train_y[r]) for r in (rows[:half], rows[half:], rows)]
    return Split(*parts, TensorDataset(images.test_x, images.test_y))


def _loader(cell: Cell[DartsConfig], data: TensorDataset) -> DataLoader:
    return DataLoader(data, cell.config.batch_size, shuffle=True, drop_last=True)


def _network(cell: Cell[DartsConfig]) -> Network:
    return Network(cell.config.num_nodes, cell.config.num_channels)


def search_program(cell: Cell[DartsConfig], data: Split) -> mlo.Program:
    """The two levels."""
    config, network = cell.config, _network(cell)
    return cell.program(
        [
            Search(
                "architecture", Architecture(len(network.edges)), data=_loader(cell, data.validation),
                optimizer=config.architecture.optimizer(),
            ),
            Fit(
                "network", network, data=_loader(cell, data.train), optimizer=config.network.optimizer(),
                scheduler=config.network.scheduler(config.search_steps), hypergradient=config.hypergradient.build(),
            ),
        ]
    )  # fmt: skip


def fit(cell: Cell[DartsConfig], shares: Tensor, steps: int, train: TensorDataset, held_out: TensorDataset) -> float:
    """Train a network from scratch.

    Args:
        cell: The arm and its seed.
        shares: Of the operations, ``[E, O]``.
        steps: Of the training.
        train: To train on.
        held_out: To evaluate on.

    Returns:
        Accuracy at the end, in percent.
    """
    config = cell.config
    level = FitFixed(
        "network", _network(cell), data=_loader(cell, train), optimizer=config.network.optimizer(),
        scheduler=config.network.scheduler(steps), allow_unused=True,
    )  # fmt: skip
    program = cell.program([level])
    level.shares = shares.to(program.device)

    def evaluate() -> dict[str, float]:
        with program.inference("network") as network:
            return {"accuracy": 100 * accuracy(lambda x: network(x, level.shares), *held_out.tensors)}

    return cell.train(program, steps, evaluate)["accuracy"]


def discrete(shares: Tensor) -> Tensor:
    """Every edge's heaviest operation other than ``zero``, as in DARTS, with share 1 and the others 0."""
    return F.one_hot(shares[:, 1:].argmax(1) + 1, len(OPERATIONS)).float()


def drawn(cell: Cell[DartsConfig]) -> Tensor:
    """A discrete architecture at random."""
    return discrete(torch.rand(len(_network(cell).edges), len(OPERATIONS)))


def _outcome(cell: Cell[DartsConfig], shares: Tensor, data: Split, learned: Tensor | None = None) -> Outcome:
    found = fit(cell, shares, cell.config.steps, data.both, data.test)
    return Outcome({"accuracy, %": found}, {} if learned is None else {"shares": learned.numpy()})


def random_architecture(cell: Cell[DartsConfig]) -> Outcome:
    """A baseline: one architecture, drawn."""
    return _outcome(cell, drawn(cell), split(cell.config, cell.seed))


def random_search(cell: Cell[DartsConfig]) -> Outcome:
    """A baseline: the best of several that are drawn, with the steps of the search."""
    config, data = cell.config, split(cell.config, cell.seed)
    steps = config.search_steps // config.num_random
    candidates = [drawn(cell) for _ in range(config.num_random)]
    found = [fit(cell, shares, steps, data.train, data.validation) for shares in candidates]
    return _outcome(cell, candidates[int(np.argmax(found))], data)


def equally_mixed(cell: Cell[DartsConfig]) -> Outcome:
    """A baseline: the mixed network itself."""
    shares = torch.full((len(_network(cell).edges), len(OPERATIONS)), 1 / len(OPERATIONS))
    return _outcome(cell, shares, split(cell.config, cell.seed))


def darts(cell: Cell[DartsConfig]) -> Outcome:
    """Search, then train what was found."""
    data = split(cell.config, cell.seed)
    program = search_program(cell, data)
    cell.train(program, cell.config.search_steps)
    with program.inference("architecture") as architecture:
        shares = architecture().cpu()
    return _outcome(cell, discrete(shares), data, learned=shares)


def draw(axes, outcomes) -> None:
    """Shares of the operations on every edge, mean over seeds."""
    found = [outcome.arrays["shares"] for outcome in outcomes.get("darts", ())]
    axes.set_title("Learned shares of the operations, mean over seeds", fontsize=10, loc="left")
    if not found:
        return
    shares: np.ndarray = np.mean(found, 0)
    axes.imshow(shares, cmap="Greens", vmin=0, vmax=max(0.5, shares.max()), aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        color = "white" if share > 0.6 * max(0.5, shares.max()) else "#333333"
        axes.text(column, row, f"{share:.2f}", ha="center", va="center", fontsize=8, color=color)
    axes.set_xticks(range(len(OPERATIONS)), [name.replace(" ", "\n") for name in OPERATIONS], fontsize=8)
    num_nodes = next(n for n in range(1, len(shares) + 1) if n * (n + 1) // 2 == len(shares))
    names = [f"{i} to {j}" for i, j in combinations(range(num_nodes + 1), 2)]
    axes.set_yticks(range(len(shares)), names, fontsize=8)
    axes.set_ylabel("edge, from node to node", fontsize=9)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)


ARMS = {
    "random architecture": random_architecture,
    "random search": random_search,
    "all operations, equally mixed": equally_mixed,
    "darts": darts,
}


def build(config: DartsConfig) -> mlo.Program:
    """The two levels of the search, untrained."""
    cell = Cell(config, "darts", config.seed)
    torch.manual_seed(cell.seed)
    return search_program(cell, split(config, config.seed))


RECIPE = Recipe(
    DartsConfig,
    build,
    compared(ARMS, draw),
    "search the operations of a small convolutional cell by gradient, then train the network that was found",
    "Liu et al. 2019, DARTS: Differentiable Architecture Search (arXiv:1806.09055)",
)
