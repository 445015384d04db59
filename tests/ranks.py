"""Runs a function on several ranks of one machine, for tests.

    def body(rank, world_size, scale):
        total = torch.tensor([float(rank)])
        dist.all_reduce(total)
        return scale * total.item()

    def test_sum():
        assert run_ranks(body, 2, 10.0) == [10.0, 10.0]

The ranks are forked: a rank starts in milliseconds with everything imported. They meet through a file, so that no port
is taken, and talk gloo on one OpenMP thread each. Where a GPU is visible they are spawned instead, in seconds, because
neither CUDA nor autograd's device threads survive a fork. Closures and lambdas work either way.
"""

import contextlib
import dataclasses
import faulthandler
import functools
import multiprocessing as mp
import multiprocessing.connection
import os
import pickle
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import cloudpickle
import numpy as np
import pytest
import torch
import torch.distributed as dist

# After the first failure the other ranks get this long to report failures of their own.
OTHER_FAILURES_SECONDS = 0.3
# A rank whose parent is gone ends itself this long after the time that its parent gave it.
ORPHAN_SECONDS = 30.0
# A rank that returned keeps its connections open for the slower ones, but not so long that a collective which it should
# have joined hangs until the timeout.
LINGER_SECONDS = 5.0


class RankFailure(AssertionError):
    """A rank failed.

    Attributes:
        rank: the rank that failed first.
        kind: `"raised"`, `"died"` (a signal or `os._exit`) or `"hung"`.
    """

    def __init__(self, message: str, rank: int, kind: Literal["raised", "died", "hung"]):
        super().__init__(message)
        self.rank = rank
        self.kind = kind


@dataclasses.dataclass(frozen=True)
class _Report:
    """What a rank tells its parent on its last breath."""

    time: float
    value: bytes | None = None
    error: str | None = None
    summary: str | None = None
    skipped: str | None = None


@dataclasses.dataclass(frozen=True)
class _Setup:
    """What a rank needs to know."""

    rank: int
    world_size: int
    directory: str
    port: int
    timeout_seconds: float
    init_process_group: bool


