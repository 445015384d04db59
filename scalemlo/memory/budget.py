"""How much memory a run may take, and where what does not fit goes."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from .sizes import format_bytes, parse_bytes


@dataclass(frozen=True, kw_only=True)
class Memory:
    """A budget for every rank; give it to :class:`scalemlo.Program`.

    Args:
        device: Bytes of a rank's device that levels may take: weights, optimizer states, estimators' memories, and what
            a phase takes while it runs. Without an accelerator the device is RAM. A size as ``"70GiB"``, or bytes.
        host: Bytes of RAM, per rank, that evicted states may take (pinned); None sets no limit, and ``disk`` takes what
            is beyond it. Says nothing where the device is RAM itself.
        disk: An existing folder on a fast local disk, for states that RAM does not take. Files there have no name and
            are gone when the process is.

    Raises:
        ValueError: If a size is none, or ``disk`` is no folder that can be written to.
    """

    device: int | str
    host: int | str | None = None
    disk: str | Path | None = None

    def __post_init__(self) -> None:
        for field in ("device", "host"):
            value = getattr(self, field)
            if value is not None:
                object.__setattr__(self, field, parse_bytes(value, f"Memory: {field}"))
        if self.disk is None:
            return
        try:
            with tempfile.TemporaryFile(dir=self.disk):
                pass
        except OSError as error:
            raise ValueError(
                f"Memory: disk={os.fspath(self.disk)!r} cannot be written to ({error.strerror}). Give an existing "
                "folder on a local disk."
            ) from error

    @classmethod
    def of(cls, given: "Memory | int | str", device: torch.device) -> "Memory":
        """What a user gave as a budget; a plain size is one of the device.

        Args:
            given: The budget.
            device: Of this rank.

        Returns:
            The budget in full.

        Raises:
            ValueError: If nothing could ever be moved anywhere.
        """
        memory = given if isinstance(given, Memory) else cls(device=parse_bytes(given, "memory"))
        if device.type == "cpu" and memory.disk is None:
            raise ValueError(
                f"memory={given!r}: levels compute on the CPU, so that what does not fit goes to a disk, and none is "
                f"given. Give memory=Memory(device={format_bytes(memory.device_bytes)!r}, disk='/scratch')."
            )
        return memory

    @property
    def device_bytes(self) -> int:
        """``device`` as a number."""
        assert isinstance(self.device, int), "sizes are read when the budget is made"
        return self.device

    @property
    def host_bytes(self) -> float:
        """``host`` as a number."""
        assert not isinstance(self.host, str), "sizes are read when the budget is made"
        return float("inf") if self.host is None else self.host
