"""Classify images of which many have a wrong label, learning from a few clean ones how much each example counts.

A share of the training images has the label of another class, drawn uniformly. Above, what gives every example i a
weight V_i; below, a classifier on weighted losses:

    min_theta  mean_j l_j(w*(theta))                                over a few clean examples j
    s.t.       w*(theta) = argmin_w  sum_i V_i l_i(w) / sum_i V_i

V is either a net on the loss, V_i = V(l_i; theta), or a table, V_i = sigmoid(theta_i). Baselines: all examples alike;
the clean ones among them, for as many steps and for twice as many; the clean ones alone. A clean validation set, which
no arm trains on, picks the best moment.

References: for the net, Shu et al. 2019, "Meta-Weight-Net: Learning an Explicit Mapping For Sample Weighting"
(arXiv:1902.07379); for a weight per example, Ren et al. 2018, "Learning to Reweight Examples for Robust Deep Learning"
(arXiv:1803.09050).
"""

from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import scalemlo as mlo

from ..hf.trainer.reweighting import ExampleWeights
from ..reporting.tables import auroc
from ..runs import config as cfg
from .data.images import ImageData, SmallCNN, load_images, take_per_class
from .study.classification import Fit, losses, test_and_validation
from .study.picture import BASELINE, METHOD
from .study.recipe import Recipe
from .study.study import Cell, ComparisonConfig, Outcome, compared

NUM_CLASSES = 10
AUROC = "AUROC of weights, right against wrong labels"


@dataclass(kw_only=True)
class LabelNoiseConfig(ComparisonConfig):
    """Configuration of this recipe.

    Args:
        data: The images.
        num_train: Images to train on, of which some labels are wrong; fewer where there are not as many.
        wrong_share: Share of these whose label is that of another class.
        num_clean_per_class: Images with their true label that weights are learned from.
        num_validation_per_class: Images with their true label that pick the best moment.
        steps: Steps of the classifier; the weights take as many.
        batch_size: Training images per step, and clean ones.
        evaluate_every: Steps between two evaluations.
        classifier: Its optimizer.
        weight_net: The optimizer of the net on the loss.
        table: The optimizer of the table.
        hypergradient: How weights are differentiated through the classifier.

    Raises:
        ValueError: If ``wrong_share`` is not in (0, 1).
    """

    data: ImageData = "digits"
    num_train: int = 1000
    wrong_share: float = 0.4
    num_clean_per_class: int = 10
    num_validation_per_class: int = 20
    steps: int = 600
    batch_size: int = 100
    evaluate_every: int = 50
    classifier: cfg.OptimizerConfig = field(default_factory=cfg.OptimizerConfig)
    weight_net: cfg.OptimizerConfig = field(default_factory=cfg.OptimizerConfig)
    table: cfg.OptimizerConfig = field(default_factory=cfg.OptimizerConfig)
    hypergradient: cfg.HypergradientConfig = field(default_factory=cfg.ESTIMATOR_CONFIGS["identity"])

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.wrong_share < 1.0:
            raise ValueError(f"wrong_share={self.wrong_share} must lie between 0 and 1: some labels right, some wrong")


class WeightNet(nn.Module):
    """Meta-Weight-Net: the weight of an example from its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 100), nn.ReLU(), nn.Linear(100, 1), nn.Sigmoid())

    def forward(self, found: Tensor, index: Tensor) -> Tensor:
        """Weights ``[B]`` of examples with losses ``found [B]``, whose numbers ``index`` make no difference."""
        return self.net(found.unsqueeze(1)).squeeze(1)


class Table(ExampleWeights):
    """One weight in (0, 1) for every training example, 1/2 at the start."""

    def forward(self, found: Tensor, index: Tensor) -> Tensor:
        """Weights ``[B]`` of the examples with the numbers ``index [B]``, whose losses make no difference."""
        return super().forward(index)


class Weigh(mlo.Level):
    """Upper level: the classifier should do well on clean examples."""

    def loss(self, batch, classifier):
        """Mean loss over clean examples."""
        return mlo.mean(losses(classifier, batch))


class Classify(mlo.Level):
    """Lower level: every example counts as much as its weight says."""

    def loss(self, batch, weights):
        """Weighted mean of the losses."""
        found = losses(self.module, batch)
        return mlo.weighted_mean(found, weights(found.detach(), batch[2]))


@dataclass
class Split:
    """Images, labels and (``train``) numbers of the parts; ``is_right [N]`` says which training labels are true."""

    train: TensorDataset
    clean: TensorDataset
    validation: TensorDataset
    test: TensorDataset
    is_right: Tensor


def split(config: LabelNoiseConfig, seed: int) -> Split:
    """Draw the parts: clean ones first, then the training part from what is left, and its wrong labels."""
    images = load_images(config.data)
    generator = torch.Generator().manual_seed(seed)
    left = torch.arange(len(images.train_y))
    parts = []
    for count in (config.num_clean_per_class, config.num_validation_per_class):
        rows, left = take_per_class(images.train_y, left, [count] * NUM_CLASSES, generator)
        parts.append(TensorDataset(images.train_x[rows], images.train_y[rows]))
    rows = left[: config.num_train]
    given, is_right = with_wrong_labels(images.train_y[rows], config.wrong_share, generator)
    train = TensorDataset(images.train_x[rows], given, torch.arange(len(rows)))
    return Split(train, *parts, TensorDataset(images.test_x, images.test_y), is_right)


def with_wrong_labels(labels: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Give some examples the label of another class, each of the others with the same probability.

    Args:
        labels: True ones ``[N]``.
        share: How many are wrong afterwards, rounded.
        generator: Draws.

    Returns:
        Labels, and which of them are right, both ``[N]``.
    """
    wrong = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    given = labels.clone()
    given[wrong] = (labels[wrong] + torch.randint(1, NUM_CLASSES, (len(wrong),), generator=generator)) % NUM_CLASSES
    return given, given == labels


