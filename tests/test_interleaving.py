"""Levels change places where that moves fewer bytes, and nothing else changes."""

import pytest
import torch

import scalemlo as mlo
from scalemlo.scheduler import scheduler
from scalemlo.scheduler.interleaving import Interleaving, Part, Sizes, interleave, moved_bytes
from scalemlo.scheduler.phases import Phase, StateName
from scalemlo.scheduler.plan import plan
from tests import test_residency
from tests.ranks import run_ranks
from tests.test_residency import LEVELS, TRAINED

SIZE = 10


def weights(owner):
    return StateName("weights", owner)


def work(kind, *levels, uses=None):
    """A part whose levels need their own weights of 10 bytes, or those given."""
    name = "gradient" if kind == "gradients" else "step"
    return Part(1, kind, {n: (Phase(1, n, name, tuple(map(weights, (uses or {}).get(n, (n,))))),) for n in levels})


def sizes(parts, budget, room=0):
    phases = [phase for part in parts for found in part.work.values() for phase in found]
    states = {name: SIZE for phase in phases for name in phase.uses}
    return Sizes(states, dict.fromkeys(phases, room), budget)


def test_moved_bytes_in_closed_form():
    parts = [work("gradients", *"abc"), work("steps", *"abc")]
    phases = [phase for part in parts for found in part.work.values() for phase in found]
    # One state fits: every phase brings its own and evicts the one before.
    assert moved_bytes(phases, sizes(parts, SIZE)) == 6 * 2 * SIZE
    # There and back again: the last gradient's weights stay for the first step, the last step's for the next gradient.
    assert moved_bytes(phases[:3] + phases[:2:-1], sizes(parts, SIZE)) == 4 * 2 * SIZE
    assert moved_bytes(phases, sizes(parts, 3 * SIZE)) == 0
    assert moved_bytes(phases, sizes(parts, 3 * SIZE, room=1)) > 0


def test_steps_are_taken_on_the_way_back():
    parts = [work("gradients", *"abc"), work("steps", *"abc")]
    found = interleave(parts, {n: set() for n in "abc"}, sizes(parts, SIZE))
    phases = [phase for part, order in zip(parts, found.orders, strict=True) for n in order for phase in part.work[n]]
    assert moved_bytes(phases, sizes(parts, SIZE)) == 4 * 2 * SIZE
    assert any("instead of 120 B" in sentence for sentence in found.sentences)


def test_gradients_with_the_same_weights_stand_together_where_they_may():
    shared = {"a": ("x",), "b": ("y",), "c": ("x",), "d": ("y",)}
    parts = [work("gradients", *"abcd", uses=shared)]
    found = interleave(parts, {n: set() for n in "abcd"}, sizes(parts, SIZE))
    assert found.orders[0] in (("a", "c", "b", "d"), ("a", "b", "d", "c"))
    assert found.sentences[0].endswith("the iteration then moves 40 B instead of 80 B")
    # But c's gradient comes out of b's pass, and so on: nothing may change places.
    chained = interleave(parts, {"a": set("bcd"), "b": set("cd"), "c": {"d"}, "d": set()}, sizes(parts, SIZE))
    assert chained.orders == (tuple("abcd"),) and not chained.sentences


def test_given_order_stays_where_nothing_is_better():
    parts = [work("gradients", *"abc"), work("steps", *"abc")]
    found = interleave(parts, {n: set() for n in "abc"}, sizes(parts, 3 * SIZE))
    assert found.orders == (("a", "b", "c"), ("a", "b", "c")) and not found.sentences


def test_many_levels_are_reversed_at_least():
    names = [f"level{i}" for i in range(9)]
    parts = [work("gradients", *names), work("steps", *names)]
    found = interleave(parts, {n: set() for n in names}, sizes(parts, SIZE))
    assert sorted(found.orders) == [tuple(names), tuple(reversed(names))]


# ---- programs --------------------------------------------------------------------------------------------------------
def train(memory, steps=6):
    """Weights after some steps, bytes moved in the last two, and the program."""
    program = test_residency.build(memory=memory)
    for _ in range(steps - 2):
        program.step()
    before = sum(stats.moved_bytes for stats in program.history.phases.values())
    for _ in range(2):
        program.step()
    moved = sum(stats.moved_bytes for stats in program.history.phases.values()) - before
    return [program.state_dict(name) for name in LEVELS], moved, program


def equal(a, b):
    return all(torch.equal(x[n], y[n]) for x, y in zip(a, b, strict=True) for n in x)


def test_chain_moves_less_and_bits_are_the_same(tmp_path, monkeypatch):
    memory = mlo.Memory(device=20 * TRAINED, disk=tmp_path)
    free, nothing, without = train(None)
    chosen, less, program = train(memory)
    assert nothing == 0 and not without.interleaving()
    assert any(sentence.startswith("steps at tick 1") for sentence in program.interleaving())
    monkeypatch.setattr(mlo.scheduler.scheduler.Scheduler, "_interleave", lambda self, residency: None)
    given, more, _ = train(memory)
    assert 0 < less < more
    assert equal(free, chosen) and equal(free, given)


def test_order_is_chosen_anew_after_a_resume_and_bits_are_the_same(tmp_path):
    memory = mlo.Memory(device=20 * TRAINED, disk=tmp_path)
    whole, _, program = train(memory, steps=7)
    first = train(memory, steps=4)[2]
    first.save(tmp_path / "run")
    resumed = test_residency.build(memory=memory)
    resumed.load(tmp_path / "run")
    for _ in range(3):
        resumed.step()
    assert resumed.interleaving() == program.interleaving() != ()
    assert equal(whole, [resumed.state_dict(name) for name in LEVELS])


def test_ranks_agree_on_the_order(tmp_path):
    def body(rank, world_size, memory):
        program = test_residency.build(memory=memory, engine=mlo.DDP())
        for _ in range(4):
            program.step()
        return program.interleaving(), [program.state_dict(name) for name in LEVELS]

    (first, within), (second, _) = run_ranks(body, 2, mlo.Memory(device=24 * TRAINED, disk=tmp_path))
    assert first == second != ()
    assert equal(within, run_ranks(body, 2, None)[0][1])


def test_plan_says_what_the_run_does(tmp_path):
    memory = mlo.Memory(device=20 * TRAINED, disk=tmp_path)
    program = train(memory)[2]
    found = plan(lambda: test_residency.build(memory=memory), world_size=1, accelerator=False)
    assert found.interleaving == program.interleaving() == tuple(found.as_dict()["interleaving"])


@pytest.mark.parametrize("estimator", [mlo.Nystrom(rank=3), mlo.SAMA()])
def test_random_and_optimizer_reading_estimators_do_not_depend_on_the_order(tmp_path, monkeypatch, estimator):
    def after(memory):
        program = test_residency.build(memory=memory, hypergradient=estimator)
        for _ in range(4):
            program.step()
        return [program.state_dict(name) for name in LEVELS], program.interleaving()

    def steps_backwards(parts, below, sizes):
        orders = [tuple(part.work)[:: -1 if part.kind == "steps" else 1] for part in parts]
        return Interleaving(tuple(orders), ("Steps are taken backwards.",))

    monkeypatch.setattr(scheduler, "interleave", steps_backwards)
    free, _ = after(None)
    backwards, sentences = after(mlo.Memory(device=40 * TRAINED, disk=tmp_path))
    assert sentences and equal(free, backwards)
