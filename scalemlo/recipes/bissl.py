"""Pretrain without labels for the fine-tuning that follows: two levels between the two stages.

With a pretext loss L_P (masked patches are drawn) of a backbone P, and a downstream loss L_D (cross entropy of few
labels) of a backbone and a head h, after pretraining alone and before fine-tuning alone:

    min_{D, h}  L_D(P*(D), h) + gamma L_D(D, h)
    s.t.        P*(D) = argmin_P  L_P(P) + lambda/2 |P - D|^2

where D is a second backbone, which begins as a copy of P. With H the Hessian of the lower loss, lambda I included, the
hypergradient by D is lambda H^-1 times the slope of L_D by P. At last P is fine-tuned, with the head h.

Baselines, with as many steps on labels as the upper level and fine-tuning take together: no pretraining; pretraining
with as many steps in all; and with more.

Reference: Zakarias, Hansen and Tan 2024, "BiSSL: Enhancing the Alignment Between Self-Supervised Pretraining and
Downstream Fine-Tuning via Bilevel Optimization" (arXiv:2410.02387). There the pretext is contrastive.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F

import scalemlo as mlo

from ..distributed.ranks import Ranks
from ..runs import config as cfg
from .data.few_labels import FewLabelsConfig, Split, loader, probe_accuracy, split
from .data.images import accuracy
from .models.vision_transformer import Classifier, MaskedAutoencoder, draw_order
from .study.classification import Fit
from .study.recipe import Recipe
from .study.study import Cell, Outcome, compared

METHOD = "BiSSL"


@dataclass(kw_only=True)
class BiSSLConfig(FewLabelsConfig):
    """Configuration of this recipe.

    Args:
        pretrain_steps: Steps of the pretext before the two levels, and so of all arms that pretrain.
        outer_steps: Steps of the upper level.
        unroll_steps: Steps of the pretext between two of them; the baseline takes as many in all.
        longer_steps: Steps of the pretext in the arm that spends more.
        finetune_steps: Steps at last; ``outer_steps`` more where there is no upper level.
        coupling: lambda.
        upper_weight: gamma.
        pretext: The optimizer of the pretext.
        downstream: The optimizer of the upper level.
        finetune: The optimizer of fine-tuning.
        hypergradient: How the pretext is differentiated through.
    """

    pretrain_steps: int = 1000
    outer_steps: int = 100
    unroll_steps: int = 5
    longer_steps: int = 3000
    finetune_steps: int = 300
    coupling: float = 0.1
    upper_weight: float = 0.1
    pretext: cfg.OptimizerConfig = field(default_factory=cfg.OptimizerConfig)
    downstream: cfg.OptimizerConfig = field(default_factory=cfg.OptimizerConfig)
    finetune: cfg.OptimizerConfig = field(default_factory=cfg.OptimizerConfig)
    hypergradient: cfg.HypergradientConfig = field(
        default_factory=lambda: cfg.ESTIMATOR_CONFIGS["conjugate_gradient"](max_steps=5)
    )


class Pretext(mlo.Level):
    """One level, of pretraining alone: patches masked at random should be drawn."""

    num_masked: int

    def loss(self, batch):
        """Mean error of masked patches."""
        return _error(self.module, batch, self.num_masked)


class Downstream(mlo.Level):
    """Upper level: with one head, the pretext's backbone and the own one should classify well."""

    upper_weight: float

    def loss(self, batch, pretext):
        """Loss with the pretext's backbone, and gamma times that with the own one."""
        images, labels = batch
        through_pretext = F.cross_entropy(self.module.classify(pretext.features(images)), labels, reduction="none")
        own = F.cross_entropy(self.module(images), labels, reduction="none")
        return mlo.mean(through_pretext + self.upper_weight * own)


class CoupledPretext(mlo.Level):
    """Lower level: the pretext, near the backbone of the upper level."""

    num_masked: int
    coupling: float

    def loss(self, batch, downstream):
        """Mean error of masked patches, and half lambda times the squared distance of the backbones."""
        distance = (self.module.encoder_vector() - downstream.encoder_vector()).square().sum() / 2
        return _error(self.module, batch, self.num_masked) + self.coupling * distance


def _error(autoencoder, batch, num_masked: int) -> torch.Tensor:
    (images,) = batch
    order = draw_order(images.new_zeros(len(images), autoencoder.num_patches))
    return mlo.mean(autoencoder(images, order, num_masked))


