"""Classify images of which some classes are rare, learning from a small balanced set how much each loss counts.

Class c of K has n_max / imbalance^(c / (K - 1)) training images. Above, a net V that gives every loss a weight; below,
a classifier on weighted losses:

    min_theta  mean_j l_j(w*(theta))                        over a few balanced examples j
    s.t.       w*(theta) = argmin_w  mean_i V(l_i(w); theta) l_i(w)

Baselines with the same budget: all examples alike; the balanced examples among them; losses over their class's
frequency. A balanced validation set, which no arm trains on, picks the best moment.

Reference: Shu et al. 2019, "Meta-Weight-Net: Learning an Explicit Mapping For Sample Weighting" (arXiv:1902.07379).
"""

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import scalemlo as mlo

from ..runs import config as cfg
from .data.images import ImageData, SmallCNN, load_images, take_per_class
from .study.classification import losses, test_and_validation
from .study.recipe import Recipe
from .study.study import Cell, ComparisonConfig, Outcome, compared


@dataclass(kw_only=True)
class LongTailConfig(ComparisonConfig):
    """Configuration of this recipe.

    Args:
        data: The images.
        num_largest: Images of the most frequent class.
        imbalance: How many times those of the rarest one.
        num_meta_per_class: Balanced examples that the weights are learned from.
        num_validation_per_class: Balanced examples that pick the best moment.
        steps: Steps of the classifier; the net of the weights takes as many.
        batch_size: Training images per step.
        evaluate_every: Steps between two evaluations.
        classifier: Its optimizer.
        weight_net: The optimizer of the net of the weights.
        hypergradient: How the net of the weights is differentiated through the classifier.

    Raises:
        ValueError: If a class would have no training image.
    """

    data: ImageData = "fashion_mnist"
    num_largest: int = 2000
    imbalance: float = 100.0
    num_meta_per_class: int = 10
    num_validation_per_class: int = 50
    steps: int = 1000
    batch_size: int = 100
    evaluate_every: int = 100
    classifier: cfg.OptimizerConfig = field(default_factory=cfg.OptimizerConfig)
    weight_net: cfg.OptimizerConfig = field(default_factory=cfg.OptimizerConfig)
    hypergradient: cfg.HypergradientConfig = field(default_factory=cfg.ESTIMATOR_CONFIGS["identity"])

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.imbalance < 2 * self.num_largest:  # the rarest class has their ratio, rounded
            raise ValueError(
                f"imbalance={self.imbalance:g} must be at least 1 and below 2 * num_largest={2 * self.num_largest}, so "
                "that every class has an image"
            )


class Weigh(mlo.Level):
    """Upper level: the classifier should do well on balanced examples."""

    def loss(self, batch, classifier):
        """Mean loss over balanced examples."""
        return mlo.mean(losses(classifier, batch))


class Classify(mlo.Level):
    """Lower level: every loss counts as much as the net says."""

    def loss(self, batch, weights):
        """Weighted mean of the losses."""
        found = losses(self.module, batch)
        return mlo.weighted_mean(found, weights(found.detach().unsqueeze(1)).squeeze(1))


class ClassifyPlain(mlo.Level):
    """A baseline: every loss counts as much as ``class_weights`` ``[K]`` say."""

    class_weights: Tensor

    def loss(self, batch):
        """Weighted mean of the losses."""
        return mlo.mean(losses(self.module, batch) * self.class_weights[batch[1]])


@dataclass
class Split:
    """Images and labels of the parts."""

    train: TensorDataset
    meta: TensorDataset
    validation: TensorDataset
    test: TensorDataset


def split(config: LongTailConfig, seed: int) -> Split:
    """Draw the parts: balanced ones first, then the long tail from what is left."""
    images = load_images(config.data)
    generator = torch.Generator().manual_seed(seed)
    classes = range(10)
    share = torch.tensor([config.imbalance ** (-c / 9) for c in classes])
    left = torch.arange(len(images.train_y))
    parts = []
    for counts in (
        [config.num_meta_per_class] * 10,
        [config.num_validation_per_class] * 10,
        (config.num_largest * share).round().int().tolist(),
    ):
        rows, left = take_per_class(images.train_y, left, counts, generator)
        parts.append(TensorDataset(images.train_x[rows], images.train_y[rows]))
    return Split(parts[2], parts[0], parts[1], TensorDataset(images.test_x, images.test_y))


