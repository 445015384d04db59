"""The two levels of the benchmarks that plan: a net gives each example's loss a weight, and a model is fine-tuned."""

import scalemlo as mlo
from scalemlo.hf.losses.next_token import example_losses


class Weigh(mlo.Level):
    """Above: the fine-tuned model should do well."""

    def loss(self, batch, finetune):
        return mlo.mean(example_losses(finetune, batch))


class Finetune(mlo.Level):
    """Below: weighted examples.

    Args:
        normalize: Whether to divide by the sum of the weights.
    """

    def __init__(self, *args, normalize: bool, **options):
        super().__init__(*args, **options)
        self.normalize = normalize

    def loss(self, batch, weights):
        losses = example_losses(self.module, batch)
        return mlo.weighted_mean(losses, weights(losses.detach().unsqueeze(-1)).squeeze(-1), normalize=self.normalize)
