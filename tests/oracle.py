"""Total gradients of multilevel programs, from the mathematics, in plain torch: double backward in one process.

Nothing of scalemlo is used. A program is a list of levels, top to bottom. The gradient of level x is ::

    dF_x/dx  +  sum over the levels y that answer x of their parts

where a level below answers x if its loss depends on x or on a level that answers x. With the adjoint ``a_y`` of a
level's weights, which begins as ``dF_x/dy`` and takes in the parts of all levels that answer y, its hop sends on ::

    a_t += -d/dt <dL_y/dy, s(a_y)>        to every t that L_y depends on and that is x or answers x

for an implicit estimator with the linear map s, and the derivative of K steps of the optimizer for an unrolled one.
What y sends to a level z that answers y itself, and has been passed already, is sent on from z with y held where it is:
how y moves is what its own hop has solved for.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Tensors = list[Tensor]
Modules = Mapping[str, nn.Module]
Loss = Callable[[Modules, Any], Tensor]


class NotPositiveDefinite(ArithmeticError):
    """Conjugate gradients have no answer for a Hessian of this program."""


@dataclass(frozen=True)
class Estimator:
    """``kind`` is identity, sama, neumann, conjugate_gradient or unrolled."""

    kind: str
    num_terms: int = 1
    step_size: float = 1.0
    damping: float = 0.0


@dataclass(frozen=True)
class Optimizer:
    """``kind`` is sgd or adam; one learning rate for each of the level's parameter groups, in turn."""

    kind: str
    learning_rates: tuple[float, ...]
    momentum: float = 0.0
    weight_decay: float = 0.0

    def rate(self, position: int) -> float:
        return self.learning_rates[position % len(self.learning_rates)]


@dataclass
class OracleLevel:
    """A level of the reference.

    Attributes:
        name: Also that of its module, which levels may share.
        module: Where its parameters are.
        names: Of the parameters that it trains.
        loss: Of all modules by level name, and a micro-batch.
        depends: Levels whose parameters its loss depends on, its own left out.
        batches: Micro-batches of its steps, step after step.
    """

    name: str
    module: nn.Module
    names: list[str]
    loss: Loss
    depends: list[str]
    batches: list[list[Any]]
    optimizer: Optimizer
    estimator: Estimator
    unroll_steps: int = 1
    max_grad_norm: float | None = None
    trace: "list[Step]" = field(default_factory=list)


@dataclass(frozen=True)
class Step:
    """What an unrolled step began with."""

    weights: Tensors
    state: list[dict[str, Tensor]]
    batches: list[Any]