def reweighted(cell: Cell[LongTailConfig]) -> Outcome:
    """The two levels."""
    data = split(cell.config, cell.seed)
    program = two_levels(cell, data)
    scores = _train(cell, program, data)
    grid = torch.linspace(0, 6, 61, device=program.device)
    with program.inference("weights") as net:
        curve = net(grid.unsqueeze(1)).squeeze(1)
    return Outcome(scores, {"loss": grid.cpu().numpy(), "weight": curve.cpu().numpy()})


def two_levels(cell: Cell[LongTailConfig], data: Split) -> mlo.Program:
    """The program."""
    config = cell.config
    net = nn.Sequential(nn.Linear(1, 100), nn.ReLU(), nn.Linear(100, 1), nn.Sigmoid())
    meta = DataLoader(data.meta, min(config.batch_size, len(data.meta)), shuffle=True, drop_last=True)
    return cell.program(
        [
            Weigh("weights", net, data=meta, optimizer=config.weight_net.optimizer()),
            Classify("classifier", hypergradient=config.hypergradient.build(), **_options(cell, data.train)),
        ]
    )


def plain(cell: Cell[LongTailConfig], *, with_meta: bool = False, balanced: bool = False) -> Outcome:
    """A baseline.

    Args:
        cell: The arm and its seed.
        with_meta: Whether to train on the balanced examples too.
        balanced: Whether losses are divided by the frequency of their class.

    Returns:
        What it found.
    """
    data = split(cell.config, cell.seed)
    train = data.train
    if with_meta:
        train = TensorDataset(*(torch.cat(pair) for pair in zip(train.tensors, data.meta.tensors, strict=True)))
    level = ClassifyPlain("classifier", **_options(cell, train))
    counts = torch.bincount(train.tensors[1], minlength=10).float()
    level.class_weights = counts.sum() / (10 * counts) if balanced else torch.ones(10)
    return Outcome(_train(cell, cell.program([level]), data))


def _options(cell: Cell[LongTailConfig], train: TensorDataset) -> dict:
    config = cell.config
    return dict(
        module=SmallCNN(train.tensors[0].shape[-1]),
        data=DataLoader(train, config.batch_size, shuffle=True, drop_last=True),
        optimizer=config.classifier.optimizer(),
        scheduler=config.classifier.scheduler(config.steps),
    )


def _train(cell: Cell[LongTailConfig], program: mlo.Program, data: Split) -> dict[str, float]:
    evaluate = partial(test_and_validation, program, "classifier", data)
    return cell.train(program, cell.config.steps, evaluate, every=cell.config.evaluate_every)


def draw(axes, outcomes) -> None:
    """The learned weight of a loss, one curve a seed."""
    for outcome in outcomes.get("meta-weight-net", ()):
        axes.plot(outcome.arrays["loss"], outcome.arrays["weight"], color="#2a7f62", alpha=0.7)
    axes.set(title="Learned weight of a loss, one curve a seed", xlabel="loss", ylabel="weight")


ARMS = {
    "plain": plain,
    "plain, with the balanced examples": partial(plain, with_meta=True),
    "over class frequency": partial(plain, with_meta=True, balanced=True),
    "meta-weight-net": reweighted,
}


def build(config: LongTailConfig) -> mlo.Program:
    """The two levels, untrained."""
    cell = Cell(config, "meta-weight-net", config.seed)
    torch.manual_seed(cell.seed)
    return two_levels(cell, split(config, config.seed))


RECIPE = Recipe(
    LongTailConfig,
    build,
    compared(ARMS, draw),
    "classify images of which some classes are rare, learning the weight of every loss from a small balanced set",
    "Shu et al. 2019, Meta-Weight-Net: Learning an Explicit Mapping For Sample Weighting (arXiv:1902.07379)",
)
