"""Random numbers of a forward pass (dropout masks), replayed by every pass that must see the same ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
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
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would queue a stack trace for every absent device
    else:
        torch.manual_seed(seed)
    token = _pass.set(_Pass(seed, device))
    try:
        yield
    finally:
        _pass.reset(token)
        outside.restore()


@contextmanager
def own_seed() -> Iterator[None]:
    """Inside :func:`seeded`: draw from a seed of its own, the n-th of the pass, whatever else draws in between.

    Masks of the live module and of its skeleton may take different amounts of random numbers from the generator.
    """
    current = _pass.get()
    if current is None:
        yield
        return
    current.count += 1
    with seeded(current.seed ^ (0x9E3779B97F4A7C15 * current.count & (2**48 - 1)), current.device):
        yield


@dataclass
class _Pass:
    seed: int
    device: torch.device
    count: int = 0


_pass: ContextVar[_Pass | None] = ContextVar("pass", default=None)
