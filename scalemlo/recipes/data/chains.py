"""Chains of arithmetic steps on digits, some with wrong steps, for recipes about rewards of steps."""

from dataclasses import dataclass

import torch
from torch import Tensor

NUM_OPERATIONS = 3  # +, -, x, all modulo 10


@dataclass(frozen=True)
class Chains:
    """Chains of steps ``a op b = c``.

    Attributes:
        steps: The digits a, b and c with the number of the operation, as ``a, op, b, c``: ``[N, S, 4]``.
        is_right: Whether ``c`` follows from the other three: ``[N, S]``.
    """

    steps: Tensor
    is_right: Tensor

    @property
    def outcome(self) -> Tensor:
        """Whether all steps of a chain are right: ``[N]`` in fp32."""
        return self.is_right.all(1).float()


def result(a: Tensor, operation: Tensor, b: Tensor) -> Tensor:
    """``a op b`` modulo 10."""
    return torch.stack([a + b, a - b, a * b]).gather(0, operation.unsqueeze(0))[0] % 10


def draw_chains(
    num_chains: int, num_steps: int, right: float, generator: torch.Generator, *, num_candidates: int = 1
) -> Chains:
    """Draw chains; a step begins with what the one before it found, right or wrong.

    Args:
        num_chains: Number of problems.
        num_steps: Steps of each.
        right: Part of the chains that have no wrong step; the others have one, and with luck more.
        generator: Draws.
        num_candidates: Chains in a row for the same problem; above 1, the first of them is right.

    Returns:
        ``num_chains * num_candidates`` chains.
    """
    total = num_chains * num_candidates

    def digits(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    first = digits(10, num_chains).repeat_interleave(num_candidates)
    operations, operands = (
        digits(high, num_chains, num_steps).repeat_interleave(num_candidates, 0) for high in (NUM_OPERATIONS, 10)
    )
    is_wrong = torch.rand(total, num_steps, generator=generator) < 1 / num_steps
    is_wrong.scatter_(1, digits(num_steps, total, 1), True)
    is_wrong &= (torch.rand(total, generator=generator) >= right).unsqueeze(1)
    if num_candidates > 1:
        is_wrong[::num_candidates] = False
    off = is_wrong * (1 + digits(9, total, num_steps))
    steps, value = [], first
    for t in range(num_steps):
        found = (result(value, operations[:, t], operands[:, t]) + off[:, t]) % 10
        steps.append(torch.stack([value, operations[:, t], operands[:, t], found], 1))
        value = found
    return Chains(torch.stack(steps, 1), ~is_wrong)
