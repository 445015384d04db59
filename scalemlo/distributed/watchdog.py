"""What each rank is at: said where an error comes up, and by every rank before a run that does not get on is ended.

A rank that hangs, or that waits for one that does, looks the same from outside. Every rank therefore knows the phase it
is in, a thread of it writes that to the store of the process group every few seconds, and when a phase lasts too long
each rank says where all of them are, shows its own stack, and ends with :data:`EXIT_STATUS`, so that the launcher ends
the run instead of letting it hold the machines.

The mathematics is never touched: the main thread sets one attribute per phase, and there is no collective.
"""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch.distributed as dist

from .group import rank, world_size

EXIT_STATUS = 124
"""Of a process that the watchdog ends: that of ``timeout(1)``."""

_LONGEST_INTERVAL_SECONDS = 10.0
_STORE_TIMEOUT = timedelta(seconds=10)
_PLACE, _REPORT = "scalemlo/place/{}", "scalemlo/report"


@dataclass(frozen=True)
class _Place:
    """Where a run is on this rank, and since when, by the monotonic clock."""

    name: str
    since: float

    @classmethod
    def now(cls, name: str) -> "_Place":
        return cls(name, time.monotonic())


@dataclass(frozen=True)
class _Sight:
    """A rank as it last wrote itself down."""

    place: str
    seconds: float
    line: str
    written: float  # by the clock that machines share, more or less

    @classmethod
    def of(cls, place: _Place, thread: int) -> "_Sight":
        frame = sys._current_frames().get(thread)
        code = f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}" if frame else "no frame"
        return cls(place.name, time.monotonic() - place.since, code, time.time())


class Watchdog:
    """Knows what this rank is at; ends the process where that lasts too long.

    Args:
        timeout_seconds: How long a run may stay in one phase, or between two; None waits for ever.

    Raises:
        ValueError: If the time is not positive.
    """

    def __init__(self, timeout_seconds: float | None = None):
        if timeout_seconds is not None and not timeout_seconds > 0:
            raise ValueError(f"phase_timeout_seconds={timeout_seconds!r} must be positive; None waits for ever.")
        self._timeout_seconds = timeout_seconds
        self._place = _Place.now("no phase yet")
        self._open: list[str] = []  # phases that this one is within

    @contextmanager
    def phase(self, outer_step: int, name: str) -> Iterator[None]:
        """Be in a phase. An exception that leaves it gets a note with rank, phase and step.

        Args:
            outer_step: The outer iteration it belongs to.
            name: ``"<level>: <phase>"``, or what the program does with all levels.
        """
        here = f"{name!r} of outer step {outer_step}"
        self._open.append(here)
        self._place = _Place.now(f"in {here}")
        try:
            yield
        except Exception as error:
            error.add_note(f"on rank {rank()}, in {here}")
            raise
        finally:
            self._open.pop()
            self._place = _Place.now(f"in {self._open[-1]}" if self._open else f"after {here}")

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch this thread's phases; where it is the only rank, nothing waits for another and nothing is watched."""
        if self._timeout_seconds is None or world_size() == 1:
            yield
            return
        self._place = _Place.now("at the start of run()")
        watch = _Watch(self, self._timeout_seconds)
        watch.start()
        try:
            yield
        finally:
            self._place = _Place.now("outside run()")
            watch.stop()


class _Watch(threading.Thread):
    """The thread that watches the one that made it.

    It needs the interpreter's lock now and then. A main thread that hangs inside native code without giving it back
    silences its own watch, not those of the ranks that wait for it.
    """

    def __init__(self, watchdog: Watchdog, timeout_seconds: float):
        super().__init__(name="scalemlo watchdog", daemon=True)
        self._watchdog, self._timeout_seconds = watchdog, timeout_seconds
        self._interval = min(_LONGEST_INTERVAL_SECONDS, timeout_seconds / 4)
        self._thread = threading.get_ident()
        self._rank, self._world_size = rank(), world_size()
        group: Any = dist.group.WORLD
        self._store = group.get_group_store().clone()  # the main thread may be waiting inside its own
        self._store.set_timeout(_STORE_TIMEOUT)
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(self._interval):
            place = self._watchdog._place
            asked = self._write_down(place)
            if time.monotonic() - place.since > self._timeout_seconds:
                self._end(f"this rank has been {place.name} for longer than phase_timeout_seconds")
            elif asked:
                self._end("another rank has been in one phase for longer than phase_timeout_seconds")

    def stop(self) -> None:
        """Watch no longer, and leave word of it."""
        self._stopped.set()
        self.join()
        self._write_down(self._watchdog._place)

    def _write_down(self, place: _Place) -> bool:
        """Tell the others; whether one of them asks for a report."""
        try:
            self._store.set(_PLACE.format(self._rank), json.dumps(asdict(_Sight.of(place, self._thread))))
            return self._store.check([_REPORT])
        except RuntimeError:  # the store has gone: its process ended, and the others notice by themselves
            return False

    def _end(self, why: str) -> NoReturn:
        """Report, leave the others the time to see that they should, and end the process."""
        try:
            self._store.set(_REPORT, "")
            places = self._all_places()
        except RuntimeError as error:
            places = [f"  the other ranks cannot be asked: {str(error).splitlines()[0]}"]
        frame = sys._current_frames().get(self._thread)
        stack = "".join(traceback.format_stack(frame)) if frame else "  none\n"
        lines = [
            f"scalemlo watchdog, rank {self._rank}: {why} ({self._timeout_seconds:g}).",
            *places,
            f"stack of rank {self._rank}, innermost call last:",
            f"{stack}rank {self._rank} ends with status {EXIT_STATUS}.",
        ]
        sys.stderr.write("\n" + "\n".join(lines) + "\n")  # in one piece: ranks share the stream
        sys.stderr.flush()
        time.sleep(2 * self._interval)  # a launcher that sees one end kills the others, and their reports with them
        os._exit(EXIT_STATUS)

    def _all_places(self) -> list[str]:
        """Where all ranks are, a line for each place; the rarest first: the one to look at."""
        found: dict[str, list[tuple[int, float]]] = {}
        for other in range(self._world_size):
            text, seconds = self._look_at(other)
            found.setdefault(text, []).append((other, seconds))
        return [
            f"  rank {_ranges([r for r, _ in at])}: {text} ({max(seconds for _, seconds in at):.0f} s)"
            for text, at in sorted(found.items(), key=lambda item: len(item[1]))
        ]

    def _look_at(self, other: int) -> tuple[str, float]:
        key = _PLACE.format(other)
        if not self._store.check([key]):
            return "not in run()", 0.0
        sight = _Sight(**json.loads(self._store.get(key)))
        silent = time.time() - sight.written
        gone = f"; silent since {silent:.0f} s, it may have died" if silent > 3 * self._interval else ""
        return f"{sight.place}, at {sight.line}{gone}", sight.seconds


def _ranges(numbers: list[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2, 5``."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
