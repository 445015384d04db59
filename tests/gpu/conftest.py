"""The checks of the proof kit: they run on an accelerator, or on the CPU where the kit says so.

`python benchmarks/gpu/run.py` (`make gpu`) runs them; plain pytest does too where it finds an accelerator.
"""

import gc
import os
from collections.abc import Iterator

import pytest
import torch

from scalemlo.distributed.group import shutdown
from tests.gpu.small import is_on_accelerator, use_deterministic_algorithms


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "gpu: a check of the proof kit (make gpu), on an accelerator or told to use none"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if is_on_accelerator() or os.environ.get("SCALEMLO_GPU_KIT"):
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no accelerator: `make gpu DEVICE=cpu` runs it on the CPU"))


@pytest.fixture(autouse=True)
def alone(leaves_nothing_behind: None) -> Iterator[None]:
    """No process group and no memory of the test before, whatever became of it."""
    yield
    shutdown()
    gc.collect()
    if is_on_accelerator():
        torch.accelerator.empty_cache()


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Kernels whose sums have one order, for comparisons bit for bit."""
    use_deterministic_algorithms()
    yield
    torch.use_deterministic_algorithms(False)
