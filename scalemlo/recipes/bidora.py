"""BiDoRA: DoRA's magnitudes learned on a validation split, its directions on the training split.

With m the magnitudes and V = W0 + s B A, an adapted layer computes with ``m V / |V|``, rows normalised:

    min_m     C(m, V*(m); validation)
    s.t.      V*(m) = argmin_{A, B}  C(m, V; train) + gamma R(V)

with R the mean over layers of ``|D D^T - I|_F``, D = V / |V|. Afterwards the magnitudes are fixed and the directions
trained on both parts, from where they are. Baselines: plain DoRA on both parts, with as many steps in all, and with
``longer_steps``.

Reference: Qin, Zhang and Xie 2024, "BiDoRA: Bi-level Optimization-Based Weight-Decomposed Low-Rank Adaptation"
(arXiv:2410.09758). Here as in PEFT's DoRA a magnitude belongs to a row of the weight (an output), and |V| is a constant
of the derivative in the forward pass, not in R.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import Tensor, nn

import scalemlo as mlo

from ..hf.models.peft import add_orthogonality, direction_orthogonality
from .bilevel_peft import (
    BilevelCell,
    BilevelPeftConfig,
    Method,
    TaskLevel,
    draw_by_layer,
    finetune,
    fresh_model,
    plain,
    prepare,
    save,
    search,
    search_program,
)
from .study.recipe import Recipe
from .study.study import Cell, Outcome, compared


@dataclass(kw_only=True)
class BiDoRAConfig(BilevelPeftConfig):
    """Configuration of this recipe.

    Raises:
        ValueError: If it has no steps to retrain.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train.retrain_steps < 1:
            raise ValueError(
                f"train.retrain_steps={self.train.retrain_steps} must be at least 1: directions are retrained"
            )


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


def bidora(cell: BilevelCell) -> Outcome:
    """Both levels, then the directions again with the magnitudes fixed."""
    data, train = prepare(cell), cell.config.train
    state, before = search(cell, data, METHOD)
    model = add_orthogonality(fresh_model(cell, data, METHOD.kind), direction_orthogonality)
    change = magnitude_changes(model, state)
    model.load_state_dict(state, strict=False)  # rank 0 alone has it, and its weights are those that engines take
    for name, parameter in model.named_parameters():
        if "lora_magnitude_vector" in name:
            parameter.requires_grad_(False)
    retrained, scores = finetune(cell, data, model, train.retrain_steps, orthogonality=train.orthogonality)
    save(cell, data, METHOD.kind, state | retrained)
    return Outcome(scores | {f"{name}, not retrained": value for name, value in before.items()}, {"by layer": change})


def magnitude_changes(model: nn.Module, state: Mapping[str, Tensor]) -> np.ndarray:
    """``|m - m0| / |m0|`` of every layer in percent, m0 those of the model; empty where the state is."""
    before = {name: p for name, p in model.named_parameters() if "lora_magnitude_vector" in name}
    return np.array(
        [100 * float((state[n] - m.detach()).norm() / m.detach().norm()) for n, m in before.items() if n in state]
    )


def draw(axes, outcomes) -> None:
    """How far the magnitudes moved."""
    draw_by_layer(axes, outcomes, "BiDoRA", "Learned magnitudes, one line a seed", "change from pretrained, %")


ARMS = {
    "DoRA": partial(plain, kind="dora"),
    "DoRA, longer": partial(plain, kind="dora", longer=True),
    "BiDoRA": bidora,
}


def build(config: BiDoRAConfig) -> mlo.Program:
    """The two levels, untrained."""
    cell: BilevelCell = Cell(config, "BiDoRA", config.seed)
    return search_program(cell, prepare(cell), METHOD)


RECIPE = Recipe(
    BiDoRAConfig,
    build,
    compared(ARMS, draw, smaller_is_better=True),
    "fine-tune with DoRA, learning the magnitudes on a validation split",
    "Qin et al. 2024, BiDoRA: Bi-level Optimization-Based Weight-Decomposed Low-Rank Adaptation (arXiv:2410.09758)",
)
