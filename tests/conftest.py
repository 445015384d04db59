"""Options, seeds and the leak check that every test passes through."""

import os

# Before torch starts: one thread per process, and nothing asks a network. `tests.ranks` forks, and OpenMP does not
# survive a fork once a parallel region with several threads has run.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist

torch.set_num_threads(1)

# Names that a first import or the test runner writes by itself.
ENVIRONMENT_WRITTEN_BY_LIBRARIES = (
    "PYTEST_",
    "COLUMNS",
    "LINES",
    "KMP_",
    "CUDA_MODULE_LOADING",
    "PYTORCH_NVML_BASED_CUDA_CHECK",
    "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR",
    "TF2_BEHAVIOR",
    "TF_CPP_MIN_LOG_LEVEL",
    "DS_ACCELERATOR",
)
# Processes that Python and torch keep for later use once something needed them.
SHARED_SERVICES = ("multiprocessing.resource_tracker", "multiprocessing.forkserver", "compile_worker")
FILES_WRITTEN_BY_TOOLS = frozenset({".pytest_cache", "__pycache__", ".ruff_cache", ".ty_cache", ".coverage"})
PROCESS_EXIT_SECONDS = 3.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="also run the tests marked `full` (slow)")
    parser.addoption("--rotate", type=int, metavar="N", help="also run one of the `full` tests of tests/parity, by N")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--full"):
        return
    slow = [item for item in items if "full" in item.keywords]
    parity = [item for item in slow if "parity" in item.path.parts]
    rotate = config.getoption("--rotate")
    chosen = parity[rotate % len(parity)] if parity and rotate is not None else None
    skip = pytest.mark.skip(reason="slow: run with --full")
    for item in slow:
        if item is not chosen:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers in a test whether it runs alone or among others."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@dataclass(frozen=True)
class Surroundings:
    """What one test could leave behind for the next."""

    cwd: str
    files: frozenset[str]
    environment: dict[str, str]
    children: frozenset[psutil.Process]
    dtype: torch.dtype
    grad_enabled: bool

    @classmethod
    def look(cls) -> "Surroundings":
        cwd = os.getcwd()
        return cls(
            cwd=cwd,
            files=frozenset(os.listdir(cwd)) - FILES_WRITTEN_BY_TOOLS,
            environment=dict(os.environ),
            children=frozenset(psutil.Process().children(recursive=True)),
            dtype=torch.get_default_dtype(),
            grad_enabled=torch.is_grad_enabled(),
        )


def _is_service(process: psutil.Process) -> bool:
    try:
        return any(service in " ".join(process.cmdline()) for service in SHARED_SERVICES)
    except psutil.Error:
        return True  # it ended while we looked


def clean_up(before: Surroundings) -> list[str]:
    """Undoes what the test left behind and says what it was."""
    leaks = []

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        leaks.append("a process group: call torch.distributed.destroy_process_group()")

    started = set(psutil.Process().children(recursive=True)) - before.children
    started = {process for process in started if not _is_service(process)}
    if started:
        deadline = time.monotonic() + PROCESS_EXIT_SECONDS
        while time.monotonic() < deadline and any(process.is_running() for process in started):
            psutil.wait_procs(started, timeout=0.1)
            started = {process for process in started if process.is_running()}
    for process in started:
        try:
            description = f"a child process: {process.pid} {' '.join(process.cmdline())[:120]!r} ({process.status()})"
            process.kill()
        except psutil.NoSuchProcess:
            continue
        leaks.append(description)
    psutil.wait_procs(started, timeout=1)

    if os.getcwd() != before.cwd:
        leaks.append(f"the working directory {os.getcwd()}: use monkeypatch.chdir")
        os.chdir(before.cwd)
    files = sorted(set(os.listdir(before.cwd)) - before.files - FILES_WRITTEN_BY_TOOLS)
    if files:
        leaks.append(f"files in {before.cwd}: {', '.join(files)}; write under tmp_path")

    after = dict(os.environ)
    changed = sorted(
        name
        for name in before.environment.keys() | after.keys()
        if before.environment.get(name) != after.get(name) and not name.startswith(ENVIRONMENT_WRITTEN_BY_LIBRARIES)
    )
    if changed:
        leaks.append(f"environment variables: {', '.join(changed)}; use monkeypatch.setenv")
    for name in changed:
        if name in before.environment:
            os.environ[name] = before.environment[name]
        else:
            del os.environ[name]

    if torch.get_default_dtype() != before.dtype:
        leaks.append(f"the default dtype {torch.get_default_dtype()}")
        torch.set_default_dtype(before.dtype)
    if torch.is_grad_enabled() != before.grad_enabled:
        leaks.append(f"grad mode {torch.is_grad_enabled()}")
        torch.set_grad_enabled(before.grad_enabled)
    return leaks


@pytest.fixture(autouse=True)
def leaves_nothing_behind(seed: None) -> Iterator[None]:
    """Fails a test that leaks a process group, a child process, an environment variable or a file in the cwd."""
    before = Surroundings.look()
    yield
    leaks = clean_up(before)
    if leaks:
        pytest.fail("the test left behind " + "\n  and ".join(leaks), pytrace=False)
