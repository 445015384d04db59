"""What a history measures of the process: peaks of the CPU, without what the allocator keeps for later."""

import ctypes

import pytest
import torch

from scalemlo import history as tracking
from scalemlo.history import EVERY_CALL, FIRST_CALLS, History

CPU = torch.device("cpu")
MIB = 2**20
needs_glibc = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc")


def tensors(mebibytes):
    """Small tensors of so many MiB, which the allocator takes from its heap and does not return when they are freed."""
    return [torch.ones(16 * 1024) for _ in range(16 * mebibytes)]


@needs_glibc
def test_what_was_freed_before_is_no_part_of_a_peak():
    history = History()
    with history.phase("level", "before", CPU):
        pass
    base = history.phases["level/before"].peak_bytes
    freed, kept = tensors(256), [torch.ones(1024)]  # the kept one lies on top of the heap
    del freed
    with history.phase("level", "small", CPU):
        small = tensors(32)
    assert history.phases["level/small"].peak_bytes - base == pytest.approx(32 * MIB, abs=16 * MIB)
    with history.phase("level", "large", CPU):
        large = tensors(128)
        del large
    assert history.phases["level/large"].peak_bytes - base == pytest.approx((32 + 128) * MIB, abs=16 * MIB)
    assert len(small) and len(kept)


def test_which_calls_are_measured(monkeypatch):
    history, measured = History(), []
    monkeypatch.setattr(tracking, "reset_peak_bytes", lambda device: measured.append(True))
    monkeypatch.setattr(tracking, "peak_bytes", lambda device: 100 + len(measured))
    for _ in range(2 * EVERY_CALL + 1):
        with history.phase("level", "step", CPU):
            pass
    stats = history.phases["level/step"]
    assert stats.num_calls == 2 * EVERY_CALL + 1
    assert len(measured) == FIRST_CALLS + 2 and stats.peak_bytes == 100 + len(measured)
