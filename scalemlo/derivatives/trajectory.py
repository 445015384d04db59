"""The last steps of a level, kept so that they can be taken again, or differentiated through.

A step is a function of the state before it (weights and optimizer state, as local shards), of the parameters of the
levels above, which did not move since, and of what was recorded: batches, seed, options of the optimizer. States are
kept on the host, every ceil(sqrt(K))-th of K; those in between are computed again, segment by segment, and wait on the
host for their turn, so that about 2 sqrt(K) are alive at once, one or two of them on the device.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..distributed.shards import Shards
from ..engines.base import ParameterBlock
from .held import held_at_weights
from .products import LossAt, Vector
from .update_rules import State, UpdateRule


@dataclass(frozen=True)
class LevelState:
    """Weights and optimizer state of a level, as local shards."""

    weights: Shards
    optimizer: dict[str, State]

    @classmethod
    def of(cls, weights: Shards, optimizer: Mapping[str, Mapping[str, Any]]) -> "LevelState":
        """What a level holds now; aliases the live tensors.

        Args:
            weights: Its local weights.
            optimizer: Its optimizer's state as local shards, by parameter and key.

        Returns:
            The tensors among them, in the form of the update rules.
        """
        return cls(weights, {name: _tensors(state) for name, state in optimizer.items()})

    def copied(self, device: torch.device) -> "LevelState":
        """A copy on a device."""
        return self._map(lambda t: t.to(device, copy=True))

    def to(self, device: torch.device) -> "LevelState":
        """On a device: copied where it is on another one."""
        return self._map(lambda t: t.to(device))

    def _map(self, function: Callable[[Tensor], Tensor]) -> "LevelState":
        optimizer = {n: {k: function(t) for k, t in state.items()} for n, state in self.optimizer.items()}
        return LevelState(self.weights.map(function), optimizer)

    @property
    def nbytes(self) -> int:
        """Bytes on this rank."""
        moments = sum(t.numel() * t.element_size() for state in self.optimizer.values() for t in state.values())
        return self.weights.nbytes + moments


@dataclass(frozen=True)
class RecordedStep:
    """What a step depends on besides the state before it."""

    loss: LossAt
    block: ParameterBlock
    groups: Mapping[str, Mapping[str, Any]]  # the optimizer's options by parameter, as they were
    max_grad_norm: float | None
    rule: UpdateRule

    @classmethod
    def of(
        cls,
        loss: LossAt,
        block: ParameterBlock,
        groups: Mapping[str, Mapping[str, Any]],
        max_grad_norm: float | None,
        rule: UpdateRule,
    ) -> "RecordedStep":
        """The step that is about to be made.

        Args:
            loss: On the batches of the step.
            block: The parameters that it moves.
            groups: Live options of the optimizer by parameter, whose values now are kept.
            max_grad_norm: To which its gradient is clipped.
            rule: Of the optimizer.

        Returns:
            The step.
        """
        options = {
            name: {key: _option(value) for key, value in group.items() if key != "params"}
            for name, group in groups.items()
        }
        return cls(loss, block, options, max_grad_norm, rule)

    def at(self, state: LevelState, *others: Vector) -> LossAt:
        """The loss of the step at a state, and at other weights of other levels where given."""
        return self.loss.at((self.block, state.weights), *others)

    def gradient(self, state: LevelState, *others: Vector) -> Shards:
        """The gradient the step starts from: mean over ranks and micro-batches, not clipped."""
        return self.at(state, *others).gradient({"lower": self.block})["lower"]

    def update(self, state: LevelState, gradient: Shards) -> LevelState:
        """The state after the step, from the gradient of its loss.

        Args:
            state: Before.
            gradient: Not clipped yet.

        Returns:
            After.
        """
        factor = clipping_factor(gradient, self.max_grad_norm)
        weights, optimizer = {}, {}
        for name, g in gradient.items():
            g = g * factor if factor < 1.0 else g
            optimizer[name], weights[name] = self.rule(self.groups[name], state.optimizer[name], state.weights[name], g)
        return LevelState(Shards(weights, gradient.group), optimizer)


class Trajectory:
    """Steps of one level in a row.

    Args:
        num_steps: How many are going to be recorded.
        device: Where the level's shards lie.
    """

    def __init__(self, num_steps: int, device: torch.device):
        self.stride = math.isqrt(num_steps - 1) + 1  # ceil(sqrt(K))
        self.steps: list[RecordedStep] = []
        self.peak_bytes = 0
        self._device = device
        self._kept: list[LevelState] = []  # before steps 0, stride, 2 stride, ...

    def copied(self) -> "Trajectory":
        """As it is now, whatever is recorded later; it shares the states."""
        same = copy.copy(self)
        same.steps, same._kept = list(self.steps), list(self._kept)
        return same

    def held_tensors(self) -> Iterator[Tensor]:
        """All tensors of the states it keeps."""
        for state in self._kept:
            yield from state.weights.values()
            for moments in state.optimizer.values():
                yield from moments.values()

    @property
    def num_steps(self) -> int:
        """Steps recorded so far."""
        return len(self.steps)

    def record(self, step: RecordedStep, state: Callable[[], LevelState]) -> None:
        """Note the step that a level is about to make.

        Args:
            step: It.
            state: Looks at the state before it; asked where that one is kept.
        """
        if self.num_steps % self.stride == 0:
            self._kept.append(state().copied(torch.device("cpu")))
            self._count([])
        self.steps.append(step)

    def last(self, num_steps: int) -> "Trajectory":
        """The last steps as a trajectory of their own; comes to the state before them by taking the others again."""
        skipped = self.num_steps - num_steps
        if skipped == 0:
            return self
        part = Trajectory(num_steps, self._device)
        part.steps = self.steps[skipped:]
        for i, (_, state) in enumerate(self.states()):
            if i >= skipped and (i - skipped) % part.stride == 0:
                part._kept.append(state.copied(torch.device("cpu")))
        return part

    def held(self) -> "Trajectory":
        """The same steps with the stop-gradients of their losses held, for differences over moved upper parameters."""
        part = Trajectory(self.num_steps, self._device)
        part._kept = self._kept
        for step, state in self.states():
            part.steps.append(replace(step, loss=held_at_weights(step.at(state)).at()))
        return part

    def start(self) -> LevelState:
        """The state before the first step."""
        return self._kept[0].copied(self._device)

    def forward(self, *others: Vector) -> LevelState:
        """Take all steps again.

        Args:
            *others: Weights of levels above to take them with, instead of the live ones.

        Returns:
            The state after the last.
        """
        state = self.start()
        for step in self.steps:
            state = step.update(state, step.gradient(state, *others))
        return state

    def states(self) -> Iterator[tuple[RecordedStep, LevelState]]:
        """All steps, first one first, each with the state before it."""
        state = self.start()
        for i, step in enumerate(self.steps):
            yield step, state
            if i + 1 < self.num_steps:
                state = step.update(state, step.gradient(state))

    def backward(self) -> Iterator[tuple[RecordedStep, LevelState, Shards]]:
        """All steps, last one first, each with the state before it and the gradient it used."""
        for first in reversed(range(0, self.num_steps, self.stride)):
            segment = self.steps[first : first + self.stride]
            earlier: list[tuple[LevelState, Shards]] = []
            state = self._kept[first // self.stride].copied(self._device)
            gradient = segment[0].gradient(state)
            for step, following in pairwise(segment):
                earlier.append(self._put_away(state, gradient))
                state = step.update(state, gradient)
                gradient = following.gradient(state)
            last = [(state, gradient)]
            self._count(earlier + last)
            del state, gradient  # who iterates decides how long they live
            yield segment[-1], *last.pop()
            for step in reversed(segment[:-1]):
                yield step, *self._brought_back(*earlier.pop())

    def _put_away(self, state: LevelState, gradient: Shards) -> tuple[LevelState, Shards]:
        """On the host, while other steps of the segment are in hand."""
        return state.to(torch.device("cpu")), gradient.map(torch.Tensor.cpu)

    def _brought_back(self, state: LevelState, gradient: Shards) -> tuple[LevelState, Shards]:
        return state.to(self._device), gradient.map(lambda t: t.to(self._device))

    def _count(self, pairs: Sequence[tuple[LevelState, Shards]]) -> None:
        held = sum(state.nbytes for state in self._kept)
        held += sum(state.nbytes + gradient.nbytes for state, gradient in pairs)
        self.peak_bytes = max(self.peak_bytes, held)


def clipping_factor(gradient: Shards, max_grad_norm: float | None) -> float:
    """``min(1, max_grad_norm / (|g| + 1e-6))``, as the level's own step clips."""
    return 1.0 if max_grad_norm is None else min(1.0, max_grad_norm / (float(gradient.norm()) + 1e-6))


def _tensors(state: Mapping[str, Any]) -> State:
    """The optimizer's state in the form of the update rules; ``step`` in fp64, where it is exact."""
    found = {key: t for key, t in state.items() if isinstance(t, Tensor)}
    return found | ({"step": found["step"].double()} if "step" in found else {})


def _option(value: Any) -> Any:
    return float(value) if isinstance(value, Tensor) else value
