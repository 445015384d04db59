"""The reference for programs that once were silently wrong: the live modules, moved a little, in plain torch.

It takes first derivatives and central differences alone: it trains the live modules with levels above moved, and looks
at what comes out. What modules do behind a loss's back is in it, whatever that is.
"""

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import scalemlo as mlo
from scalemlo.autodiff.rng import seeded

RATE, NUM_STEPS, STEP_SIZE = 0.1, 2, 0.05
ESTIMATORS = {
    "products": mlo.Identity(),
    "forward derivative": mlo.Identity(mixed="forward"),
    "Neumann, remat": mlo.Neumann(num_terms=2, step_size=STEP_SIZE, products="remat"),
    "Neumann, retain": mlo.Neumann(num_terms=2, step_size=STEP_SIZE, products="retain"),
    "unrolled": mlo.Unrolled(),
}


@dataclass(frozen=True)
class Case:
    """A bilevel program.

    Attributes:
        make: Its modules, lower and upper; the same on every call.
        lower: The lower loss of net, top and batch.
        upper: The upper loss of net and batch.
        ways: Estimators that it is tried with.
    """

    make: Callable[[], tuple[nn.Module, nn.Module]]
    lower: Callable[[Any, Any, Any], Tensor]
    upper: Callable[[Any, Any], Tensor]
    ways: tuple[str, ...] = tuple(ESTIMATORS)


FIRST = ("products", "forward derivative")
"""Of programs with stop-gradients: second derivatives hold them, differences move them."""
ALONG = ("forward derivative", "Neumann, remat", "Neumann, retain", "unrolled")
"""Of programs whose losses are no weighted mean."""

CASES: dict[str, Case] = {}


def weight_net() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1), nn.Sigmoid())


def case(name: str, net: Callable[[], nn.Module], top: Callable[[], nn.Module] = weight_net, **losses: Any) -> None:
    def make() -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(1)
        return net().double(), top().double()

    CASES[name] = Case(make, **({"lower": weighted, "upper": squared} | losses))


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 3, 5, generator=generator, dtype=torch.float64)
    return x, torch.randn(4, generator=generator, dtype=torch.float64)


def per_example(out: Tensor, y: Tensor) -> Tensor:
    return (out.flatten(1).mean(1) - y).square()


def weighted_losses(losses: Tensor, top: Any, y: Tensor) -> Tensor:
    """Weights from the data alone: a stop-gradient would be held by second derivatives, and moved by differences."""
    return mlo.weighted_mean(losses, top(y.unsqueeze(-1)).squeeze(-1))


def weighted(net: Any, top: Any, data: tuple[Tensor, Tensor]) -> Tensor:
    return weighted_losses(per_example(net(data[0]), data[1]), top, data[1])


def squared(net: Any, data: tuple[Tensor, Tensor]) -> Tensor:
    return per_example(net(data[0]), data[1]).mean()


# ---- the reference ---------------------------------------------------------------------------------------------------
def program_of(chosen: Case, estimator: mlo.Hypergradient, has_direct_part: bool = False) -> mlo.Program:
    class Low(mlo.Level):
        def loss(self, batch, top):
            return chosen.lower(self.module, top, batch)

    class Top(mlo.Level):
        def loss(self, batch, low):
            loss = chosen.upper(low, batch)
            return loss + self.module(batch[1][:, None]).mean() if has_direct_part else loss

    net, top = chosen.make()
    sgd = functools.partial(torch.optim.SGD, lr=RATE)
    levels = [
        Top("top", top, data=[batch(1)], optimizer=sgd),
        Low("low", net, data=[batch(i) for i in (2, 3)], optimizer=sgd, hypergradient=estimator,
            unroll_steps=NUM_STEPS if isinstance(estimator, mlo.Unrolled) else 1),
    ]  # fmt: skip
    return mlo.Program(levels, engine=mlo.Single())


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def live_gradient(loss: Tensor, net: nn.Module, top: nn.Module) -> list[Tensor]:
    for p in (*net.parameters(), *top.parameters()):
        p.grad = None
    loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trained(net)]


def move(module: nn.Module, direction: list[Tensor], step: float) -> None:
    with torch.no_grad():
        for p, d in zip(trained(module), direction, strict=True):
            p.add_(d, alpha=step)


