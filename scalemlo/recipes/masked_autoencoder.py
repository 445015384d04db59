"""Pretrain a vision transformer by drawing masked patches, learning which patches to mask from few labels.

With a net that gives patch i of an image x the weight p_i(x; theta) in (0, 1), three levels: an autoencoder draws
the masked patches M, chosen with probability p without replacement; a linear probe w is trained on features of its
encoder E; and the net is trained so that the probe does well on labels that it has not seen:

    min_theta  F(E*(theta), w*(E*(theta)))                              over one half of the labels
    s.t.       w*(E) = argmin_w  cross entropy of w on features of E    over the other half
               E*(theta) = argmin_E  sum_{x, i in M(x)} p_i(x) e_i(x; E) / sum_{x, i in M(x)} p_i(x)

e_i is the mean squared error of patch i. The choice of M is a constant of derivatives; the net is moved through the
weights p. At the start all are 1/2, which is random masking.

Baselines: an untrained encoder; random masking with as many steps, and with more; the encoder trained on the labels
alone. All are scored alike, by logistic regression on their features.

Reference: Guo et al. 2024, "Downstream Task Guided Masking Learning in Masked Autoencoders Using Multi-Level
Optimization" (arXiv:2402.18128). There the patches with the highest scores are masked; here masks are drawn.
"""

from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import nn

import scalemlo as mlo

from ..runs import config as cfg
from .data.few_labels import FewLabelsConfig, Split, loader, probe_accuracy, split
from .models.vision_transformer import Classifier, MaskedAutoencoder, draw_order
from .study.classification import Fit, losses
from .study.recipe import Recipe
from .study.study import Cell, Outcome, compared

METHOD = "learned masking (MLO-MAE)"


@dataclass(kw_only=True)
class MaskedAutoencoderConfig(FewLabelsConfig):
    """Configuration of this recipe.

    Args:
        steps: Steps of the autoencoder.
        unroll_steps: Steps of autoencoder and probe between two steps of the masking net.
        longer_steps: Steps of random masking in the arm that spends more.
        labels_steps: Steps of the encoder that is trained on labels alone.
        hidden_size: Hidden units of the masking net.
        autoencoder: The optimizer of the autoencoder.
        labels_only: The optimizer of the encoder that is trained on labels alone.
        probe: The optimizer of the probe.
        masking: The optimizer of the masking net.
        hypergradient: How probe and autoencoder are differentiated through.

    Raises:
        ValueError: If ``unroll_steps`` does not divide ``steps``.
    """

    steps: int = 1000
    unroll_steps: int = 5
    longer_steps: int = 3000
    labels_steps: int = 1000
    hidden_size: int = 64
    autoencoder: cfg.OptimizerConfig = field(default_factory=cfg.OptimizerConfig)
    labels_only: cfg.OptimizerConfig = field(default_factory=cfg.OptimizerConfig)
    probe: cfg.OptimizerConfig = field(default_factory=cfg.OptimizerConfig)
    masking: cfg.OptimizerConfig = field(default_factory=cfg.OptimizerConfig)
    hypergradient: cfg.HypergradientConfig = field(default_factory=cfg.ESTIMATOR_CONFIGS["sama"])

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.unroll_steps < 1 or self.steps % self.unroll_steps:
            raise ValueError(
                f"unroll_steps={self.unroll_steps} must divide steps={self.steps}; give a multiple of it as steps"
            )


class MaskingNet(nn.Sequential):
    """Weights ``[B, N]`` in (0, 1) of the patches of images, 1/2 at the start."""

    def __init__(self, image_size: int, num_patches: int, hidden_size: int):
        last = nn.Linear(hidden_size, num_patches)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        super().__init__(nn.Flatten(), nn.Linear(image_size**2, hidden_size), nn.ReLU(), last, nn.Sigmoid())


class Mask(mlo.Level):
    """Upper level: the probe should do well on labels that it has not seen."""

    def loss(self, batch, autoencoder, probe):
        """Mean loss of the probe on features of the encoder."""
        return mlo.mean(losses(lambda x: probe(autoencoder.features(x)), batch))


class Pretrain(mlo.Level):
    """Middle level: masked patches should be drawn, each as important as its weight says."""

    num_masked: int

    def loss(self, batch, masking):
        """Weighted mean of the errors of masked patches."""
        (images,) = batch
        weights = masking(images)
        order = draw_order(weights.log())
        errors = self.module(images, order, self.num_masked)
        return mlo.weighted_mean(errors.flatten(), weights.gather(1, order[:, : self.num_masked]).flatten())


class Probe(mlo.Level):
    """Lower level: a linear layer on features of the encoder."""

    def loss(self, batch, autoencoder: mlo.Upper):
        """Mean loss."""
        return mlo.mean(losses(lambda x: self.module(autoencoder.features(x)), batch))


class PretrainRandomly(mlo.Level):
    """A baseline: patches are masked at random and count alike."""

    num_masked: int

    def loss(self, batch):
        """Mean error of masked patches."""
        (images,) = batch
        order = draw_order(images.new_zeros(len(images), self.module.num_patches))
        return mlo.mean(self.module(images, order, self.num_masked))


