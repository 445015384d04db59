"""Learn from weak labels that a corrector rewrites, taught by a few clean ones.

Above, a net h that maps an example and its weak label to a distribution over labels; below, a classifier on these:

    min_theta  mean_j CE(f_w*(theta)(x_j), y_j)                                  over the clean examples j
    s.t.       w*(theta) = argmin_w  mean_i CE(f_w(x_i), h_theta(x_i, weak_i)) + c mean_j CE(f_w(x_j), y_j)

over weakly labelled examples i; c is 0, or as in the baseline on both. h is softmax(T[weak] + g(x)), a label
transition T that begins with trust in the weak label and a net g that begins at zero. Baselines with the same budget:
weak labels as they are; clean ones alone; both. A few more clean examples pick the best moment.

Reference: Zheng et al. 2021, "Meta Label Correction for Noisy Label Learning" (arXiv:1911.03809).
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import scalemlo as mlo

from ..runs import config as cfg
from .data.images import load_images
from .data.reviews import weak_reviews
from .study.classification import losses, test_and_validation
from .study.recipe import Recipe
from .study.study import Cell, ComparisonConfig, Outcome, compared


@dataclass(kw_only=True)
class LabelCorrectionConfig(ComparisonConfig):
    """Configuration of this recipe.

    Args:
        data: ``rotten_tomatoes``: sentences as frozen MiniLM vectors, labelled weakly by VADER's lexicon; ``digits``:
            images, of which a share has the label of the next digit.
        wrong_share: That share, for digits.
        num_clean: Examples whose true label may be used.
        num_validation: Examples that pick the best moment.
        clean_weight: c, in the arms that train on clean examples too.
        trust: What the transition gives the weak label before others, as a logit, at first.
        corrector_size: Hidden units of g; 0 leaves it out, and the corrector is a transition alone.
        steps: Steps of the classifier; the corrector takes as many.
        batch_size: Weakly labelled examples per step.
        evaluate_every: Steps between two evaluations.
        classifier: Its optimizer.
        corrector: The corrector's optimizer.
        hypergradient: How the corrector is differentiated through the classifier.
    """

    data: Literal["rotten_tomatoes", "digits"] = "rotten_tomatoes"
    wrong_share: float = 0.45
    num_clean: int = 100
    num_validation: int = 200
    clean_weight: float = 1.0
    trust: float = 2.0
    corrector_size: int = 32
    steps: int = 300
    batch_size: int = 256
    evaluate_every: int = 25
    classifier: cfg.OptimizerConfig = field(default_factory=cfg.OptimizerConfig)
    corrector: cfg.OptimizerConfig = field(default_factory=cfg.OptimizerConfig)
    hypergradient: cfg.HypergradientConfig = field(default_factory=cfg.ESTIMATOR_CONFIGS["sama"])


class Corrector(nn.Module):
    """``softmax(T[weak] + g(x))``.

    Args:
        num_features: Of x.
        num_classes: Of labels.
        hidden: Hidden units of g; 0 leaves it out.
        trust: Diagonal of T at first.
    """

    def __init__(self, num_features: int, num_classes: int, hidden: int, trust: float):
        super().__init__()
        self.transition = nn.Parameter(trust * torch.eye(num_classes))
        self.net = None
        if hidden:
            last = nn.Linear(hidden, num_classes)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.net = nn.Sequential(nn.Linear(num_features, hidden), nn.Tanh(), last)

    def forward(self, x: Tensor, weak: Tensor) -> Tensor:
        """Distributions over labels ``[B, K]``."""
        logits = self.transition[weak]
        return (logits if self.net is None else logits + self.net(x)).softmax(1)


class Correct(mlo.Level):
    """Upper level: the classifier should be right on clean examples."""

    def loss(self, batch, classifier):
        """Mean loss over clean examples."""
        return mlo.mean(losses(classifier, batch))


class Classify(mlo.Level):
    """A baseline: labels as they are, and clean examples beside them."""

    beside: tuple[Tensor, Tensor]
    beside_weight: float

    def loss(self, batch):
        """Mean loss."""
        return self.with_clean(mlo.mean(losses(self.module, batch)))

    def with_clean(self, loss: Tensor) -> Tensor:
        """A loss and that of all clean examples, the same on every rank."""
        return loss + self.beside_weight * losses(self.module, self.beside).mean() if self.beside_weight else loss


class ClassifyCorrected(Classify):
    """Lower level: the same on corrected labels."""

    def loss(self, batch, corrector):
        """Mean loss."""
        soft = corrector(batch[0], batch[1])
        return self.with_clean(mlo.mean(-(soft * self.module(batch[0]).log_softmax(1)).sum(1)))


@dataclass
class Split:
    """Features and labels of the parts; those of ``weak`` are weak, and ``truth`` is what they should be."""

    weak: TensorDataset
    clean: TensorDataset
    validation: TensorDataset
    test: TensorDataset
    truth: Tensor
    num_classes: int


def split(config: LabelCorrectionConfig, seed: int) -> Split:
    """Draw the parts.

    Args:
        config: The configuration.
        seed: Draws which examples are clean, which pick the moment, and which digits are mislabelled.

    Returns:
        The parts.
    """
    generator = torch.Generator().manual_seed(seed)
    if config.data == "rotten_tomatoes":
        data, num_classes = weak_reviews(), 2
    else:
        images, num_classes = load_images("digits"), 10
        label = torch.cat([images.train_y, images.test_y])
        wrong = torch.rand(len(label), generator=generator) < config.wrong_share
        rows = torch.arange(len(label)).split([len(images.train_y), len(images.test_y)])
        data = {
            "x": torch.cat([images.train_x, images.test_x]).flatten(1),
            "label": label, "weak": torch.where(wrong, (label + 1) % 10, label),
            "train": rows[0][:-config.num_validation], "dev": rows[0][-config.num_validation :], "test": rows[1],
        }  # fmt: skip
    rows = data["train"][torch.randperm(len(data["train"]), generator=generator)]
    clean, weak = rows[: config.num_clean], rows[config.num_clean :]
    weak = weak[data["weak"][weak] >= 0]  # the others have no weak label
    dev = data["dev"][torch.randperm(len(data["dev"]), generator=generator)][: config.num_validation]
    x, label = data["x"], data["label"]
    true = [TensorDataset(x[part], label[part]) for part in (clean, dev, data["test"])]
    return Split(TensorDataset(x[weak], data["weak"][weak]), *true, label[weak], num_classes)


def corrected(cell: Cell[LabelCorrectionConfig], *, with_clean: bool) -> Outcome:
    """The two levels.

    Args:
        cell: The arm and its seed.
        with_clean: Whether the classifier trains on the clean examples too.

    Returns:
        What it found.
    """
    data = split(cell.config, cell.seed)
    program = two_levels(cell, data, with_clean=with_clean)
    scores = _train(cell, program, data)
    x, weak = data.weak.tensors
    with program.inference("corrector") as corrector:
        hard = corrector(x.to(program.device), weak.to(program.device)).argmax(1).cpu()
    right = {name: (labels == data.truth).float() for name, labels in (("given", weak), ("corrected", hard))}
    scores["right labels, %"] = 100 * float(right["corrected"].mean())
    classes = range(data.num_classes)
    by_class = {
        name: np.array([float(found[data.truth == c].mean()) for c in classes]) for name, found in right.items()
    }
    return Outcome(scores, by_class)


def two_levels(cell: Cell[LabelCorrectionConfig], data: Split, *, with_clean: bool) -> mlo.Program:
    """The program."""
    config = cell.config
    net = Corrector(data.weak.tensors[0].shape[1], data.num_classes, config.corrector_size, config.trust)
    clean = DataLoader(data.clean, len(data.clean), shuffle=True)
    upper = Correct("corrector", net, data=clean, optimizer=config.corrector.optimizer())
    lower = ClassifyCorrected(
        "classifier", hypergradient=config.hypergradient.build(), **_options(cell, data.weak, data.num_classes)
    )
    program = cell.program([upper, lower])
    _put_beside(lower, program, data, config.clean_weight if with_clean else 0.0)
    return program


def as_given(cell: Cell[LabelCorrectionConfig], *, with_clean: bool = False, only_clean: bool = False) -> Outcome:
    """A baseline.

    Args:
        cell: The arm and its seed.
        with_clean: Whether to train on the clean examples too.
        only_clean: Whether to train on them alone.

    Returns:
        What it found.
    """
    data = split(cell.config, cell.seed)
    level = Classify("classifier", **_options(cell, data.clean if only_clean else data.weak, data.num_classes))
    program = cell.program([level])
    _put_beside(level, program, data, cell.config.clean_weight if with_clean else 0.0)
    scores = _train(cell, program, data)
    if not only_clean:
        scores["right labels, %"] = 100 * float((data.weak.tensors[1] == data.truth).float().mean())
    return Outcome(scores)


def _put_beside(level: Classify, program: mlo.Program, data: Split, weight: float) -> None:
    x, y = data.clean.tensors
    level.beside, level.beside_weight = (x.to(program.device), y.to(program.device)), weight


def _options(cell: Cell[LabelCorrectionConfig], train: TensorDataset, num_classes: int) -> dict:
    config = cell.config
    head = nn.Linear(train.tensors[0].shape[1], num_classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return dict(
        module=head,
        data=DataLoader(train, min(config.batch_size, len(train)), shuffle=True, drop_last=True),
        optimizer=config.classifier.optimizer(),
        scheduler=config.classifier.scheduler(config.steps),
    )


def _train(cell: Cell[LabelCorrectionConfig], program: mlo.Program, data: Split) -> dict[str, float]:
    evaluate = partial(test_and_validation, program, "classifier", data)
    return cell.train(program, cell.config.steps, evaluate, every=cell.config.evaluate_every)


def draw(axes, outcomes) -> None:
    """Which share of the labels of every class is right, as given and corrected, mean over seeds."""
    found = outcomes.get("corrected, and clean ones", ())
    if not found:
        return
    for i, (name, color) in enumerate((("given", "#8a8f98"), ("corrected", "#2a7f62"))):
        shares = 100 * np.mean([outcome.arrays[name] for outcome in found], 0)
        places = np.arange(len(shares)) + 0.36 * (i - 0.5)
        axes.bar(places, shares, 0.34, color=color, label=name)
        if len(shares) <= 4:
            for place, share in zip(places, shares, strict=True):
                axes.annotate(f"{share:.0f}", (place, share + 1), ha="center", va="bottom", fontsize=8)
    axes.set_title("Right labels of every true class, %, mean over seeds", fontsize=10, loc="left")
    axes.set_xticks(range(len(shares)), ["rotten", "fresh"] if len(shares) == 2 else range(len(shares)))
    axes.set_ylim(0, 118)
    axes.legend(fontsize=8, frameon=False, loc="upper left", ncols=2)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


ARMS = {
    "weak labels as given": as_given,
    "clean ones only": partial(as_given, only_clean=True),
    "both": partial(as_given, with_clean=True),
    "corrected": partial(corrected, with_clean=False),
    "corrected, and clean ones": partial(corrected, with_clean=True),
}


def build(config: LabelCorrectionConfig) -> mlo.Program:
    """The two levels, untrained."""
    cell = Cell(config, "corrected, and clean ones", config.seed)
    torch.manual_seed(cell.seed)
    return two_levels(cell, split(config, config.seed), with_clean=True)


RECIPE = Recipe(
    LabelCorrectionConfig,
    build,
    compared(ARMS, draw),
    "classify from weak labels that a net corrects, which learns from a few clean ones how",
    "Zheng et al. 2021, Meta Label Correction for Noisy Label Learning (arXiv:1911.03809)",
)
