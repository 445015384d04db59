"""Dynamic loss scaling for fp16."""

from dataclasses import dataclass


@dataclass
class LossScaler:
    """Keeps fp16 gradients away from underflow: the loss is multiplied by ``scale``, its gradients divided by it.

    After a gradient that overflowed the scale is halved and the step left out; after ``growth_interval`` good ones it
    is doubled.

    Args:
        scale: Current factor; 1.0 and ``enabled=False`` for the other precisions.
        enabled: Whether the scale moves.
        growth_interval: Good gradients in a row before the scale is doubled.
    """

    scale: float = 2.0**16
    enabled: bool = True
    growth_interval: int = 2000
    num_good: int = 0

    @classmethod
    def for_dtype(cls, dtype: str) -> "LossScaler":
        """A scaler that is active for ``"fp16"`` and does nothing for the others."""
        return cls() if dtype == "fp16" else cls(scale=1.0, enabled=False)

    def update(self, *, overflowed: bool) -> None:
        """Move the scale after one gradient; every rank must give the same flag."""
        if not self.enabled:
            return
        if overflowed:
            self.scale, self.num_good = self.scale / 2, 0
        else:
            self.num_good += 1
            if self.num_good == self.growth_interval:
                self.scale, self.num_good = self.scale * 2, 0
