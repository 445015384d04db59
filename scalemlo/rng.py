"""Random numbers of a forward pass (dropout masks), replayed by every pass that must see the same ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RNGState:
    """State of the CPU generator and of one device's."""

    cpu: Tensor
    device: Tensor | None
    where: torch.device

    @classmethod
    def capture(cls, device: torch.device) -> "RNGState":
        """Read the current state."""
        on_device = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
        return cls(torch.get_rng_state(), on_device, device)

    def restore(self) -> None:
        """Set the generators back to this state."""
        torch.set_rng_state(self.cpu)
        if self.device is not None:
            torch.get_device_module(self.where).set_rng_state(self.device, self.where)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw what this seed gives, then go on as if nothing had been drawn."""
    outside = RNGState.capture(device)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        outside.restore()
