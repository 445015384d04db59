"""AutoLoRA: which rank-1 components of every update are worth keeping, learned on a validation split.

The update of an adapted layer is ``alpha sum_j a_j b_j c_j^T`` with selection variables a = softmax(e), which sum to
one, and rank-1 components of the columns b_j of B and rows c_j of A:

    min_e     C(e, A*(e), B*(e); validation)
    s.t.      A*, B* = argmin_{A, B}  C(e, A, B; train)

Components with a_j >= 1/r are kept (one at least is, since their mean is 1/r); LoRA with the ranks that this gives is
then trained from new factors on both parts.

Reference: Zhang, Qiang, Somayajula and Xie 2024, "AutoLoRA: Automatically Tuning Matrix Ranks in Low-Rank Adaptation
Based on Meta Learning" (arXiv:2403.09113).
"""

from dataclasses import dataclass

import scalemlo as mlo

from ..hf.peft import chosen_ranks
from ..ranks import Ranks
from .bilevel_peft import BilevelPeftConfig, Method, Run, TaskLevel, fresh_model, prepare, search_program
from .recipe import Recipe


@dataclass(kw_only=True)
class AutoLoRAConfig(BilevelPeftConfig):
    """Configuration of this recipe.

    Raises:
        ValueError: If it has no steps to retrain, or a weight for a term that it does not have.
    """

    def __post_init__(self) -> None:
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


def build(config: AutoLoRAConfig) -> mlo.Program:
    """The two levels, untrained."""
    return search_program(config, prepare(config), METHOD)


def run(config: AutoLoRAConfig) -> bool:
    """Both levels, training with the ranks they chose, the baseline, the report.

    Args:
        config: The configuration.

    Returns:
        Whether Ctrl-C ended it early.
    """
    whole = Run(config, METHOD)
    state = whole.search().state_dict("factors", trainable_only=True)
    ranks = Ranks().from_main(chosen_ranks(state))  # rank 0 alone has the state
    retrained = whole.retrain(fresh_model(config, whole.data, "lora", ranks=ranks))
    if not whole.interrupted:
        whole.save("lora", retrained, ranks=ranks)
    return whole.finish(ranks=ranks)


RECIPE = Recipe(
    AutoLoRAConfig,
    build,
    run,
    "fine-tune with LoRA, learning the rank of every layer on a validation split",
    "Zhang et al. 2024, AutoLoRA: Automatically Tuning Matrix Ranks in Low-Rank Adaptation Based on Meta Learning "
    "(arXiv:2403.09113)",
)
