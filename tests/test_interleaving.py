"""Levels change places where that moves fewer bytes, and nothing else changes."""

import math
from dataclasses import replace

import pytest
import torch

import scalemlo as mlo
from scalemlo.memory import scheduler
from scalemlo.memory.interleaving import Interleaving, Part, Sizes, interleave, moved_bytes
from scalemlo.memory.phases import Phase, StateName
from scalemlo.planning.planner import plan
from tests import test_residency
from tests.ranks import run_ranks
from tests.test_residency import LEVELS, TRAINED

SIZE = 10


def weights(owner):
    return StateName("weights", owner)


def work(kind, *levels, uses=None, leaves=None):
    """A part whose levels need their own weights of 10 bytes, or those given."""
    name = "gradient" if kind == "gradients" else "step"
    phases = {n: (Phase(1, n, name, tuple(map(weights, (uses or {}).get(n, (n,))))),) for n in levels}
    return Part(1, kind, phases, leaves or dict.fromkeys(levels, 0))


def sizes(parts, budget, room=0):
    phases = [phase for part in parts for found in part.work.values() for phase in found]
    states = {name: SIZE for phase in phases for name in phase.uses}
    return Sizes(states, dict.fromkeys(phases, room), budget)


def test_moved_bytes_in_closed_form():
    parts = [work("gradients", *"abc"), work("steps", *"abc")]
    there, back = tuple("abc"), tuple("cba")
    # One state fits: every phase brings its own and evicts the one before.
    assert moved_bytes(parts, [there, there], sizes(parts, SIZE)) == 6 * 2 * SIZE
    # There and back again: the last gradient's weights stay for the first step, the last step's for the next gradient.
    assert moved_bytes(parts, [there, back], sizes(parts, SIZE)) == 4 * 2 * SIZE
    assert moved_bytes(parts, [there, there], sizes(parts, 3 * SIZE)) == 0
    assert 0 < moved_bytes(parts, [there, there], sizes(parts, 3 * SIZE, room=1)) < math.inf
    assert moved_bytes(parts, [there, there], sizes(parts, SIZE, room=1)) == math.inf


def test_what_a_phase_takes_depends_on_what_those_before_it_left():
    """Each gradient leaves 3 bytes; a's is large and leaves 8. Measured in the order given: 1, 9 and 12 bytes."""
    part = work("gradients", *"abc", leaves={"a": 8, "b": 3, "c": 3})
    of = {phase.level: phase for found in part.work.values() for phase in found}
    room = {of["a"]: 1, of["b"]: 9, of["c"]: 12}
    measured = Sizes({name: SIZE for phase in of.values() for name in phase.uses}, room, SIZE + 12)
    assert moved_bytes([part], [("a", "b", "c")], measured) < math.inf
    assert moved_bytes([part], [("c", "b", "a")], measured) < math.inf  # takes 1, 4 and 7
    tight = replace(measured, budget=SIZE + 7)
    assert moved_bytes([part], [("c", "b", "a")], tight) < math.inf
    assert moved_bytes([part], [("b", "a", "c")], tight) == math.inf  # c again finds what both left
    found = interleave([part], {n: set() for n in "abc"}, tight)
    assert found.given_bytes == math.inf and moved_bytes([part], found.orders, tight) < math.inf
    assert found.sentences[0].endswith("60 B and every phase fits")


def test_steps_are_taken_on_the_way_back():
    parts = [work("gradients", *"abc"), work("steps", *"abc")]
    found = interleave(parts, {n: set() for n in "abc"}, sizes(parts, SIZE))
    assert moved_bytes(parts, found.orders, sizes(parts, SIZE)) == 4 * 2 * SIZE
    assert found.given_bytes == 6 * 2 * SIZE
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
    monkeypatch.setattr(scheduler.BudgetScheduler, "_interleave", lambda self: None)
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
        return Interleaving(tuple(orders), ("Steps are taken backwards.",), math.inf)

    monkeypatch.setattr(scheduler, "interleave", steps_backwards)
    free, _ = after(None)
    backwards, sentences = after(mlo.Memory(device=40 * TRAINED, disk=tmp_path))
    assert sentences and equal(free, backwards)


def test_an_order_that_does_not_hold_what_was_expected_is_given_up(tmp_path, monkeypatch):
    """Nothing is lost by trying: the given order comes back, with what was measured in it."""

    def after(memory):
        program = test_residency.build(memory=memory)
        measured = []
        for _ in range(5):
            program.step()
            measured.append(dict(program.iteration.scheduler.meter.taken) if memory else {})
        return [program.state_dict(name) for name in LEVELS], program, measured

    def no_better(parts, below, sizes):
        orders = [tuple(part.work)[:: -1 if part.kind == "steps" else 1] for part in parts]
        return Interleaving(tuple(orders), ("Steps are taken backwards.",), 0)  # the given order would move nothing

    free, *_ = after(None)
    memory = mlo.Memory(device=20 * TRAINED, disk=tmp_path)
    for found in (no_better, None):
        if found is not None:
            monkeypatch.setattr(scheduler, "interleave", found)
        else:
            monkeypatch.undo()
            monkeypatch.setattr(scheduler.BudgetScheduler, "_check_fits", exceeding_in_trials)
        weights, program, measured = after(memory)
        assert equal(free, weights)
        assert program.interleaving() == () and [p.level for p in program.phases() if p.name == "step"] == list(LEVELS)
        assert measured[1].items() <= program.iteration.scheduler.meter.taken.items()


def exceeding_in_trials(self, phase):
    """As if no phase fitted while an order is tried."""
    if self._trial is not None:
        self._trial.exceeds = True


def test_what_earlier_phases_left_counts_in_the_chosen_order(tmp_path):
    """Steps free the gradients one by one: each finds those of the levels that have not stepped yet."""
    program = train(mlo.Memory(device=20 * TRAINED, disk=tmp_path))[2]
    steps = [phase for phase in program.phases() if phase.name == "step"]
    assert [phase.level for phase in steps] != list(LEVELS)
    gradient = TRAINED + 4 * test_residency.SIZE  # with the bias
    own = {
        program.iteration.scheduler.meter.taken[phase] - (len(steps) - i) * gradient for i, phase in enumerate(steps)
    }
    assert len(own) == 1 and 0 < own.pop() < 3 * gradient  # a step's temporaries: alike in all levels
    assert not program.iteration.scheduler.meter.is_watching