def pretrained(cell: Cell[BiSSLConfig], data: Split, num_steps: int) -> MaskedAutoencoder:
    """An autoencoder after some steps of the pretext alone, which may be none."""
    config = cell.config
    module = MaskedAutoencoder(config.encoder(data.image_size))
    if num_steps == 0:
        return module
    level = Pretext("pretext", scheduler=config.pretext.scheduler(num_steps), **_options(config, module, data))
    level.num_masked = config.num_masked(module.num_patches)
    program = cell.program([level])
    cell.train(program, num_steps)
    trained = MaskedAutoencoder(config.encoder(data.image_size))
    trained.load_state_dict(Ranks().from_main(program.state_dict("pretext")))
    return trained


def two_levels(cell: Cell[BiSSLConfig], data: Split, autoencoder: MaskedAutoencoder) -> mlo.Program:
    """The program; D begins where P does."""
    config = cell.config
    classifier = Classifier(config.encoder(data.image_size))
    classifier.encoder.load_state_dict(autoencoder.encoder.state_dict())
    upper = Downstream(
        "downstream",
        classifier,
        data=loader(config, data.labelled),
        optimizer=config.downstream.optimizer(),
        scheduler=config.downstream.scheduler(config.outer_steps),
    )
    upper.upper_weight = config.upper_weight
    lower = CoupledPretext(
        "pretext",
        unroll_steps=config.unroll_steps,
        scheduler=config.pretext.scheduler(config.outer_steps * config.unroll_steps),
        hypergradient=config.hypergradient.build(),
        **_options(config, autoencoder, data),
    )
    lower.num_masked, lower.coupling = config.num_masked(autoencoder.num_patches), config.coupling
    return cell.program([upper, lower])


def bissl(cell: Cell[BiSSLConfig]) -> Outcome:
    """Pretraining, the two levels, fine-tuning."""
    data, config = split(cell.config, cell.seed), cell.config
    program = two_levels(cell, data, pretrained(cell, data, config.pretrain_steps))
    cell.train(program, config.outer_steps)
    states = {level: Ranks().from_main(program.state_dict(level)) for level in ("downstream", "pretext")}
    classifier = Classifier(config.encoder(data.image_size))
    classifier.load_state_dict(
        {
            name: states["downstream" if name.startswith("head.") else "pretext"][name]
            for name in classifier.state_dict()
        }
    )
    return Outcome(_finetuned(cell, data, classifier, config.finetune_steps))


def plain(cell: Cell[BiSSLConfig], *, steps: str | None) -> Outcome:
    """A baseline.

    Args:
        cell: The arm and its seed.
        steps: ``same`` pretrains with as many steps as the method in all, ``longer`` with more; None does not.

    Returns:
        What it found.
    """
    data, config = split(cell.config, cell.seed), cell.config
    same = config.pretrain_steps + config.outer_steps * config.unroll_steps
    num_steps = {None: 0, "same": same, "longer": config.longer_steps}[steps]
    classifier = Classifier(pretrained(cell, data, num_steps).encoder)
    return Outcome(_finetuned(cell, data, classifier, config.finetune_steps + config.outer_steps))


def _options(config: BiSSLConfig, module: MaskedAutoencoder, data: Split) -> dict:
    return dict(module=module, data=loader(config, data.unlabelled), optimizer=config.pretext.optimizer())


def _finetuned(cell: Cell[BiSSLConfig], data: Split, classifier: Classifier, num_steps: int) -> dict[str, float]:
    """Accuracy of a probe before, and of the classifier after fine-tuning."""
    config = cell.config
    before = probe_accuracy(classifier.features, data)
    level = Fit(
        "classifier",
        classifier,
        data=loader(config, data.labelled),
        optimizer=config.finetune.optimizer(),
        scheduler=config.finetune.scheduler(num_steps),
    )
    program = cell.program([level])

    def evaluate() -> Mapping[str, float]:
        with program.inference("classifier") as module:
            return {"accuracy, %": 100 * accuracy(module, *(t.to(program.device) for t in data.scored.tensors))}

    return cell.train(program, num_steps, evaluate) | {"of a probe before fine-tuning, %": 100 * before}


ARMS = {
    "labels only": partial(plain, steps=None),
    "pretrain, then fine-tune": partial(plain, steps="same"),
    "pretrain longer, then fine-tune": partial(plain, steps="longer"),
    METHOD: bissl,
}


def build(config: BiSSLConfig) -> mlo.Program:
    """The two levels, untrained."""
    cell = Cell(config, METHOD, config.seed)
    torch.manual_seed(cell.seed)
    data = split(config, config.seed)
    return two_levels(cell, data, pretrained(cell, data, 0))


RECIPE = Recipe(
    BiSSLConfig,
    build,
    compared(ARMS),
    "pretrain without labels for the fine-tuning that follows, each pulling the other's backbone",
    "Zakarias, Hansen and Tan 2024, BiSSL: Enhancing the Alignment Between Self-Supervised Pretraining and Downstream "
    "Fine-Tuning via Bilevel Optimization (arXiv:2410.02387)",
)
