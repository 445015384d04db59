"""Classify images whose mark goes with the class in training, learning how much each group counts.

Two classes of images carry a mark in the left or in the right upper corner; in training it is on the side of the class
but for a few images, so that a classifier may read the mark, not the image. Class and side make four groups g. Above,
weights q = softmax(theta) of the groups; below, a classifier on weighted losses:

    min_theta  t log sum_g exp(F_g(w*(theta)) / t)           F_g: mean loss of group g on a few balanced examples
    s.t.       w*(theta) = argmin_w  sum_i q_g(i) l_i(w) / sum_i q_g(i)

The upper loss tends to that of the worst group as t -> 0. Baselines with the same budget, which train on the balanced
examples too: all examples alike; losses over the frequency of their group. A validation set with as many images of each
group picks the moment at which the worst group does best.

Reference: Roh et al. 2021, "FairBatch: Batch Selection for Model Fairness" (arXiv:2012.01696), whose outer problem sets
the shares of groups in a batch; here it is differentiated. The problem is that of Sagawa et al. 2020, "Distributionally
Robust Neural Networks for Group Shifts" (arXiv:1911.08731).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import scalemlo as mlo

from ..distributed.group import all_reduce_sum
from ..runs import config as cfg
from .data.images import ImageData, SmallCNN, load_images
from .study.classification import losses
from .study.recipe import Recipe
from .study.study import VALIDATION, Cell, ComparisonConfig, Outcome, compared

GROUPS = ("first class, own side", "first class, other side", "second class, other side", "second class, own side")
COLORS = ("#9cc9b7", "#2a7f62", "#b5541c", "#e8b894")


@dataclass(kw_only=True)
class GroupFairnessConfig(ComparisonConfig):
    """Configuration of this recipe.

    Args:
        data: The images.
        classes: The two classes.
        num_train: Training images.
        share_own: Share of them whose mark is on the side of their class.
        num_meta_per_group: Examples that the weights are learned from.
        num_validation_per_group: Examples that pick the best moment.
        temperature: t of the upper loss.
        steps: Steps of the classifier; the weights take as many.
        batch_size: Training images per step.
        evaluate_every: Steps between two evaluations.
        classifier: Its optimizer.
        weights: The optimizer of the weights.
        hypergradient: How the weights are differentiated through the classifier.
    """

    data: ImageData = "fashion_mnist"
    classes: tuple[int, int] = (4, 6)
    num_train: int = 2000
    share_own: float = 0.95
    num_meta_per_group: int = 25
    num_validation_per_group: int = 100
    temperature: float = 0.1
    steps: int = 600
    batch_size: int = 100
    evaluate_every: int = 50
    classifier: cfg.OptimizerConfig = field(default_factory=cfg.OptimizerConfig)
    weights: cfg.OptimizerConfig = field(default_factory=cfg.OptimizerConfig)
    hypergradient: cfg.HypergradientConfig = field(default_factory=cfg.ESTIMATOR_CONFIGS["identity"])


class GroupWeights(nn.Module):
    """``4 softmax(theta)``, equal at first."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(len(GROUPS)))

    def forward(self, groups: Tensor) -> Tensor:
        """Weights ``[B]`` of examples by their groups ``[B]``."""
        return len(GROUPS) * self.logits.softmax(0)[groups]


class Weigh(mlo.Level):
    """Upper level: the group with the largest loss should have a small one.

    The gradient of ``t log sum_g exp(F_g / t)`` is that of ``sum_g p_g F_g``, with p = softmax(F / t) a constant.
    """

    temperature: float

    def loss(self, batch, classifier):
        """Mean loss of every group that is in the batch, mostly that of the worst one."""
        found, zeros = losses(classifier, batch), batch[0].new_zeros(len(GROUPS))
        sums = all_reduce_sum(zeros.index_add(0, batch[2], found.detach()))
        counts = all_reduce_sum(zeros.index_add(0, batch[2], torch.ones_like(found)))
        present = counts > 0
        means = (sums / counts.clamp_min(1)).masked_fill(~present, -torch.inf)
        shares = (means / self.temperature).softmax(0) / counts.clamp_min(1)
        return mlo.weighted_mean(found, shares[batch[2]])


class Classify(mlo.Level):
    """Lower level: every loss counts as much as its group."""

    def loss(self, batch, weights):
        """Weighted mean of the losses."""
        return mlo.weighted_mean(losses(self.module, batch), weights(batch[2]))


class ClassifyFixed(mlo.Level):
    """A baseline: groups count as much as ``group_weights`` ``[4]`` say."""

    group_weights: Tensor

    def loss(self, batch):
        """Weighted mean of the losses."""
        return mlo.weighted_mean(losses(self.module, batch), self.group_weights[batch[2]])


@dataclass
class Split:
    """Images, labels and groups of the parts."""

    train: TensorDataset
    meta: TensorDataset
    validation: TensorDataset
    test: TensorDataset