def learned(cell: Cell[MaskedAutoencoderConfig]) -> Outcome:
    """The three levels."""
    data = split(cell.config, cell.seed)
    program = three_levels(cell, data)
    cell.train(program, cell.config.steps // cell.config.unroll_steps)
    images = data.unlabelled.tensors[0].to(program.device)
    with program.inference("masking") as masking:
        weights = masking(images).cpu()
    return Outcome(_scores(program, data), {"weights": weights.mean(0).numpy()})


def three_levels(cell: Cell[MaskedAutoencoderConfig], data: Split) -> mlo.Program:
    """The program."""
    config = cell.config
    autoencoder = MaskedAutoencoder(config.encoder(data.image_size))
    num_patches = autoencoder.num_patches
    upper = Mask(
        "masking",
        MaskingNet(data.image_size, num_patches, config.hidden_size),
        data=loader(config, data.second),
        optimizer=config.masking.optimizer(),
    )
    middle = Pretrain(
        "autoencoder",
        unroll_steps=config.unroll_steps,
        hypergradient=config.hypergradient.build(),
        **_options(config, autoencoder, data, config.steps),
    )
    middle.num_masked = config.num_masked(num_patches)
    lower = Probe(
        "probe",
        nn.Linear(config.dim, 10),
        data=loader(config, data.first),
        optimizer=config.probe.optimizer(),
        hypergradient=config.hypergradient.build(),
    )
    return cell.program([upper, middle, lower])


def random_masking(cell: Cell[MaskedAutoencoderConfig], *, steps: str | None) -> Outcome:
    """A baseline.

    Args:
        cell: The arm and its seed.
        steps: Which field of the configuration says how many steps; None trains nothing.

    Returns:
        What it found.
    """
    data, config = split(cell.config, cell.seed), cell.config
    num_steps = 0 if steps is None else getattr(config, steps)
    autoencoder = MaskedAutoencoder(config.encoder(data.image_size))
    level = PretrainRandomly("autoencoder", **_options(config, autoencoder, data, num_steps))
    level.num_masked = config.num_masked(autoencoder.num_patches)
    program = cell.program([level])
    if num_steps:
        cell.train(program, num_steps)
    return Outcome(_scores(program, data))


def labels_only(cell: Cell[MaskedAutoencoderConfig]) -> Outcome:
    """A baseline: the encoder and a linear layer, trained on the labels."""
    data, config = split(cell.config, cell.seed), cell.config
    level = Fit(
        "autoencoder",
        Classifier(config.encoder(data.image_size)),
        data=loader(config, data.labelled),
        optimizer=config.labels_only.optimizer(),
        scheduler=config.labels_only.scheduler(config.labels_steps),
    )
    program = cell.program([level])
    cell.train(program, config.labels_steps)
    return Outcome(_scores(program, data))


def _options(config: MaskedAutoencoderConfig, module: MaskedAutoencoder, data: Split, num_steps: int) -> dict:
    return dict(
        module=module,
        data=loader(config, data.unlabelled),
        optimizer=config.autoencoder.optimizer(),
        scheduler=config.autoencoder.scheduler(num_steps),
    )


def _scores(program: mlo.Program, data: Split) -> dict[str, float]:
    with program.inference("autoencoder") as module:
        found = probe_accuracy(lambda x: module.features(x.to(program.device)), data)
    return {"accuracy of a probe, %": 100 * found}


def draw(axes, outcomes) -> None:
    """The mean weight of every patch over images and seeds, drawn as an image of patches."""
    found = outcomes.get(METHOD, ())
    if not found:
        axes.set_axis_off()
        return
    weights: np.ndarray = np.mean([outcome.arrays["weights"] for outcome in found], 0)
    side = round(len(weights) ** 0.5)
    grid = weights.reshape(side, side)
    axes.imshow(grid, cmap="Greens", vmin=0, vmax=1)
    for (row, column), value in np.ndenumerate(grid):
        color = "white" if value > 0.5 else "#333333"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=color, fontsize=9)
    axes.set_title("Learned weight of a patch, mean over images and seeds", fontsize=10, loc="left")
    axes.set_xticks([])
    axes.set_yticks([])


ARMS = {
    "untrained encoder": partial(random_masking, steps=None),
    "labels only": labels_only,
    "random masking": partial(random_masking, steps="steps"),
    "random masking, longer": partial(random_masking, steps="longer_steps"),
    METHOD: learned,
}


def build(config: MaskedAutoencoderConfig) -> mlo.Program:
    """The three levels, untrained."""
    cell = Cell(config, METHOD, config.seed)
    torch.manual_seed(cell.seed)
    return three_levels(cell, split(config, config.seed))


RECIPE = Recipe(
    MaskedAutoencoderConfig,
    build,
    compared(ARMS, draw),
    "pretrain a vision transformer by drawing masked patches, learning from few labels which ones; three levels",
    "Guo et al. 2024, Downstream Task Guided Masking Learning in Masked Autoencoders Using Multi-Level Optimization "
    "(arXiv:2402.18128)",
)
