"""Adapt to a target with few labels, learning which examples of the sources to ignore.

The source domains are the digits as they are, turned upside down, mirrored and inverted, the target's are as they are
but faint and noisy. Three levels: a net V is fine-tuned on the target near a net W that is pretrained on the sources,
example i with the weight a_i = sigmoid(theta_i):

    min_theta  mean_j l_j(V*(theta))                        over target examples that V is not trained on
    s.t.       V*(theta) = argmin_V  mean_k l_k(V) + c/2 |V - W*(theta)|^2      over target examples
               W*(theta) = argmin_W  sum_i a_i l_i(W) / sum_i a_i               over source examples

Baselines with the same budget, which train on both parts of the target: sources alone; the target alone; one net on
both; and V near W with all source examples alike. A few more target examples pick the best moment.

Reference: Zhao et al. 2020, "Learning by Ignoring, with Application to Domain Adaptation" (arXiv:2012.14288). There
V has a head of its own; here both nets are alike.
"""

from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import scalemlo as mlo

from ..runs import config as cfg
from .data.images import load_images, take_per_class
from .study.classification import Fit, losses, test_and_validation
from .study.recipe import Recipe
from .study.study import Cell, ComparisonConfig, Outcome, compared

DOMAINS = {
    "as they are": lambda x: x,
    "upside down": lambda x: x.flip(2),
    "mirrored": lambda x: x.flip(3),
    "inverted": lambda x: -x,
}


@dataclass(kw_only=True)
class LearningByIgnoringConfig(ComparisonConfig):
    """Configuration of this recipe.

    Args:
        num_target_per_class: Target examples that V is trained on.
        num_meta_per_class: Target examples that the weights are learned from.
        num_validation_per_class: Target examples that pick the best moment.
        faintness: What the target's images are multiplied with.
        noise: Deviation of the target's noise.
        proximity: c.
        hidden: Hidden units of the nets.
        steps: Steps of every level.
        batch_size: Source examples per step.
        evaluate_every: Steps between two evaluations.
        nets: The optimizer of V and of W.
        ignore: The optimizer of the weights.
        hypergradient: How V and W are differentiated through.
    """

    num_target_per_class: int = 5
    num_meta_per_class: int = 5
    num_validation_per_class: int = 5
    faintness: float = 0.7
    noise: float = 0.5
    proximity: float = 0.1
    hidden: int = 32
    steps: int = 600
    batch_size: int = 128
    evaluate_every: int = 50
    nets: cfg.OptimizerConfig = field(default_factory=cfg.OptimizerConfig)
    ignore: cfg.OptimizerConfig = field(default_factory=cfg.OptimizerConfig)
    hypergradient: cfg.HypergradientConfig = field(default_factory=cfg.ESTIMATOR_CONFIGS["identity"])


class Net(nn.Module):
    """A perceptron on images of 8 x 8, and its parameters as a vector."""

    def __init__(self, hidden: int):
        super().__init__()
        self.inner, self.outer = nn.Linear(64, hidden), nn.Linear(hidden, 10)

    def forward(self, images: Tensor | None = None) -> Tensor:
        """Logits ``[B, 10]`` of images; without them all parameters as one vector, for the distance of two nets."""
        if images is None:
            return torch.cat([p.reshape(-1) for p in (*self.inner.parameters(), *self.outer.parameters())])
        return self.outer(self.inner(images.flatten(1)).relu())


class Ignore(mlo.Level):
    """Upper level: the net that is fine-tuned should do well on target examples that it has not seen."""

    def loss(self, batch, finetuned):
        """Mean loss over target examples."""
        return mlo.mean(losses(finetuned, batch))


class Pretrain(mlo.Level):
    """Middle level: source examples count as much as they are not ignored."""

    def loss(self, batch, ignore):
        """Weighted mean of the losses."""
        return mlo.weighted_mean(losses(self.module, batch), ignore(batch[2]).squeeze(1).sigmoid())


class Finetune(mlo.Level):
    """Lower level: few target examples, near the pretrained net."""

    proximity: float

    def loss(self, batch, pretrained: mlo.Upper):
        """Mean loss and distance."""
        distance = (self.module() - pretrained()).square().sum() / 2
        return mlo.mean(losses(self.module, batch)) + self.proximity * distance


@dataclass
class Split:
    """Images and labels; those of ``source`` have their rows, and ``domain`` says of every row where it is from."""

    source: TensorDataset
    domain: Tensor
    target: TensorDataset
    meta: TensorDataset
    validation: TensorDataset
    test: TensorDataset

    @property
    def target_and_meta(self) -> TensorDataset:
        """What the baselines train on: all that the levels see of the target."""
        return TensorDataset(*map(torch.cat, zip(self.target.tensors, self.meta.tensors, strict=True)))


def split(config: LearningByIgnoringConfig, seed: int) -> Split:
    """Draw the target's parts, and deal what is left out to the domains.

    Args:
        config: The configuration.
        seed: Draws.

    Returns:
        The parts.
    """
    images = load_images("digits")
    generator = torch.Generator().manual_seed(seed)

    def target(x: Tensor, y: Tensor) -> TensorDataset:
        noise = torch.randn(x.shape, generator=generator)
        return TensorDataset(config.faintness * x + config.noise * noise, y)

    left, parts = torch.arange(len(images.train_y)), []
    for count in (config.num_target_per_class, config.num_meta_per_class, config.num_validation_per_class):
        rows, left = take_per_class(images.train_y, left, [count] * 10, generator)
        parts.append(target(images.train_x[rows], images.train_y[rows]))
    domain = torch.arange(len(left)) % len(DOMAINS)
    x = images.train_x[left]
    for d, change in enumerate(DOMAINS.values()):
        x[domain == d] = change(x[domain == d])
    source = TensorDataset(x, images.train_y[left], torch.arange(len(left)))
    return Split(source, domain, *parts, target(images.test_x, images.test_y))