def split(config: GroupFairnessConfig, seed: int) -> Split:
    """Draw the parts and mark the images; in all but the training part groups are of one size.

    Args:
        config: The configuration.
        seed: Draws.

    Returns:
        The parts.
    """
    images = load_images(config.data)
    generator = torch.Generator().manual_seed(seed)
    own = round(config.num_train * config.share_own / 2)
    counts = {"meta": [config.num_meta_per_group] * 2, "validation": [config.num_validation_per_group] * 2}
    parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for label, name in enumerate(config.classes):
        rows = (images.train_y == name).nonzero().squeeze(1)
        rows = rows[torch.randperm(len(rows), generator=generator)]
        train = [config.num_train // 2 - own] * 2
        train[label] = own
        for part, by_side in (counts | {"train": train}).items():
            for side, count in enumerate(by_side):
                taken, rows = rows[:count], rows[count:]
                parts.setdefault(part, []).append(marked(images.train_x[taken], label, side))
        for side, x in enumerate(images.test_x[images.test_y == name].chunk(2)):
            parts.setdefault("test", []).append(marked(x, label, side))
    return Split(**{part: TensorDataset(*map(torch.cat, zip(*found, strict=True))) for part, found in parts.items()})


def marked(x: Tensor, label: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images ``[N, 1, H, W]`` with a bright square in a corner, with labels and groups ``[N]``."""
    size = max(1, x.shape[-1] // 8)
    x = x.clone()
    columns = slice(0, size) if side == 0 else slice(x.shape[-1] - size, x.shape[-1])
    x[:, :, :size, columns] = 2.0
    return x, torch.full((len(x),), label), torch.full((len(x),), 2 * label + side)


def reweighted(cell: Cell[GroupFairnessConfig]) -> Outcome:
    """The two levels."""
    data = split(cell.config, cell.seed)
    program = two_levels(cell, data)
    steps, shares = [0], [np.full(len(GROUPS), 1 / len(GROUPS))]

    def note() -> None:
        with program.inference("weights") as weights:
            shares.append(weights(torch.arange(len(GROUPS), device=program.device)).cpu().numpy() / len(GROUPS))
        steps.append(program.num_steps)

    scores = _train(cell, program, data, note)
    return Outcome(scores, {"step": np.array(steps), "share": np.stack(shares)})


def two_levels(cell: Cell[GroupFairnessConfig], data: Split) -> mlo.Program:
    """The program."""
    config = cell.config
    meta = DataLoader(data.meta, min(config.batch_size, len(data.meta)), shuffle=True, drop_last=True)
    upper = Weigh("weights", GroupWeights(), data=meta, optimizer=config.weights.optimizer())
    upper.temperature = config.temperature
    lower = Classify("classifier", hypergradient=config.hypergradient.build(), **_options(cell, data.train))
    return cell.program([upper, lower])


def fixed(cell: Cell[GroupFairnessConfig], *, balanced: bool) -> Outcome:
    """A baseline.

    Args:
        cell: The arm and its seed.
        balanced: Whether losses are divided by the frequency of their group.

    Returns:
        What it found.
    """
    data = split(cell.config, cell.seed)
    train = TensorDataset(*(torch.cat(pair) for pair in zip(data.train.tensors, data.meta.tensors, strict=True)))
    level = ClassifyFixed("classifier", **_options(cell, train))
    counts = torch.bincount(train.tensors[2], minlength=len(GROUPS)).float()
    program = cell.program([level])
    level.group_weights = (1 / counts if balanced else torch.ones_like(counts)).to(program.device)
    return Outcome(_train(cell, program, data))


def _options(cell: Cell[GroupFairnessConfig], train: TensorDataset) -> dict:
    config = cell.config
    return dict(
        module=SmallCNN(train.tensors[0].shape[-1], num_classes=2),
        data=DataLoader(train, config.batch_size, shuffle=True, drop_last=True),
        optimizer=config.classifier.optimizer(),
        scheduler=config.classifier.scheduler(config.steps),
    )


def _train(
    cell: Cell[GroupFairnessConfig], program: mlo.Program, data: Split, note: Callable[[], None] = lambda: None
) -> dict[str, float]:
    def evaluate() -> Mapping[str, float]:
        note()
        with program.inference("classifier") as classifier:
            test, validation = (by_group(classifier, part, program.device) for part in (data.test, data.validation))
        return {"worst group, %": test.min(), "mean over groups, %": test.mean(), VALIDATION: validation.min()}

    return cell.train(program, cell.config.steps, evaluate, every=cell.config.evaluate_every)


def by_group(classifier, part: TensorDataset, device: torch.device) -> np.ndarray:
    """Accuracy of every group, %."""
    x, y, groups = part.tensors
    right = torch.cat([classifier(some.to(device)).argmax(1).cpu() for some in x.split(2000)]) == y
    return np.array([100 * float(right[groups == g].float().mean()) for g in range(len(GROUPS))])


def draw(axes, outcomes) -> None:
    """The learned share of every group over the steps, mean over seeds."""
    found = outcomes.get("learned group weights", ())
    if not found:
        return
    shares = np.mean([outcome.arrays["share"] for outcome in found], 0)
    for g, name in enumerate(GROUPS):
        axes.plot(found[0].arrays["step"], shares[:, g], color=COLORS[g], label=name, linewidth=2)
    axes.set_title("Learned weights, mean over seeds", fontsize=10, loc="left")
    axes.set(xlabel="step", ylabel="share of the weight")
    axes.set_ylim(0, 1.3)  # room for the names
    axes.set_yticks(np.arange(0, 1.1, 0.2))
    axes.legend(fontsize=8, frameon=False, loc="upper left", ncols=2)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


ARMS = {
    "plain": partial(fixed, balanced=False),
    "over group frequency": partial(fixed, balanced=True),
    "learned group weights": reweighted,
}


def build(config: GroupFairnessConfig) -> mlo.Program:
    """The two levels, untrained."""
    cell = Cell(config, "learned group weights", config.seed)
    torch.manual_seed(cell.seed)
    return two_levels(cell, split(config, config.seed))


RECIPE = Recipe(
    GroupFairnessConfig,
    build,
    compared(ARMS, draw),
    "classify images with a misleading mark, learning how much each group counts so that the worst one does well",
    "Roh et al. 2021, FairBatch: Batch Selection for Model Fairness (arXiv:2012.01696)",
)