class Oracle:
    """Total gradients of all levels at the last tick of an outer iteration, as their optimizers are given them.

    Args:
        levels: Top to bottom.
    """

    def __init__(self, levels: Sequence[OracleLevel]):
        self.levels = {level.name: level for level in levels}
        self.order = list(self.levels)
        self.modules = {level.name: level.module for level in levels}

    def gradients(self) -> dict[str, Tensors]:
        """One list of gradients per level, clipped."""
        with sdpa_kernel(SDPBackend.MATH):
            for name in self.answering():
                if self.levels[name].estimator.kind == "unrolled":
                    self._take_steps(self.levels[name])
            return {n: clipped(self.total(level), level.max_grad_norm) for n, level in self.levels.items()}

    def answering(self) -> set[str]:
        """Levels that answer any other one: those that are differentiated through."""
        return set().union(*(self._answering(name) for name in self.order))

    # ---- one level -------------------------------------------------------------------------------------------------
    def total(self, level: OracleLevel) -> Tensors:
        """Its gradient, not clipped."""
        adjoints = {level.name: self._gradient(level, level)}
        for name in self._answering(level.name, ()):
            if name in level.depends:
                adjoints[name] = self._gradient(level, self.levels[name])
        self._sweep(adjoints, level.name, ())
        return adjoints[level.name]

    def _sweep(self, adjoints: dict[str, Tensors], name: str, fixed: tuple[str, ...]) -> None:
        """Send adjoints on until they have reached a level; where levels answer each other, one of them stays fixed."""
        answering = self._answering(name, fixed)
        for passed in self._sorted(name, fixed):
            lower = self.levels[passed]
            if passed not in adjoints:
                continue
            targets = [n for n in lower.depends if (n == name or n in answering) and n not in fixed]
            parts = self._pull_back(lower, adjoints.pop(passed), targets)
            back = {t: parts.pop(t) for t in list(parts) if t in self._answering(passed, fixed)}
            if back:
                self._sweep(back, name, (*fixed, passed))
            for found in (back, parts):
                for target, part in found.items():
                    before = adjoints.get(target)
                    adjoints[target] = part if before is None else [a + b for a, b in zip(before, part, strict=True)]

    def _answering(self, name: str, fixed: tuple[str, ...] = ()) -> set[str]:
        found: set[str] = set()
        later = [n for n in self.order[self.order.index(name) + 1 :] if n not in fixed]
        while True:
            more = {n for n in later if n not in found and ({name} | found) & set(self.levels[n].depends)}
            if not more:
                return found
            found |= more

    def _sorted(self, name: str, fixed: tuple[str, ...]) -> list[str]:
        """A level comes after all that answer it, and before those that its loss depends on and that do not."""
        left = self._answering(name, fixed)
        if fixed:
            left &= self._answering(fixed[-1], fixed[:-1])
        answers = {n: self._answering(n, fixed) for n in left}
        before = {n: answers[n] & left for n in left}
        for n in left:
            for other in self._reached(n, left) - answers[n]:
                if self.order.index(other) > self.order.index(n):
                    before[other].add(n)
        found: list[str] = []
        while left:
            ready = [n for n in self.order if n in left and not before[n] & left]
            found.append(ready[0])
            left = left - {ready[0]}
        return found

    def _reached(self, name: str, within: set[str]) -> set[str]:
        found: set[str] = set()
        pending = [name]
        while pending:
            more = {n for n in self.levels[pending.pop()].depends if n in within} - found
            found |= more
            pending += more
        return found - {name}

    def _pull_back(self, lower: OracleLevel, v: Tensors, targets: Sequence[str]) -> dict[str, Tensors]:
        if lower.estimator.kind == "unrolled":
            return self._through_steps(lower, v, targets)
        s = self._solve(lower, v)
        own = self.parameters(lower)
        loss = self._loss(lower)
        gradient = torch.autograd.grad(loss, own, create_graph=True, allow_unused=True, materialize_grads=True)
        product = _dot(gradient, s)
        return {t: [-x for x in _derivative(product, self.parameters(self.levels[t]), retain=True)] for t in targets}

    def _solve(self, lower: OracleLevel, v: Tensors) -> Tensors:
        estimator = lower.estimator
        if estimator.kind == "identity":
            return v
        if estimator.kind == "sama":
            return [
                lower.optimizer.rate(i) * self._clipping(lower) * x for i, x in enumerate(v)
            ]  # of the first step of SGD: u = rate * factor * (g + decay w)
        own = self.parameters(lower)
        gradient = torch.autograd.grad(self._loss(lower), own, create_graph=True, materialize_grads=True)
        hessian = torch.stack(
            [
                torch.cat([x.reshape(-1) for x in _derivative(entry, own, retain=True)])
                for part in gradient
                for entry in part.reshape(-1)
            ]
        )
        flat = torch.cat([x.reshape(-1) for x in v])
        if estimator.kind == "conjugate_gradient":
            damped = hessian + estimator.damping * torch.eye(len(flat), dtype=flat.dtype)
            if torch.linalg.eigvalsh(damped)[0] <= 0:
                raise NotPositiveDefinite(lower.name)
            found = torch.linalg.solve(damped, flat)
        else:
            term, found = flat, torch.zeros_like(flat)
            for _ in range(estimator.num_terms):
                found = found + term
                term = term - estimator.step_size * (hessian @ term)
            found = estimator.step_size * found
        sizes = [x.numel() for x in v]
        return [part.view_as(x) for part, x in zip(found.split(sizes), v, strict=True)]

    def _clipping(self, lower: OracleLevel) -> float:
        return clipping_factor(self.total(lower), lower.max_grad_norm)

    # ---- losses ----------------------------------------------------------------------------------------------------
    def parameters(self, level: OracleLevel) -> list[nn.Parameter]:
        """Of a level, in order."""
        named = dict(level.module.named_parameters())
        return [named[n] for n in level.names]

    def _loss(self, level: OracleLevel, batches: list[Any] | None = None) -> Tensor:
        """Mean over micro-batches, of the last step taken, or of the first one, unless others are given."""
        batches = level.batches[-1 if level.trace else 0] if batches is None else batches
        return torch.stack([level.loss(self.modules, batch) for batch in batches]).mean()

    def _gradient(self, level: OracleLevel, by: OracleLevel) -> Tensors:
        return _derivative(self._loss(level), self.parameters(by))

    # ---- steps -----------------------------------------------------------------------------------------------------
    def _take_steps(self, level: OracleLevel) -> None:
        own = self.parameters(level)
        state: list[dict[str, Tensor]] = [{} for _ in own]
        for batches in level.batches:
            level.trace.append(Step([p.detach().clone() for p in own], [dict(s) for s in state], batches))
            gradient = clipped(_derivative(self._loss(level, batches), own), level.max_grad_norm)
            with torch.no_grad():
                for i, (p, g) in enumerate(zip(own, gradient, strict=True)):
                    new, state[i] = update(level.optimizer, i, p, g, state[i])
                    p.copy_(new)

    def _through_steps(self, lower: OracleLevel, v: Tensors, targets: Sequence[str]) -> dict[str, Tensors]:
        """Reverse mode through all steps at once: one graph from the uppers to the last weights."""
        own, first = self.parameters(lower), lower.trace[0]
        owners = [_slot(lower.module, name) for name in lower.names]
        wanted = {t: self.parameters(self.levels[t]) for t in targets}
        weights: list[Tensor] = [w.clone().requires_grad_() for w in first.weights]
        state: list[dict[str, Tensor]] = [dict(s) for s in first.state]
        try:
            for step in lower.trace:
                for (owner, attribute), w in zip(owners, weights, strict=True):
                    owner._parameters[attribute] = w  # a tensor of the graph, for this loss
                loss = self._loss(lower, step.batches)
                gradient = torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True)
                gradient = clipped(list(gradient), lower.max_grad_norm)
                moved = [
                    update(lower.optimizer, i, w, g, s)
                    for i, (w, g, s) in enumerate(zip(weights, gradient, state, strict=True))
                ]
                weights, state = [w for w, _ in moved], [s for _, s in moved]
        finally:
            for (owner, attribute), p in zip(owners, own, strict=True):
                owner._parameters[attribute] = p
        product = _dot(weights, v)
        return {t: _derivative(product, parameters, retain=True) for t, parameters in wanted.items()}


