"""BiLoRA: pseudo singular values of the update learned on a validation split, singular vectors on the training split.

The update of an adapted layer is ``alpha P Lambda Q`` with P ``[out, r]``, Q ``[r, in]`` and Lambda = diag(softmax(e)),
the Softmax parametrisation of the paper's three (no Real-value, no Approximately-binary):

    min_e     C(e, P*(e), Q*(e); validation)
    s.t.      P*, Q* = argmin_{P, Q}  C(e, P, Q; train) + gamma R(P, Q)

with R the mean over layers of ``|P^T P - I|_F^2 + |Q Q^T - I|_F^2``. Nothing is trained again afterwards; the result is
written as the LoRA adapter that computes the same. Baselines: plain LoRA on both parts, with as many steps, and with
``longer_steps``.

Reference: Qiang, Zhang and Xie 2024, "BiLoRA: A Bi-level Optimization Framework for Overfitting-Resilient Low-Rank
Adaptation of Large Pre-trained Models" (arXiv:2403.13037).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import Tensor

import scalemlo as mlo

from ..hf.models.peft import factor_orthogonality, gated_to_lora
from .bilevel_peft import (
    BilevelCell,
    BilevelPeftConfig,
    Method,
    TaskLevel,
    draw_by_layer,
    plain,
    prepare,
    save,
    search,
    search_program,
)
from .study.recipe import Recipe
from .study.study import Cell, Outcome, compared


@dataclass(kw_only=True)
class BiLoRAConfig(BilevelPeftConfig):
    """Configuration of this recipe.

    Raises:
        ValueError: If steps are given to a retraining that it does not have.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train.retrain_steps:
            raise ValueError(f"train.retrain_steps={self.train.retrain_steps} has no effect: BiLoRA does not retrain")


class Values(TaskLevel):
    """Upper level."""

    def loss(self, batch, vectors):
        """Mean loss over validation examples."""
        return self.mean_loss(vectors, batch)


class Vectors(TaskLevel):
    """Lower level."""

    def loss(self, batch, values):
        """Mean loss over training examples, and how far the singular vectors are from orthogonal."""
        return self.mean_loss(self.module, batch) + self.orthogonality * self.module.orthogonality()


METHOD = Method(
    kind="gated",
    owned="*.lora_E.*",
    upper=("values", Values),
    lower=("vectors", Vectors),
    term=factor_orthogonality,
)


def bilora(cell: BilevelCell) -> Outcome:
    """Both levels."""
    data = prepare(cell)
    state, scores = search(cell, data, METHOD)
    save(cell, data, "lora", gated_to_lora(state))
    return Outcome(scores, {"by layer": largest_gates(state)})


def largest_gates(state: Mapping[str, Tensor]) -> np.ndarray:
    """The largest value of every layer, times r: 1 where all are equal."""
    values = [e.softmax(0) * len(e) for name, e in state.items() if ".lora_E." in name]
    return np.array([float(value.max()) for value in values])


def draw(axes, outcomes) -> None:
    """How unequal the values became."""
    title = "Largest pseudo singular value times r, one line a seed"
    draw_by_layer(axes, outcomes, "BiLoRA", title, "1: all are equal")


ARMS = {
    "LoRA": partial(plain, kind="lora"),
    "LoRA, longer": partial(plain, kind="lora", longer=True),
    "BiLoRA": bilora,
}


def build(config: BiLoRAConfig) -> mlo.Program:
    """The two levels, untrained."""
    cell: BilevelCell = Cell(config, "BiLoRA", config.seed)
    return search_program(cell, prepare(cell), METHOD)


RECIPE = Recipe(
    BiLoRAConfig,
    build,
    compared(ARMS, draw, smaller_is_better=True),
    "fine-tune with low-rank updates, learning their pseudo singular values on a validation split",
    "Qiang et al. 2024, BiLoRA: A Bi-level Optimization Framework for Overfitting-Resilient Low-Rank Adaptation of "
    "Large Pre-trained Models (arXiv:2403.13037)",
)
