"""BiDoRA: DoRA's magnitudes learned on a validation split, its directions on the training split.

With m the magnitudes and V = W0 + s B A, an adapted layer computes with ``m V / |V|``, rows normalised:

    min_m     C(m, V*(m); validation)
    s.t.      V*(m) = argmin_{A, B}  C(m, V; train) + gamma R(V)

with R the mean over layers of ``|D D^T - I|_F``, D = V / |V|. Afterwards the magnitudes are fixed and the directions
trained on both parts, from where they are.

Reference: Qin, Zhang and Xie 2024, "BiDoRA: Bi-level Optimization-Based Weight-Decomposed Low-Rank Adaptation"
(arXiv:2410.09758). Here as in PEFT's DoRA a magnitude belongs to a row of the weight (an output), and |V| is a constant
of the derivative in the forward pass, not in R.
"""

from dataclasses import dataclass

import scalemlo as mlo

from ..hf.peft import add_orthogonality, direction_orthogonality
from .bilevel_peft import BilevelPeftConfig, Method, Run, TaskLevel, fresh_model, prepare, search_program
from .recipe import Recipe


@dataclass(kw_only=True)
class BiDoRAConfig(BilevelPeftConfig):
    """Configuration of this recipe."""


class Magnitudes(TaskLevel):
    """Upper level."""

    def loss(self, batch, directions):
        """Mean loss over validation examples."""
        return self.mean_loss(directions, batch)


class Directions(TaskLevel):
    """Lower level."""

    def loss(self, batch, magnitudes):
        """Mean loss over training examples, and how far the directions are from orthogonal."""
        return self.mean_loss(self.module, batch) + self.orthogonality * self.module.orthogonality()


METHOD = Method(
    kind="dora",
    owned="*.lora_magnitude_vector.*",
    upper=("magnitudes", Magnitudes),
    lower=("directions", Directions),
    term=direction_orthogonality,
)


def build(config: BiDoRAConfig) -> mlo.Program:
    """The two levels, untrained."""
    return search_program(config, prepare(config), METHOD)


def run(config: BiDoRAConfig) -> bool:
    """Both levels, retraining of the directions, the baseline, the report.

    Args:
        config: The configuration.

    Returns:
        Whether Ctrl-C ended it early.
    """
    whole = Run(config, METHOD)
    state = whole.search().state_dict("directions", trainable_only=True)
    model = add_orthogonality(fresh_model(config, whole.data, METHOD.kind), METHOD.term)
    model.load_state_dict(state, strict=False)  # rank 0 alone has it, and its weights are those that engines take
    for name, parameter in model.named_parameters():
        if "lora_magnitude_vector" in name:
            parameter.requires_grad_(False)
    retrained = whole.retrain(model, orthogonality=config.train.orthogonality)
    whole.save(METHOD.kind, state | retrained)
    return whole.finish()


RECIPE = Recipe(
    BiDoRAConfig,
    build,
    run,
    "fine-tune with DoRA, learning the magnitudes on a validation split",
    "Qin et al. 2024, BiDoRA: Bi-level Optimization-Based Weight-Decomposed Low-Rank Adaptation (arXiv:2410.09758)",
)