# ---- formulas --------------------------------------------------------------------------------------------------------
def update(optimizer: Optimizer, i: int, w: Tensor, g: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict]:
    """One step of SGD with momentum or of Adam, differentiable in everything."""
    rate = optimizer.rate(i)
    if optimizer.weight_decay:
        g = g + optimizer.weight_decay * w
    if optimizer.kind == "sgd":
        if optimizer.momentum:
            g = optimizer.momentum * state["buffer"] + g if "buffer" in state else g
        return w - rate * g, {"buffer": g}
    count = int(state.get("count", torch.zeros(()))) + 1
    m = 0.9 * state.get("m", torch.zeros_like(g)) + 0.1 * g
    n = 0.999 * state.get("n", torch.zeros_like(g)) + 0.001 * g * g
    step = (m / (1 - 0.9**count)) / ((n / (1 - 0.999**count)).sqrt() + 1e-8)
    return w - rate * step, {"m": m, "n": n, "count": torch.tensor(count)}


def clipping_factor(gradient: Sequence[Tensor], limit: float | None) -> Any:
    """``min(1, limit / (|g| + 1e-6))``."""
    if limit is None:
        return 1.0
    norm = torch.stack([g.square().sum() for g in gradient]).sum().sqrt()
    return limit / (norm + 1e-6) if float(norm) + 1e-6 > limit else 1.0


def clipped(gradient: Sequence[Tensor], limit: float | None) -> Tensors:
    """Scaled to at most a norm."""
    factor = clipping_factor(gradient, limit)
    return [factor * g for g in gradient]


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return sum((x * y).sum() for x, y in zip(a, b, strict=True))


def _derivative(value: Tensor, by: Sequence[Tensor], retain: bool = False) -> Tensors:
    if not value.requires_grad:
        return [torch.zeros_like(x) for x in by]
    found = torch.autograd.grad(value, list(by), allow_unused=True, materialize_grads=True, retain_graph=retain)
    return [x.detach() for x in found]


def _slot(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return module.get_submodule(path), attribute
