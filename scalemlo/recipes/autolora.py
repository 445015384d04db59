"""AutoLoRA: which rank-1 components of every update are worth keeping, learned on a validation split.

The update of an adapted layer is ``alpha sum_j a_j b_j c_j^T`` with selection variables a = softmax(e), which sum to
one, and rank-1 components of the columns b_j of B and rows c_j of A:

    min_e     C(e, A*(e), B*(e); validation)
    s.t.      A*, B* = argmin_{A, B}  C(e, A, B; train)

Components with a_j >= 1/r are kept (one at least is, since their mean is 1/r); LoRA with the ranks that this gives is
then trained from new factors on both parts. Baselines: LoRA of rank r on both parts, with as many steps in all, and
with ``longer_steps``.

Reference: Zhang, Qiang, Somayajula and Xie 2024, "AutoLoRA: Automatically Tuning Matrix Ranks in Low-Rank Adaptation
Based on Meta Learning" (arXiv:2403.09113).
"""

from dataclasses import dataclass
from functools import partial

import numpy as np

import scalemlo as mlo

from ..distributed.ranks import Ranks
from ..hf.models.peft import chosen_ranks
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
class AutoLoRAConfig(BilevelPeftConfig):
    """Configuration of this recipe.

    Raises:
        ValueError: If it has no steps to retrain, or a weight for a term that it does not have.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train.retrain_steps < 1:
            raise ValueError(f"train.retrain_steps={self.train.retrain_steps} must be at least 1: ranks are retrained")
        if self.train.orthogonality:
            raise ValueError(f"train.orthogonality={self.train.orthogonality} has no effect: AutoLoRA has no such term")


class Selection(TaskLevel):
    """Upper level."""

    def loss(self, batch, factors):
        """Mean loss over validation examples."""
        return self.mean_loss(factors, batch)


class Factors(TaskLevel):
    """Lower level."""

    def loss(self, batch, selection):
        """Mean loss over training examples."""
        return self.mean_loss(self.module, batch)


METHOD = Method(kind="gated", owned="*.lora_E.*", upper=("selection", Selection), lower=("factors", Factors))


def autolora(cell: BilevelCell) -> Outcome:
    """Both levels, then LoRA with the ranks they chose."""
    data = prepare(cell)
    state, before = search(cell, data, METHOD)
    ranks = Ranks().from_main(chosen_ranks(state))  # rank 0 alone has the state
    model = fresh_model(cell, data, "lora", ranks=ranks)
    retrained, scores = finetune(cell, data, model, cell.config.train.retrain_steps)
    save(cell, data, "lora", retrained, ranks=ranks)
    scores |= {f"{name}, not retrained": value for name, value in before.items()}
    found = np.array(list(ranks.values()))
    return Outcome(scores | {"mean rank": float(found.mean())}, {"by layer": found})


def draw(axes, outcomes) -> None:
    """The ranks."""
    draw_by_layer(axes, outcomes, "AutoLoRA", "Chosen ranks, one line a seed", "rank")


ARMS = {
    "LoRA": partial(plain, kind="lora"),
    "LoRA, longer": partial(plain, kind="lora", longer=True),
    "AutoLoRA": autolora,
}


def build(config: AutoLoRAConfig) -> mlo.Program:
    """The two levels, untrained."""
    cell: BilevelCell = Cell(config, "AutoLoRA", config.seed)
    return search_program(cell, prepare(cell), METHOD)


RECIPE = Recipe(
    AutoLoRAConfig,
    build,
    compared(ARMS, draw, smaller_is_better=True),
    "fine-tune with LoRA, learning the rank of every layer on a validation split",
    "Zhang et al. 2024, AutoLoRA: Automatically Tuning Matrix Ranks in Low-Rank Adaptation Based on Meta Learning "
    "(arXiv:2403.09113)",
)
