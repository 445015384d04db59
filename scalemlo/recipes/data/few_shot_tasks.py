"""Few-shot tasks: sinusoids, and classes made of digits and their quarter turns."""

import math
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .images import Images, load_images

Part = Literal["train", "validation", "test"]
"""Which tasks: to learn from, to choose settings with, to test on."""

DIGITS: dict[Part, Sequence[int]] = {"train": (0, 1, 2, 3, 4), "validation": (5, 6), "test": (7, 8, 9)}
"""Whose quarter turns are the classes of a part's tasks."""

Examples = tuple[Tensor, Tensor]
"""Inputs ``[T, N, D]`` and targets of T tasks: numbers ``[T, N, 1]`` or classes ``[T, N]``."""


class Tasks(Protocol):
    """A kind of tasks."""

    num_inputs: int
    num_outputs: int
    num_joint_outputs: int
    """Outputs of a network that is trained on all tasks at once."""

    def draw(self, part: Part, num_tasks: int, generator: torch.Generator) -> tuple[Examples, Examples]:
        """Support and query examples of new tasks."""

    def joint(self, part: Part, num_tasks: int, generator: torch.Generator) -> Examples:
        """The examples of new tasks, with targets that mean the same in all tasks."""

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Loss of every task, ``[T]``."""

    def scores(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Score of every task, ``[T]``."""


class Sinusoids:
    """``y = a sin(x + b)`` with amplitude a in [0.1, 5], phase b in [0, pi], x in [-5, 5]: the tasks of MAML.

    Args:
        num_support: Support examples of a task.
        num_query: Query examples.
    """

    num_inputs = num_outputs = num_joint_outputs = 1

    def __init__(self, num_support: int, num_query: int):
        self._num_support, self._num_query = num_support, num_query

    def draw(self, part: Part, num_tasks: int, generator: torch.Generator) -> tuple[Examples, Examples]:
        """Support and query examples of new tasks; the parts differ by their generators alone."""

        def uniform(low: float, high: float, count: int) -> Tensor:
            return low + (high - low) * torch.rand(num_tasks, count, 1, generator=generator)

        amplitude, phase = uniform(0.1, 5.0, 1), uniform(0.0, math.pi, 1)
        support, query = uniform(-5.0, 5.0, self._num_support), uniform(-5.0, 5.0, self._num_query)
        return (support, amplitude * (support + phase).sin()), (query, amplitude * (query + phase).sin())

    def joint(self, part: Part, num_tasks: int, generator: torch.Generator) -> Examples:
        """All examples of new tasks."""
        support, query = self.draw(part, num_tasks, generator)
        return torch.cat([support[0], query[0]], 1), torch.cat([support[1], query[1]], 1)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error of every task."""
        return (outputs - targets).square().mean((1, 2))

    def scores(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error of every task."""
        return self.losses(outputs, targets)


class TurnedDigits:
    """Tell some classes apart, of which each is a digit in one of four turns; see :data:`DIGITS`.

    Training tasks are made of the training images, the others of images that no training task has.

    Args:
        num_ways: Classes of a task.
        num_support: Support images of each class.
        num_query: Query images of each.
    """

    num_inputs, num_joint_outputs = 64, 4 * len(DIGITS["train"])

    def __init__(self, num_ways: int, num_support: int, num_query: int):
        self.num_outputs, self._num_support, self._num_query = num_ways, num_support, num_query
        images = load_images("digits")
        self._classes: dict[Part, list[Tensor]] = {part: _turned(images, part) for part in DIGITS}

    def draw(self, part: Part, num_tasks: int, generator: torch.Generator) -> tuple[Examples, Examples]:
        """Support and query images of new tasks."""
        x, _ = self.joint(part, num_tasks, generator)
        y = torch.arange(self.num_outputs).repeat(num_tasks, self._num_support + self._num_query)
        count = self.num_outputs * self._num_support
        return (x[:, :count], y[:, :count]), (x[:, count:], y[:, count:])

    def joint(self, part: Part, num_tasks: int, generator: torch.Generator) -> Examples:
        """All images of new tasks, each with its class among all those of the part."""
        classes, count = self._classes[part], self._num_support + self._num_query
        chosen = torch.stack(
            [torch.randperm(len(classes), generator=generator)[: self.num_outputs] for _ in range(num_tasks)]
        )
        images = [
            torch.stack([_some(classes[c], count, generator) for c in task], 1).flatten(0, 1)  # [(S + Q) W, 64]
            for task in chosen.tolist()
        ]
        return torch.stack(images), chosen.repeat(1, count)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy of every task."""
        return F.cross_entropy(outputs.mT, targets, reduction="none").mean(1)

    def scores(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Accuracy of every task, in percent."""
        return 100 * (outputs.argmax(2) == targets).float().mean(1)


def _turned(images: Images, part: Part) -> list[Tensor]:
    """Images ``[N, 64]`` of every class of a part."""
    x, y = (images.test_x, images.test_y) if part == "test" else (images.train_x, images.train_y)
    return [x[y == digit].rot90(turns, (2, 3)).flatten(1) for digit in DIGITS[part] for turns in range(4)]


def _some(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return images[torch.randperm(len(images), generator=generator)[:count]]


class TaskBatches:
    """Batches of new tasks without end, the same ones in the same order whenever it is iterated.

    Args:
        tasks: The kind.
        part: Which tasks.
        num_tasks: Tasks in a batch.
        seed: Of the draws.
        examples: ``support`` or ``query`` ones, or all of them for training on all tasks at once.
    """

    def __init__(
        self, tasks: Tasks, part: Part, num_tasks: int, seed: int, examples: Literal["support", "query", "joint"]
    ):
        self._tasks, self._part, self._num_tasks, self._seed, self._examples = tasks, part, num_tasks, seed, examples

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Batches of rows ``[T]``, inputs and targets."""
        generator = torch.Generator().manual_seed(1000 * self._seed + list(DIGITS).index(self._part))
        while True:
            if self._examples == "joint":
                examples = self._tasks.joint(self._part, self._num_tasks, generator)
            else:
                support, query = self._tasks.draw(self._part, self._num_tasks, generator)
                examples = support if self._examples == "support" else query
            yield torch.arange(self._num_tasks), *examples