def start(chosen: Case) -> tuple[nn.Module, nn.Module]:
    random.seed(5)
    np.random.seed(5)
    return chosen.make()


def response_of_unrolled(chosen: Case, seeds: list[int], direction: list[Tensor], radius: float) -> float:
    def outcome(step: float) -> float:
        net, top = start(chosen)
        move(top, direction, step)
        for i, seed in zip((2, 3), seeds, strict=False):
            with seeded(seed, torch.device("cpu")):
                gradient = live_gradient(chosen.lower(net, top, batch(i)), net, top)
            move(net, gradient, -RATE)
        with seeded(seeds[-1], torch.device("cpu")):
            return float(chosen.upper(net, batch(1)).detach())

    return (outcome(radius) - outcome(-radius)) / (2 * radius)


def response_of_one_point(
    chosen: Case, estimator: mlo.Hypergradient, seeds: list[int], direction: list[Tensor], radius: float
) -> float:
    """``-<s, dg/dlambda d>`` with s = v, or two terms of Neumann's series."""

    def after_upper() -> tuple[nn.Module, nn.Module, list[Tensor]]:
        net, top = start(chosen)
        with seeded(seeds[-1], torch.device("cpu")):
            v = live_gradient(chosen.upper(net, batch(1)), net, top)
        return net, top, v

    def lower_gradient(along: str, by: list[Tensor], step: float) -> list[Tensor]:
        net, top, _ = after_upper()
        move(net if along == "net" else top, by, step)
        with seeded(seeds[0], torch.device("cpu")):
            return live_gradient(chosen.lower(net, top, batch(2)), net, top)

    def difference(along: str, by: list[Tensor]) -> list[Tensor]:
        up, down = (lower_gradient(along, by, sign * radius) for sign in (1.0, -1.0))
        return [(a - b) / (2 * radius) for a, b in zip(up, down, strict=True)]

    v = s = after_upper()[2]
    if isinstance(estimator, mlo.Neumann):
        s = [STEP_SIZE * (2 * a - STEP_SIZE * b) for a, b in zip(v, transposed(difference, v), strict=True)]
    return -_dot(s, difference("top", direction))


def transposed(difference: Callable[[str, list[Tensor]], list[Tensor]], v: list[Tensor]) -> list[Tensor]:
    """``J^T v`` with J the derivative of the update by the lower weights: hooks make it another matrix than J."""
    found = [torch.zeros_like(x) for x in v]
    for part in found:
        for i in range(part.numel()):
            unit = [torch.zeros_like(x) for x in v]
            unit[[x is part for x in found].index(True)].view(-1)[i] = 1.0
            part.view(-1)[i] = _dot(v, difference("net", unit))
    return found


def _dot(a: list[Tensor], b: list[Tensor]) -> float:
    return sum(float((x * y).sum()) for x, y in zip(a, b, strict=True))


def compare(chosen: Case, estimator: mlo.Hypergradient, radius: float = 1e-5) -> tuple[float, float]:
    """The response along a direction, found and expected; the latter extrapolated from two radii."""
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(0)
    program = program_of(chosen, estimator)
    low, top = program.trainers["low"], program.trainers["top"]
    seeds = []
    original = low.fetch
    low.fetch = lambda seed: (seeds.append(seed), original(seed))[1]
    found = program.gradients()["top"]
    seeds.append(top._seed)
    generator = torch.Generator().manual_seed(3)
    direction = {n: torch.randn(t.shape, generator=generator, dtype=t.dtype) for n, t in top.weights().items()}
    along = list(direction.values())
    if isinstance(estimator, mlo.Unrolled):
        wide, narrow = (response_of_unrolled(chosen, seeds, along, r) for r in (radius, radius / 2))
    else:
        wide, narrow = (response_of_one_point(chosen, estimator, seeds, along, r) for r in (radius, radius / 2))
    expected = (4 * narrow - wide) / 3
    return sum(float((found[n] * d).sum()) for n, d in direction.items()), expected


# ---- modules ----
class Block(nn.Module):
    def __init__(self, size: int = 5):
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, x):
        return x + self.linear(x).tanh()


class Net(nn.Module):
    """Blocks in a ModuleList, each a unit that is run again in the backward pass."""

    def __init__(self, block: Callable[[], nn.Module] = Block, num_blocks: int = 2):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(block() for _ in range(num_blocks)), nn.Linear(5, 1)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)