def run_ranks(
    fn: Callable[..., Any],
    world_size: int = 2,
    *args: Any,
    timeout_seconds: float = 120.0,
    init_process_group: bool = True,
    start_method: Literal["fork", "spawn"] | None = None,
    **kwargs: Any,
) -> list[Any]:
    """Calls `fn(rank, world_size, *args, **kwargs)` on `world_size` new processes.

    Every rank finds RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT as torchrun sets them,
    the same seed (0), and, unless `init_process_group` is false, a gloo process group.

    Args:
        fn: what each rank runs. Its value must pickle; return plain tensors, not DTensors.
        world_size: number of ranks.
        *args: passed on to `fn`.
        timeout_seconds: then the ranks that still run are killed, and the failure shows where each one was.
        init_process_group: false leaves the process group to `fn`; it can use `init_method="env://"`.
        start_method: `"fork"`, or `"spawn"`; by default fork, spawn where an accelerator is visible.
        **kwargs: passed on to `fn`.

    Returns:
        The value of each rank, by rank.

    Raises:
        RankFailure: a rank raised, died or hung. The message holds the traceback of the rank that failed first.
    """
    __tracebackhide__ = True
    if start_method is None:
        start_method = "spawn" if torch.accelerator.is_available() else "fork"
    context = mp.get_context(start_method)
    body = functools.partial(_call, fn, args, kwargs)
    if start_method == "spawn":
        body = functools.partial(_call_pickled, cloudpickle.dumps(body))
    with tempfile.TemporaryDirectory(prefix="ranks-") as directory:
        port = _free_port()
        processes, connections = [], []
        try:
            for rank in range(world_size):
                ours, theirs = context.Pipe()
                setup = _Setup(rank, world_size, directory, port, timeout_seconds, init_process_group)
                process = context.Process(target=_rank_main, args=(setup, body, theirs))
                process.start()
                # Only the rank may hold its end: its death then reads as end of file.
                theirs.close()
                processes.append(process)
                connections.append(ours)
            values = _collect(processes, connections, Path(directory), timeout_seconds)
            for connection in connections:
                with contextlib.suppress(OSError):  # a rank that waited long enough has gone
                    connection.send_bytes(b"all are done")
            for process in processes:
                process.join(LINGER_SECONDS)
            return values
        finally:
            for process in processes:
                _kill(process)
            for connection in connections:
                connection.close()


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def _kill(process: mp.process.BaseProcess) -> None:
    """Ends a rank and the processes it started (a rank leads a process group)."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()
    process.join()
    process.close()


# ---------------------------------------------------------------------------------------------------- in the rank


def _call(fn, args, kwargs, rank: int, world_size: int) -> Any:
    return fn(rank, world_size, *args, **kwargs)


def _call_pickled(pickled: bytes, rank: int, world_size: int) -> Any:
    return pickle.loads(pickled)(rank, world_size)


def _rank_main(setup: _Setup, body: Callable[[int, int], Any], connection) -> None:
    os.setpgid(0, 0)
    stacks = open(Path(setup.directory) / f"stacks-{setup.rank}", "w")  # faulthandler writes to it until the end
    faulthandler.enable(stacks)  # a segmentation fault tells its Python line
    faulthandler.register(signal.SIGUSR1, stacks)
    faulthandler.dump_traceback_later(setup.timeout_seconds + ORPHAN_SECONDS, exit=True, file=stacks)
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(setup.rank),
        "WORLD_SIZE": str(setup.world_size),
        "LOCAL_RANK": str(setup.rank),
        "LOCAL_WORLD_SIZE": str(setup.world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(setup.port),
        "OMP_NUM_THREADS": "1",
    }
    for _, interface in socket.if_nameindex():
        if interface in ("lo", "lo0"):  # gloo otherwise looks up the host name, which need not resolve
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    try:
        if setup.init_process_group:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{setup.directory}/rendezvous",
                rank=setup.rank,
                world_size=setup.world_size,
                # Later than the parent's limit: the parent's report says more.
                timeout=timedelta(seconds=setup.timeout_seconds + ORPHAN_SECONDS),
            )
        value = pickle.dumps(body(setup.rank, setup.world_size))
        report = _Report(time.monotonic(), value=value)
    except pytest.skip.Exception as skip:
        report = _Report(time.monotonic(), skipped=str(skip))
    except BaseException as error:  # pytest.fail and SystemExit are no Exceptions
        # From the test's own function on: the frames of this file say nothing.
        frames = error.__traceback__.tb_next or error.__traceback__
        while frames.tb_next and frames.tb_frame.f_code.co_filename == __file__:
            frames = frames.tb_next
        text = "".join(traceback.format_exception(type(error), error, frames))
        summary = "".join(traceback.format_exception_only(error)).strip().splitlines()
        report = _Report(time.monotonic(), error=text, summary=summary[-1] if summary else type(error).__name__)
    connection.send_bytes(pickle.dumps(report))
    if report.error is None:
        connection.poll(LINGER_SECONDS)
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # No interpreter shutdown: what the parent registered with atexit is the parent's.
    os._exit(0 if report.error is None else 1)


# ---------------------------------------------------------------------------------------------------- in the parent


def _collect(processes, connections, directory: Path, timeout_seconds: float) -> list[Any]:
    """Waits for every rank's report, or for the first failure and a moment more."""
    __tracebackhide__ = True
    reports: dict[int, _Report | None] = {}  # None: died without a word
    deadline = time.monotonic() + timeout_seconds
    failing = False
    while len(reports) < len(connections):
        waiting = [connection for rank, connection in enumerate(connections) if rank not in reports]
        ready = mp.connection.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for connection in ready:
            rank = connections.index(connection)
            try:
                reports[rank] = pickle.loads(connection.recv_bytes())
            except EOFError:
                reports[rank] = None
            if not failing and (reports[rank] is None or reports[rank].error is not None):
                failing = True
                deadline = min(deadline, time.monotonic() + OTHER_FAILURES_SECONDS)

    if failing:
        raise _failure(processes, reports, directory)
    if len(reports) < len(connections):
        raise _hung(processes, reports, directory, timeout_seconds)
    skipped = [report.skipped for report in reports.values() if report.skipped is not None]
    if skipped:
        pytest.skip(skipped[0])
    return [pickle.loads(reports[rank].value) for rank in range(len(connections))]


def _failure(processes, reports: dict[int, _Report | None], directory: Path) -> RankFailure:
    # A rank that died comes first: the others' errors ("connection closed by peer") follow from its death.
    died = [rank for rank, report in reports.items() if report is None]
    raised = sorted((r for r, report in reports.items() if report and report.error), key=lambda r: reports[r].time)
    rank = (died + raised)[0]
    others = [f"rank {r} failed too: {reports[r].summary}" for r in raised if r != rank]
    others += [f"rank {r} died too" for r in died if r != rank]
    if died:
        processes[rank].join(1.0)
        code = processes[rank].exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"ended with exit code {code}"
        text = f"rank {rank} {how} before it returned\n{_stacks(directory, rank)}"
        kind = "died"
    else:
        text = f"rank {rank} of {len(processes)} raised\n{reports[rank].error}"
        kind = "raised"
    return RankFailure("\n".join([text.rstrip(), *others]), rank, kind)


def _hung(processes, reports, directory: Path, timeout_seconds: float) -> RankFailure:
    hung = [rank for rank in range(len(processes)) if rank not in reports]
    for rank in hung:
        os.kill(processes[rank].pid, signal.SIGUSR1)
    time.sleep(0.3)
    lines = [f"{len(hung)} of {len(processes)} ranks still ran after {timeout_seconds:g} s and were killed"]
    if reports:
        lines.append(f"finished: {', '.join(f'rank {rank}' for rank in sorted(reports))}")
    lines += [f"rank {rank} was here:\n{_stacks(directory, rank)}" for rank in hung]
    return RankFailure("\n".join(lines), hung[0], "hung")


def _stacks(directory: Path, rank: int) -> str:
    path = directory / f"stacks-{rank}"
    return (path.read_text() if path.exists() else "").rstrip() or "(no stack was written)"
