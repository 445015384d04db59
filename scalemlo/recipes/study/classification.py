"""What recipes that train classifiers share."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

import scalemlo as mlo

from ..data.images import accuracy
from .study import VALIDATION


def losses(classifier, batch) -> Tensor:
    """Cross entropy ``[B]`` of every example of a batch whose first parts are inputs and labels."""
    return F.cross_entropy(classifier(batch[0]), batch[1], reduction="none")


class Fit(mlo.Level):
    """A baseline: every example counts alike."""

    def loss(self, batch):
        """Mean loss."""
        return mlo.mean(losses(self.module, batch))


def test_and_validation(program: mlo.Program, level: str, data: Any) -> dict[str, float]:
    """Scores of a classifier, for :meth:`~scalemlo.recipes.study.study.Cell.train`. Collective.

    Args:
        program: Trains it.
        level: Whose module it is.
        data: Has the data sets ``test`` and ``validation`` of inputs and labels.

    Returns:
        Accuracy on both in percent; that on the validation data picks the best moment.
    """
    with program.inference(level) as classifier:
        test, validation = (
            100 * accuracy(classifier, *(t.to(program.device) for t in part.tensors))
            for part in (data.test, data.validation)
        )
    return {"accuracy, %": test, VALIDATION: validation}
