"""The ``scalemlo`` command with a fault in it: ``python -m tests.faults.faulty FAULT LOG train run.yaml key=value``.

The fault is JSON, see :class:`tests.faults.launched.Fault`; ``null`` is none. What happens when is written to the log.
"""

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partialmethod
from pathlib import Path

import scalemlo.loop.program
from scalemlo.distributed.group import rank
from scalemlo.distributed.watchdog import Watchdog


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    time.sleep(3600)


def fail() -> None:
    raise ValueError("a fault of this rank alone")


def terminate_launcher() -> None:
    """As a scheduler does that takes the machine back; goes on once the launcher has passed the signal on."""
    came, before = [], signal.getsignal(signal.SIGTERM)

    def handler(number, frame):
        came.append(number)
        before(number, frame)

    signal.signal(signal.SIGTERM, handler)
    os.kill(os.getppid(), signal.SIGTERM)
    while not came:
        time.sleep(0.02)
    signal.signal(signal.SIGTERM, before)


ACTIONS: dict[str, Callable[[], None]] = {
    f.__name__: f for f in (kill, hang, fail, terminate_launcher)
}  # fmt: skip


def install(fault: dict | None, log: Callable[[str], None] = lambda event: None) -> None:
    """Put a fault into this process, for good."""
    original, rename = Watchdog.phase, os.rename

    def act(phase: str, step: int) -> None:
        if fault and (phase, step, rank()) == (fault["phase"], fault["step"], fault["rank"]):
            log("fault")
            ACTIONS[fault["action"]]()

    @contextmanager
    def phase(self, outer_step, name):
        if name == "callbacks":  # the step is done
            log(f"step {outer_step}")
        with original(self, outer_step, name):
            act(name, outer_step)
            yield

    def renamed(source, target, **options):
        checkpoint = re.fullmatch(r"step-(\d+)", Path(target).name)
        if checkpoint:
            act("rename", int(checkpoint[1]))
        rename(source, target, **options)

    Watchdog.phase, os.rename = phase, renamed
    if fault and fault["phase_timeout_seconds"]:
        program = scalemlo.loop.program.Program
        program.__init__ = partialmethod(program.__init__, phase_timeout_seconds=fault["phase_timeout_seconds"])


def main() -> None:
    from scalemlo.cli.main import run

    fault, path = json.loads(sys.argv[1]), sys.argv[2]
    del sys.argv[1:3]

    def log(event: str) -> None:
        with open(path, "a") as f:
            f.write(json.dumps({"event": event, "rank": rank(), "time": time.time()}) + "\n")

    install(fault, log)
    run()


if __name__ == "__main__":
    main()