def ignoring(cell: Cell[LearningByIgnoringConfig]) -> Outcome:
    """The three levels."""
    data = split(cell.config, cell.seed)
    program = three_levels(cell, data)
    scores = _train(cell, program, data, "finetuned")
    with program.inference("ignore") as ignore:
        weights = ignore(torch.arange(len(data.domain)).to(program.device)).squeeze(1).sigmoid().cpu()
    return Outcome(
        scores, {"weights": np.array([float(weights[data.domain == d].mean()) for d in range(len(DOMAINS))])}
    )


def three_levels(cell: Cell[LearningByIgnoringConfig], data: Split, *, held: bool = False) -> mlo.Program:
    """The program.

    Args:
        cell: The arm and its seed.
        data: The parts.
        held: Whether all source examples count alike, and V is trained on all of the target instead.

    Returns:
        It, untrained.
    """
    config = cell.config
    optimizer = partial(torch.optim.SGD, lr=0.0) if held else config.ignore.optimizer()
    target = data.target_and_meta if held else data.target
    table = nn.Embedding(len(data.domain), 1)
    nn.init.zeros_(table.weight)
    upper = Ignore("ignore", table, data=_loader(config, data.meta), optimizer=optimizer)
    middle = Pretrain("pretrained", hypergradient=config.hypergradient.build(), **_options(config, data.source))
    lower = Finetune("finetuned", hypergradient=config.hypergradient.build(), **_options(config, target))
    lower.proximity = config.proximity
    return cell.program([upper, middle, lower])


def one_net(cell: Cell[LearningByIgnoringConfig], *, source: bool, target: bool) -> Outcome:
    """A baseline.

    Args:
        cell: The arm and its seed.
        source: Whether to train on the sources.
        target: Whether to train on the target.

    Returns:
        What it found.
    """
    data = split(cell.config, cell.seed)
    parts = [data.source] * source + [data.target_and_meta] * target
    train = TensorDataset(*(torch.cat([part.tensors[i] for part in parts]) for i in range(2)))
    program = cell.program([Fit("net", **_options(cell.config, train))])
    return Outcome(_train(cell, program, data, "net"))


def near(cell: Cell[LearningByIgnoringConfig]) -> Outcome:
    """A baseline: V near W, all source examples alike."""
    data = split(cell.config, cell.seed)
    return Outcome(_train(cell, three_levels(cell, data, held=True), data, "finetuned"))


def _loader(config: LearningByIgnoringConfig, data: TensorDataset) -> DataLoader:
    return DataLoader(data, min(config.batch_size, len(data)), shuffle=True, drop_last=True)


def _options(config: LearningByIgnoringConfig, data: TensorDataset) -> dict:
    return dict(
        module=Net(config.hidden),
        data=_loader(config, data),
        optimizer=config.nets.optimizer(),
        scheduler=config.nets.scheduler(config.steps),
    )


def _train(cell: Cell[LearningByIgnoringConfig], program: mlo.Program, data: Split, level: str) -> dict[str, float]:
    evaluate = partial(test_and_validation, program, level, data)
    return cell.train(program, cell.config.steps, evaluate, every=cell.config.evaluate_every)


def draw(axes, outcomes) -> None:
    """The learned weight of the examples of every domain, a dot a seed."""
    for outcome in outcomes.get("learning by ignoring", ()):
        axes.scatter(range(len(DOMAINS)), outcome.arrays["weights"], color="#2a7f62", alpha=0.6, s=42, zorder=3)
    axes.axhline(0.5, color="#8a8f98", linewidth=1, linestyle="--")
    axes.annotate("at first", (len(DOMAINS) - 0.5, 0.51), ha="right", fontsize=8, color="#8a8f98")
    axes.set_title("Mean weight of a source domain, a dot a seed", fontsize=10, loc="left")
    axes.set_xticks(range(len(DOMAINS)), list(DOMAINS))
    axes.set_xlim(-0.5, len(DOMAINS) - 0.5)
    axes.set_ylim(0, 1)
    axes.grid(axis="y", color="#e3e5e8", zorder=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


ARMS = {
    "sources alone": partial(one_net, source=True, target=False),
    "target alone": partial(one_net, source=False, target=True),
    "one net on both": partial(one_net, source=True, target=True),
    "target near sources": near,
    "learning by ignoring": ignoring,
}


def build(config: LearningByIgnoringConfig) -> mlo.Program:
    """The three levels, untrained."""
    cell = Cell(config, "learning by ignoring", config.seed)
    torch.manual_seed(cell.seed)
    return three_levels(cell, split(config, config.seed))


RECIPE = Recipe(
    LearningByIgnoringConfig,
    build,
    compared(ARMS, draw),
    "adapt to a target domain with few labels, learning which source examples to ignore; three levels",
    "Zhao et al. 2020, Learning by Ignoring, with Application to Domain Adaptation (arXiv:2012.14288)",
)
