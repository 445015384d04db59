"""Ranks that act together: what may fail on one fails on all, and values go to and from rank 0."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from .group import gather_objects, is_main_process, world_size

T = TypeVar("T")


class Ranks:
    """All ranks, over a process group. Every method is collective; without a group, a group of one.

    Args:
        group: Of all ranks; by default the default group. A thread that runs beside the training needs its own.
    """

    def __init__(self, group: "dist.ProcessGroup | None" = None):
        self.group = group

    def together(self, action: Callable[[], T]) -> T:
        """Do something that may fail on some ranks, and fail on all where it does; a barrier.

        Args:
            action: What to do.

        Returns:
            What it returned on this rank.

        Raises:
            ValueError: If it failed on another rank; where it failed, its own error is raised.
        """
        if world_size() == 1:
            return action()
        error: Exception | None = None
        value: Any = None
        try:
            value = action()
        except Exception as caught:
            error = caught
        message = None if error is None else f"{type(error).__name__}: {error}"
        everyone = gather_objects(message, self.group)
        if error is not None:
            raise error
        for other, message in enumerate(everyone):
            if message is not None:
                raise ValueError(f"on rank {other}: {message}")
        return value

    def on_main(self, action: Callable[[], T]) -> T | None:
        """:meth:`together`, where only rank 0 has something to do."""
        return self.together(lambda: action() if is_main_process() else None)

    def gather(self, value: T) -> list[T]:
        """Values of all ranks on rank 0; nothing elsewhere."""
        if world_size() == 1:
            return [value]
        everyone: list[Any] | None = [None] * world_size() if is_main_process() else None
        dist.gather_object(value, everyone, group=self.group)
        return everyone or []

    def scatter(self, values: Sequence[T] | None) -> T:
        """One value for each rank, from rank 0."""
        if world_size() == 1:
            assert values is not None, "rank 0 gives them"
            return values[0]
        mine: list[Any] = [None]
        dist.scatter_object_list(mine, list(values) if values is not None else None, group=self.group)
        return mine[0]

    def from_main(self, value: T) -> T:
        """The value of rank 0, on every rank."""
        held: list[Any] = [value]
        if world_size() > 1:
            dist.broadcast_object_list(held, group=self.group)
        return held[0]

    def check_agreed(self, value: str, what: str) -> None:
        """Compare a value.

        Args:
            value: Of this rank.
            what: Its name in the message, and what ranks must do about it.

        Raises:
            ValueError: If ranks have different ones.
        """
        different = set(gather_objects(value, self.group))
        if len(different) > 1:
            raise ValueError(f"ranks found different {what}: {sorted(different)}. They must share the folder.")
