"""States leave the device and come back bit for bit, and a program stays within its budget."""

import errno
import gc
import os
from functools import partial

import pytest
import torch
from torch import nn

import scalemlo as mlo
from scalemlo.memory import StateName
from scalemlo.memory.residency import Residency, State
from scalemlo.memory.slots import DiskSlot, HostSlot
from tests.ranks import run_ranks

ADAMW = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
SIZE = 96
TRAINED = 4 * SIZE * SIZE  # bytes of the trained weights of one level, about
LEVELS = ("top", "second", "third", "fourth", "fifth", "bottom")


# ---- a chain of levels: each reads the one above it, and the top one reads the bottom --------------------------------
class Net(nn.Module):
    """A frozen body four times the size of what is trained."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(SIZE, 2 * SIZE), nn.Tanh(), nn.Linear(2 * SIZE, SIZE)).requires_grad_(False)
        self.head = nn.Linear(SIZE, SIZE)

    def forward(self, x):
        return self.head(self.body(x))


def near(view, other, batch):
    return mlo.mean(((view(batch) - other(batch)) ** 2).mean(1))


class Top(mlo.Level):
    def loss(self, batch, bottom):
        return mlo.mean(((bottom(batch) - batch) ** 2).mean(1))


class Second(mlo.Level):
    def loss(self, batch, top):
        return near(self.module, top, batch)


class Third(mlo.Level):
    def loss(self, batch, second):
        return near(self.module, second, batch)


class Fourth(mlo.Level):
    def loss(self, batch, third):
        return near(self.module, third, batch)


class Fifth(mlo.Level):
    def loss(self, batch, fourth):
        return near(self.module, fourth, batch)


class Bottom(mlo.Level):
    def loss(self, batch, fifth):
        return near(self.module, fifth, batch)


class Upper(mlo.Level):
    """Of a pair of levels."""

    def loss(self, batch, lower):
        return mlo.mean(((lower(batch) - batch) ** 2).mean(1))


class Lower(mlo.Level):
    def loss(self, batch, upper):
        return near(self.module, upper, batch)


def build(memory=None, engine=None, hypergradient=None, **options) -> mlo.Program:
    """Six levels: 5 times TRAINED of weights each, and twice TRAINED of moments."""
    torch.manual_seed(5)
    levels = []
    for name, kind in zip(LEVELS, (Top, Second, Third, Fourth, Fifth, Bottom), strict=True):
        data = [torch.randn(8, SIZE) for _ in range(4)]
        estimator = None if kind is Top else hypergradient
        levels.append(kind(name, Net(), data=data, optimizer=ADAMW, hypergradient=estimator))
    return mlo.Program(levels, engine=engine, memory=memory, **options)


def state_of(program: mlo.Program) -> dict[str, torch.Tensor]:
    """Copies of all weights and moments."""
    found = {}
    with program.resident():
        for level, trainer in program.trainers.items():
            found |= {f"{level}/{n}": t.clone() for n, t in trainer.weights().items()}
            for name in trainer.block.names:
                state = trainer.optimizer_state(name)
                found |= {f"{level}/{k}/{name}": t.clone() for k, t in state.items() if isinstance(t, torch.Tensor)}
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def budget(factor: float, disk) -> mlo.Memory:
    return mlo.Memory(device=int(factor * TRAINED), disk=disk)


# ---- slots and states ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["host", "disk"])
def test_a_state_comes_back_bit_for_bit_under_all_its_views(kind, tmp_path):
    full = torch.randn(50, 40)
    tensors = {"full": full, "rows": full[10:20], "other": torch.randn(1000).to(torch.bfloat16)}
    before = {n: t.clone() for n, t in tensors.items()}
    state = State(StateName("memory", "a"), tensors.values, torch.device("cpu"))
    for _ in range(2):
        storages = state.scan()
        size = full.nbytes + tensors["other"].nbytes
        assert state.num_bytes == size and len(storages) == 2
        slot = HostSlot(size, pinned=False) if kind == "host" else DiskSlot(size, tmp_path)
        state.evict(storages, slot)
        assert not state.is_resident and full.untyped_storage().nbytes() == 0
        state.fetch()
        assert same(tensors, before)
    del slot, state
    assert os.listdir(tmp_path) == []


def test_memory_that_torch_does_not_own_stays():
    shared, mapped = torch.zeros(1000).share_memory_(), torch.frombuffer(bytearray(4000), dtype=torch.float32)
    own, small = torch.zeros(1000), torch.zeros(3)
    state = State(StateName("weights", "a"), lambda: [shared, mapped, own, small], torch.device("cpu"))
    state.scan()
    assert (state.num_bytes, state.fixed_bytes, state.foreign_bytes) == (4000, 8012, 8000)
    with pytest.warns(UserWarning, match="7.8 KiB of the weights of 'a' stay on the device"):
        Residency(mlo.Memory(device="1GiB", disk="/tmp"), torch.device("cpu"), {state.name: state})


def test_evicts_farthest_next_use_first_and_no_more_than_it_must(tmp_path):
    names = [StateName("weights", owner) for owner in "abcd"]
    tensors = {name: torch.randn(1024) for name in names}  # 4 KiB each
    states = {n: State(n, lambda n=n: [tensors[n]], torch.device("cpu")) for n in names}
    residency = Residency(mlo.Memory(device="12KiB", disk=tmp_path), torch.device("cpu"), states)
    order = dict(zip(names, [1, 3, 2, 4], strict=True)).__getitem__

    def resident() -> str:
        return "".join(n.owner for n in names if states[n].is_resident)

    assert residency.bring(names[:1], 0, order).num_bytes == 4096 and resident() == "abc"
    assert residency.bring(names[:1], 0, order).num_bytes == 0
    assert residency.bring(names[3:], 0, order).num_bytes == 8192 and resident() == "acd"
    residency.bring(names[3:], 5000, order, pinned=names[2:3])
    assert resident() == "cd"
    residency.bring(names[:1], float("inf"), order)
    assert resident() == "a" and residency.peak_bytes == 4 * 4096
    with pytest.raises(RuntimeError, match="not allocated"):
        tensors[names[3]] @ tensors[names[3]]


# ---- programs --------------------------------------------------------------------------------------------------------
ESTIMATORS = {
    "ghost": (mlo.Identity(), 19),
    "nystrom": (mlo.Nystrom(rank=2, refresh_every=2), 20.2),
    "penalty": (mlo.Penalty(learning_rate=0.1), 24),
    "sama": (mlo.SAMA(), 31),  # whose update's derivative takes many temporaries
}
"""Estimators, and budgets that hold the neediest phase, in TRAINED."""


def trained(rank, world_size, engine, factors, disk) -> dict[str, dict]:
    """Three iterations with and without a budget: whether they agree, and bytes."""
    gc.freeze()  # DeepSpeed collects garbage for every engine
    found = {}
    for name, factor in factors.items():
        hypergradient = ESTIMATORS[name][0]
        free = build(None, engine, hypergradient)
        free.run(3, progress=False)
        tight = build(budget(factor, disk), engine, hypergradient)
        tight.run(3, progress=False)
        residency, taken = tight.iteration.scheduler.residency, tight.iteration.scheduler.meter.taken
        found[name] = dict(
            same=free.history.steps == tight.history.steps and same(state_of(free), state_of(tight)),
            moved=sum(stats.moved_bytes for stats in tight.history.phases.values()),
            budget=residency.memory.device_bytes,
            all_resident=residency.needed_bytes(residency.states) + max(taken.values()),
        )
    return found


def check_within_budget(by_rank, ratios: dict[str, float]) -> None:
    for found in by_rank:
        for name, case in found.items():
            assert case["same"], name
            assert case["moved"] > 0, name
            assert case["all_resident"] >= ratios.get(name, 1.3) * case["budget"], (name, case)


def test_training_within_a_budget_is_bit_identical(tmp_path):
    factors = {name: factor for name, (_, factor) in ESTIMATORS.items()}
    check_within_budget(run_ranks(trained, 1, mlo.Single(), factors, tmp_path), {"ghost": 2.5, "nystrom": 2.5})
    assert os.listdir(tmp_path) == []


def test_shards_within_a_budget_are_bit_identical(tmp_path):
    check_within_budget(run_ranks(trained, 2, mlo.FSDP(), {"ghost": 24}, tmp_path), {})


@pytest.mark.full
@pytest.mark.parametrize("engine", ["ddp", "zero1", "zero2", "zero3"])
def test_every_engine_within_a_budget_is_bit_identical(engine, tmp_path):
    if engine != "ddp":
        pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install 'scalemlo[deepspeed]'")
    buckets = {"reduce_bucket_size": 10_000, "allgather_bucket_size": 10_000}  # by default 2 GiB; they count
    spec = mlo.DDP() if engine == "ddp" else mlo.DeepSpeed(stage=int(engine[-1]), config={"zero_optimization": buckets})
    check_within_budget(run_ranks(trained, 2, spec, {"ghost": 32}, tmp_path), {})


def test_everything_outside_of_phases_works(tmp_path):
    (tmp_path / "spill").mkdir()
    free, tight = build(), build(budget(20, tmp_path / "spill"))
    batch = torch.randn(4, SIZE)
    found = []
    for program in (free, tight):
        program.run(2, progress=False)
        with program.inference("third") as third:
            output = third(batch)
        state = program.state_dict("fourth")
        gradients = {f"{n}/{k}": t for n, g in program.gradients().items() for k, t in g.items()}
        saved = program.save(tmp_path / ("free" if program is free else "tight"))
        with program.resident("second"):
            second = {n: t.clone() for n, t in program.trainers["second"].weights().items()}
        found.append((output, state, gradients, second, saved))
    (output, *states, saved), (output_tight, *states_tight, saved_tight) = found
    assert torch.equal(output, output_tight)
    assert all(same(a, b) for a, b in zip(states, states_tight, strict=True))
    with pytest.raises(ValueError, match="weights of level 'third' are off the device.*program.resident"):
        tight.trainers["third"].weights()
    with pytest.raises(ValueError, match="its optimizer is off the device.*reads_optimizer"):
        tight.trainers["third"].optimizer_state("head.weight")
    free.run(1, progress=False)
    tight.run(1, progress=False)
    assert same(state_of(free), state_of(tight))
    tight.load(saved)
    free.load(saved_tight)
    free.run(2, progress=False)
    tight.run(2, progress=False)
    assert same(state_of(free), state_of(tight))


def test_check_and_undone_steps_work_within_a_budget(tmp_path):
    def program(memory):
        torch.manual_seed(2)
        data = [torch.randn(8, SIZE) for _ in range(4)]
        lower = Lower("lower", Net(), data=data, optimizer=ADAMW, hypergradient=mlo.Unrolled(), unroll_steps=2)
        return mlo.Program([Upper("upper", Net(), data=data, optimizer=ADAMW), lower], memory=memory)

    free, tight = program(None), program(budget(42, tmp_path))
    for p in (free, tight):
        p.run(1, progress=False)
    before = state_of(tight)
    expected, found = free.gradients(), tight.gradients()
    assert all(torch.equal(expected[n][k], t) for n, g in found.items() for k, t in g.items())
    mlo.check(tight, [])
    mlo.check(free, [])
    assert same(state_of(tight), before)
    for p in (free, tight):
        p.run(2, progress=False)
    assert same(state_of(free), state_of(tight))


# ---- what cannot work ------------------------------------------------------------------------------------------------
def test_what_does_not_fit_is_said_with_its_numbers(tmp_path):
    needs = r"it needs weights of 'top' \(180.0 KiB\), weights of 'bottom' \(180.0 KiB\)"
    start = "phase 'direct gradient' of level 'top' does not fit memory=108.0 KiB: "
    with pytest.raises(ValueError, match=f"{start}{needs}.*Raise the budget"):
        build(budget(3, tmp_path)).run(1, progress=False)
    with pytest.raises(ValueError, match=r"takes .* more while it runs \(measured\)"):
        build(budget(12, tmp_path)).run(1, progress=False)


def test_bad_budgets(tmp_path):
    with pytest.raises(ValueError, match="unknown unit"):
        mlo.Memory(device="70GiBi")
    with pytest.raises(ValueError, match="disk='/not/there' cannot be written to"):
        mlo.Memory(device="1GiB", disk="/not/there")
    with pytest.raises(ValueError, match=r"memory='1GiB': levels compute on the CPU.*disk='/scratch'"):
        build("1GiB")


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    def full(descriptor, offset, length):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    tight = build(budget(20, tmp_path))
    before = state_of(tight)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ValueError, match=r"weights of '\w+' .* the disk is full. It stays on the device, and nothing"):
        tight.run(1, progress=False)
    assert same(state_of(tight), before)
    monkeypatch.undo()
    tight.run(1, progress=False)
