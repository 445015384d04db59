"""Within a memory budget states leave the device, with the same bits, and the allocator keeps to the budget."""

import gc

import pytest
import torch

import scalemlo as mlo
from scalemlo.distributed.group import default_device
from scalemlo.memory.slots import HostSlot
from tests import test_residency as chain
from tests.gpu.small import ENGINES, is_on_accelerator, on_host

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("deterministic")]

SIZE = 4096 if is_on_accelerator() else 96
"""Width of the chain's modules. On an accelerator its libraries' workspaces, tens of MiB, are part of the budget."""
BUDGET = 24 if is_on_accelerator() else 20
"""In the trained weights of one of the six levels, of which all take 42 with moments and frozen weights."""


@pytest.mark.parametrize("engine", ["single", "fsdp"])
@pytest.mark.parametrize("estimator", ["ghost", "neumann"])
def test_a_budget_is_kept_and_bits_are_equal(engine, estimator, tmp_path, monkeypatch, record_property):
    monkeypatch.setattr(chain, "SIZE", SIZE)
    hypergradient = {"ghost": None, "neumann": mlo.Neumann(num_terms=2, step_size=0.1)}[estimator]
    factor = BUDGET if (engine, estimator) == ("single", "ghost") else 32  # gathered weights, vectors of the series
    memory = mlo.Memory(device=factor * 4 * SIZE**2, disk=None if is_on_accelerator() else tmp_path)

    free = chain.build(None, ENGINES[engine](), hypergradient)
    free.run(4, progress=False)
    expected, steps = on_host(chain.state_of(free)), free.history.steps
    del free
    gc.collect()

    tight = chain.build(memory, ENGINES[engine](), hypergradient)
    tight.run(4, progress=False)
    phases = tight.history.phases.values()
    assert sum(stats.moved_bytes for stats in phases) > 0
    if is_on_accelerator():
        slots = [state.slot for state in tight.iteration.scheduler.residency.states.values() if state.slot is not None]
        assert slots and all(isinstance(slot, HostSlot) and slot._buffer.is_pinned() for slot in slots)
        peak = max(stats.peak_bytes for stats in phases)
        name = f"residency/{engine}/{estimator}"
        record_property(f"{name}/peak_over_budget", peak / memory.device_bytes)
        record_property(f"{name}/moved_gib", sum(stats.moved_bytes for stats in phases) / 2**30)
        record_property(f"{name}/waited_seconds", sum(stats.moved_seconds for stats in phases))
        assert peak <= memory.device_bytes
    assert tight.history.steps == steps
    assert chain.same(on_host(chain.state_of(tight)), expected)


@pytest.mark.skipif(not is_on_accelerator(), reason="there is no allocator of an accelerator to look at")
def test_what_is_evicted_is_given_back_to_the_allocator(monkeypatch):
    monkeypatch.setattr(chain, "SIZE", SIZE)
    tight = chain.build(mlo.Memory(device=BUDGET * 4 * SIZE**2))
    tight.run(2, progress=False)
    gc.collect()
    torch.accelerator.synchronize()
    held = torch.get_device_module(default_device()).memory_allocated()
    residency = tight.iteration.scheduler.residency
    beside = 128 * 2**20  # workspaces of libraries, and the batches
    assert held <= residency.resident_bytes + beside
    assert residency.resident_bytes <= residency.memory.device_bytes
