"""An error or Ctrl-C inside a step leaves nothing behind, and the next call makes the step as if it had not come."""

import os
import random
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import scalemlo as mlo
from scalemlo.loop.listener import Listener
from tests.ranks import run_ranks

ENGINES = {"ddp": mlo.DDP, "fsdp": mlo.FSDP} | {
    f"zero-{stage}": partial(mlo.DeepSpeed, stage=stage) for stage in (1, 2, 3)
}
ESTIMATORS = {
    "products": mlo.Identity(),
    "forward derivative": mlo.Identity(mixed="forward"),
    "SAMA": mlo.SAMA(),
    "Neumann": mlo.Neumann(num_terms=2, step_size=0.1),
    "unrolled": mlo.Unrolled(),
}


class Fault(Exception):
    """Raised on purpose."""


@dataclass
class Faults:
    """Counts the places that a step passes, and fails at one of them."""

    at: int = -1
    kinds: list[str] = field(default_factory=list)
    error: Callable[[], BaseException] = Fault

    def pass_by(self, kind: str) -> None:
        self.kinds.append(kind)
        if len(self.kinds) - 1 == self.at:
            raise self.error()


class Net(nn.Module):
    """Leaves marks wherever a forward can: a buffer, a counter, random numbers of three libraries."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.dropout = nn.Linear(3, 4), nn.Linear(4, 1), nn.Dropout(0.2)
        self.register_buffer("seen", torch.zeros(()))
        self.num_calls = 0

    def forward(self, x):
        if self.training:
            self.num_calls += 1
            with torch.no_grad():
                self.seen += x.detach().mean()
        noise = 0.01 * random.random() + 0.01 * np.random.rand()
        return self.head(self.dropout(self.body(x).tanh()) + noise).squeeze(-1)


class Low(mlo.Level):
    faults: Faults

    def loss(self, batch, top):
        self.faults.pass_by("loss")
        losses = (self.module(batch) - 1).square()
        weights = top(losses.detach().unsqueeze(-1)).squeeze(-1)
        if losses.requires_grad and losses.grad_fn is not None and not torch._C._functorch.maybe_current_level():
            losses.register_hook(lambda gradient: self.faults.pass_by("backward"))
        return mlo.weighted_mean(losses, weights)


class Top(mlo.Level):
    faults: Faults

    def loss(self, batch, low):
        self.faults.pass_by("loss")
        return mlo.mean(low(batch).square())


class Failing(Listener):
    def __init__(self, faults: Faults):
        self.faults = faults

    def on_tick_begin(self):
        self.faults.pass_by("on_tick_begin")

    def on_micro_batch(self, level):
        self.faults.pass_by("on_micro_batch")

    def on_level_gradient(self, level, loss, norm, is_hypergradient):
        self.faults.pass_by("on_level_gradient")

    def on_level_step(self, level, loss):
        self.faults.pass_by("on_level_step")

    def on_tick_end(self):
        self.faults.pass_by("on_tick_end")


class Batches:
    """Cycled; two epochs of a run are different batches."""

    def __init__(self, faults: Faults, seed: int):
        self.faults = faults
        generator = torch.Generator().manual_seed(seed)
        self.data = [torch.randn(4, 3, generator=generator) for _ in range(5)]

    def __iter__(self):
        yield from self.data


def make(faults: Faults, engine, estimator: str, unroll_steps: int = 2) -> mlo.Program:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    net, gate = Net(), nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1), nn.Sigmoid())
    adam = partial(torch.optim.Adam, lr=0.05)

    def opt(params):
        optimizer = adam(params)
        optimizer.register_step_pre_hook(lambda *_: faults.pass_by("optimizer"))
        return optimizer

    top = Top("top", gate, data=Batches(faults, 1), optimizer=opt)
    low = Low(
        "low",
        net,
        data=Batches(faults, 2),
        optimizer=opt,
        unroll_steps=unroll_steps,
        gradient_accumulation_steps=2,
        hypergradient=ESTIMATORS[estimator],
    )
    top.faults = low.faults = faults
    program = mlo.Program([top, low], engine=engine(), verify="off")
    program.listener = Failing(faults)
    return program


def weights(program: mlo.Program) -> dict[str, torch.Tensor]:
    found = {f"{n}/{k}": t.clone() for n, x in program.trainers.items() for k, t in x.weights().items()}
    buffers = {f"{n}/{k}": t.clone() for n, x in program.trainers.items() for k, t in x.engine.module.named_buffers()}
    return found | buffers


def surroundings(program: mlo.Program):
    module = program.trainers["low"].engine.module
    return (
        random.getstate(),
        str(np.random.get_state()),
        torch.get_rng_state().tolist(),
        program.iteration.generator.get_state().tolist(),
        {n: x.stream.state_dict() | {"generators": []} for n, x in program.trainers.items()},
        (module.num_calls, float(module.seen)),
        {n: len(x.trajectory.steps) if x.trajectory else 0 for n, x in program.trainers.items()},
    )


def no_gradient_left(program: mlo.Program) -> bool:
    return all(p.grad is None for x in program.trainers.values() for p in x.engine.parameters.values()) and all(
        p.grad is None for x in program.trainers.values() for p in x.engine.module.parameters()
    )


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t, b[n]) for n, t in a.items())


def run_with_faults(engine, estimator: str, which: Callable[[list[str]], Sequence[int]]) -> list[str]:
    """A fault at every place of the second step; what is wrong, in words."""
    faults = Faults()
    program = make(faults, engine, estimator)
    program.step()
    before = len(faults.kinds)
    program.step()
    places = faults.kinds[before:]
    program.step()
    expected = weights(program), program.history.steps
    wrong = []
    for place in which(places):
        faults = Faults()
        program = make(faults, engine, estimator)
        program.step()
        found, moved = surroundings(program), weights(program)
        faults.at = before + place
        first_update = places.index("optimizer")
        try:
            program.step()
            wrong.append(f"{place} {places[place]}: no error")
        except Fault:
            faults.at = -1
        if not no_gradient_left(program):
            wrong.append(f"{place} {places[place]}: a gradient is left")
        if place <= first_update:
            after = surroundings(program)
            wrong += [f"{place} {places[place]}: part {i} differs" for i in range(len(found)) if found[i] != after[i]]
            if not same(moved, weights(program)):
                wrong.append(f"{place} {places[place]}: weights moved")
        while program.num_steps < 3:
            program.step()
        if not same(weights(program), expected[0]):
            wrong.append(f"{place} {places[place]}: the run goes on otherwise")
        if program.history.steps != expected[1]:
            wrong.append(f"{place} {places[place]}: the record is another")
    return wrong


def everywhere(places: list[str]) -> range:
    return range(len(places))


def once_each(places: list[str]) -> list[int]:
    """The first and the last place of each kind."""
    ends = [(places.index(kind), len(places) - 1 - places[::-1].index(kind)) for kind in dict.fromkeys(places)]
    return sorted({place for pair in ends for place in pair})


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_fault_anywhere_leaves_nothing_behind(estimator):
    wrong = run_with_faults(mlo.Single, estimator, everywhere)
    assert not wrong, "\n".join(wrong)


CASES = [(engine, estimator) for engine in ENGINES for estimator in ("products", "unrolled")]


@pytest.mark.parametrize(
    ("engine", "estimator", "which"),
    [(engine, "products", once_each) for engine in ("ddp", "fsdp", "zero-3")]
    + [pytest.param(*case, everywhere, marks=pytest.mark.full) for case in CASES],
)
def test_on_ranks(engine, estimator, which):
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")

    def body(rank, world_size):
        return run_with_faults(ENGINES[engine], estimator, which)

    for wrong in run_ranks(body, 2):
        assert not wrong, "\n".join(wrong)


def test_a_step_that_fails_half_way_says_so():
    """One optimizer changed some of its weights: nothing can be put back, and nothing goes on from there."""

    class Halves(torch.optim.SGD):
        fails = False

        def step(self, closure=None):
            if self.fails:
                with torch.no_grad():
                    self.param_groups[0]["params"][0].add_(1.0)
                raise Fault("in the middle")
            return super().step(closure)

    faults = Faults()
    program = make(faults, mlo.Single, "products")
    program.step()
    optimizer = program.trainers["low"].optimizer
    optimizer.__class__ = Halves
    optimizer.fails = True
    with pytest.raises(Fault):
        program.step()
    optimizer.fails = False
    for call in (program.step, program.gradients, lambda: program.save("nowhere")):
        with pytest.raises(RuntimeError, match="optimizer of level 'low' failed half way.*Call load"):
            call()


def test_between_two_updates_of_an_iteration_nothing_is_saved(tmp_path):
    faults = Faults()
    program = make(faults, mlo.Single, "products")
    program.save(tmp_path / "run")
    faults.at = 12  # in the second tick
    with pytest.raises(Fault):
        program.step()
    faults.at = -1
    with pytest.raises(ValueError, match=r"save\(\) is for between two outer iterations.*step\(\).*load\(\)"):
        program.save(tmp_path / "run")
    program.load(tmp_path / "run")
    program.step()
    again = make(Faults(), mlo.Single, "products")
    again.step()
    assert same(weights(program), weights(again))


def test_batches_that_are_given_back_are_not_lost_to_a_checkpoint(tmp_path):
    faults = Faults()
    program = make(faults, mlo.Single, "products")
    program.step()
    faults.at = len(faults.kinds) + 4
    with pytest.raises(Fault):
        program.step()
    faults.at = -1
    program.save(tmp_path / "run")
    program.step()
    resumed = make(Faults(), mlo.Single, "products")
    resumed.load(tmp_path / "run")
    resumed.step()
    assert program.history.steps == resumed.history.steps


def test_ctrl_c_waits_for_updates():
    """Nothing is cut in two: the tick is finished, and the error comes after it."""
    faults = Faults()
    program = make(faults, mlo.Single, "products", unroll_steps=1)

    class Pressed(Listener):
        def on_level_step(self, level, loss):
            heard.append(level)

    heard: list[str] = []
    program.listener = Pressed()
    program.trainers["top"].optimizer.register_step_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        program.step()
    assert heard == []
    program.trainers["top"].optimizer._optimizer_step_pre_hooks.popitem()
    program.step()
    assert heard == ["top", "low"]
    expected = make(Faults(), mlo.Single, "products", unroll_steps=1)
    expected.step()
    assert program.num_steps == 1 and same(weights(program), weights(expected))