def weighted(cell: Cell[LabelNoiseConfig], *, by_table: bool) -> Outcome:
    """The two levels.

    Args:
        cell: The arm and its seed.
        by_table: Whether weights are a table; else they come from a net on the loss.

    Returns:
        What it found.
    """
    data = split(cell.config, cell.seed)
    program = two_levels(cell, data, by_table=by_table)
    scores = _train(cell, program, data)
    parts = [part.to(program.device) for part in data.train.tensors]
    with program.inference("classifier") as classifier, program.inference("weights") as weights:
        found = weights(losses(classifier, parts), parts[2]).cpu()
    scores[AUROC] = auroc(found.numpy(), data.is_right.numpy())
    return Outcome(scores, {"weight": found.numpy(), "is_right": data.is_right.numpy()})


def two_levels(cell: Cell[LabelNoiseConfig], data: Split, *, by_table: bool = False) -> mlo.Program:
    """The program."""
    config = cell.config
    module: nn.Module = Table(len(data.train)) if by_table else WeightNet()
    optimizer = (config.table if by_table else config.weight_net).optimizer()
    lower = _options(cell, data.train, config.steps)
    return cell.program(
        [
            Weigh("weights", module, data=_loader(config, data.clean), optimizer=optimizer),
            Classify("classifier", hypergradient=config.hypergradient.build(), **lower),
        ]
    )


def plain(
    cell: Cell[LabelNoiseConfig], *, with_clean: bool = False, only_clean: bool = False, longer: int = 1
) -> Outcome:
    """A baseline.

    Args:
        cell: The arm and its seed.
        with_clean: Whether to train on the clean examples too.
        only_clean: Whether to train on them alone.
        longer: How many times the steps of the configuration.

    Returns:
        What it found.
    """
    data = split(cell.config, cell.seed)
    parts = [data.clean] if only_clean else [data.train, data.clean] if with_clean else [data.train]
    train = TensorDataset(*(torch.cat([part.tensors[i] for part in parts]) for i in range(2)))
    steps = longer * cell.config.steps
    program = cell.program([Fit("classifier", **_options(cell, train, steps))])
    return Outcome(_train(cell, program, data, longer=longer))


def _options(cell: Cell[LabelNoiseConfig], train: TensorDataset, steps: int) -> dict:
    config = cell.config
    return dict(
        module=SmallCNN(train.tensors[0].shape[-1], NUM_CLASSES),
        data=_loader(config, train),
        optimizer=config.classifier.optimizer(),
        scheduler=config.classifier.scheduler(steps),
    )


def _loader(config: LabelNoiseConfig, part: TensorDataset) -> DataLoader:
    return DataLoader(part, min(config.batch_size, len(part)), shuffle=True, drop_last=True)


def _train(cell: Cell[LabelNoiseConfig], program: mlo.Program, data: Split, *, longer: int = 1) -> dict[str, float]:
    """Train; as many evaluations, whatever the number of steps."""
    config, evaluate = cell.config, partial(test_and_validation, program, "classifier", data)
    return cell.train(program, longer * config.steps, evaluate, every=longer * config.evaluate_every)


def draw(axes, outcomes) -> None:
    """Distribution of the table's weights, of right and of wrong labels, all seeds together."""
    found = outcomes.get("table of weights", ())
    if not found:
        return
    weight, is_right = (np.concatenate([o.arrays[key] for o in found]) for key in ("weight", "is_right"))
    options = dict(bins=25, range=(0, 1), density=True, alpha=0.7)
    axes.hist(weight[is_right], color=METHOD, label="right label", **options)
    axes.hist(weight[~is_right], color=BASELINE, label="wrong label", **options)
    axes.set_title("Weights of the table, all seeds", fontsize=10, loc="left")
    axes.set(xlabel="weight", ylabel="density")
    axes.legend(fontsize=9, frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


ARMS = {
    "plain": plain,
    "plain, with the clean ones": partial(plain, with_clean=True),
    "the same, twice as long": partial(plain, with_clean=True, longer=2),
    "clean ones only": partial(plain, only_clean=True),
    "meta-weight-net": partial(weighted, by_table=False),
    "table of weights": partial(weighted, by_table=True),
}


def build(config: LabelNoiseConfig) -> mlo.Program:
    """The two levels with the net on the loss, untrained."""
    cell = Cell(config, "meta-weight-net", config.seed)
    torch.manual_seed(cell.seed)
    return two_levels(cell, split(config, config.seed))


RECIPE = Recipe(
    LabelNoiseConfig,
    build,
    compared(ARMS, draw),
    "classify images of which many have a wrong label, learning from a few clean ones how much each example counts",
    "Shu et al. 2019, Meta-Weight-Net: Learning an Explicit Mapping For Sample Weighting (arXiv:1902.07379)",
)
