"""Dynamic loss scaling for fp16."""

from dataclasses import dataclass


@dataclass
class LossScaler:
    """Keeps fp16 gradients away from underflow: the loss is multiplied by ``scale``, its gradients divided by it.

    After a gradient that overflowed the scale is halved and the step left out; after ``growth_interval`` good ones it
    is doubled. ``smallest_scale`` and what follows are of DeepSpeed's scaler.

    Args:
        scale: Current factor; 1.0 and ``enabled=False`` for the other precisions.
        enabled: Whether the scale moves.
        growth_interval: Good gradients in a row before the scale is doubled.
        num_good: Good gradients since the scale was doubled or one overflowed.
        smallest_scale: To overflow at it is an error.
        num_tolerated: Overflows that leave the scale as it is, before the first that halves it.
        num_uncounted: Good gradients after an overflow that do not count.
        num_overflows: Since the scale was doubled.
    """

    scale: float = 2.0**16
    enabled: bool = True
    growth_interval: int = 2000
    num_good: int = 0
    smallest_scale: float = 0.0
    num_tolerated: int = 0
    num_uncounted: int = 0
    num_overflows: int = 0

    @classmethod
    def for_dtype(cls, dtype: str) -> "LossScaler":
        """A scaler that is active for ``"fp16"`` and does nothing for the others."""
        return cls() if dtype == "fp16" else cls(scale=1.0, enabled=False)

    def update(self, *, overflowed: bool) -> None:
        """Move the scale after one gradient; every rank must give the same flag.

        Raises:
            OverflowError: If a gradient overflowed at the smallest scale.
        """
        if not self.enabled:
            return
        if not overflowed:
            self.num_good += 1
            if self.num_good == self.growth_interval:
                self.scale, self.num_good, self.num_overflows = self.scale * 2, 0, 0
            return
        self.num_good = -self.num_uncounted
        self.num_overflows += 1
        if self.num_overflows <= self.num_tolerated:
            return
        if self.scale == self.smallest_scale:
            raise OverflowError(
                f"a gradient overflows fp16 at the smallest loss scale, {self.smallest_scale}. Lower the learning "
                "rate, set max_grad_norm, or use dtype='bf16'."
            )
        self.scale = max(self.scale / 2, self.smallest_scale)
