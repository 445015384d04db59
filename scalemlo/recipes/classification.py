"""What recipes that train classifiers share."""

import torch.nn.functional as F
from torch import Tensor

import scalemlo as mlo


def losses(classifier, batch) -> Tensor:
    """Cross entropy ``[B]`` of every example of a batch whose first parts are inputs and labels."""
    return F.cross_entropy(classifier(batch[0]), batch[1], reduction="none")


class Fit(mlo.Level):
    """A baseline: every example counts alike."""

    def loss(self, batch):
        """Mean loss."""
        return mlo.mean(losses(self.module, batch))
