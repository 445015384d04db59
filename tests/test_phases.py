"""The phases of an outer iteration, which states they use, and when a state is used next."""

import torch

import scalemlo as mlo
from scalemlo.memory import Phase, StateName
from scalemlo.memory.phases import Timeline
from tests.problems import Problem


def used(program: mlo.Program) -> list[tuple[int, str, str, set[str]]]:
    return [(p.tick, p.level, p.name, {str(state) for state in p.uses}) for p in program.phases()]


def program_of(hypergradient: mlo.Hypergradient) -> mlo.Program:
    program = Problem(warm_up_steps=0).program(hypergradient, mlo.Single())
    program.run(2, progress=False)  # the first iteration also compares ghost products with the forward derivative
    return program


def test_phases_are_those_of_the_run_and_declare_what_they_use():
    both = {"weights of 'finetune'", "weights of 'rater'"}
    assert used(program_of(mlo.Identity())) == [
        (1, "rater", "data", set()),
        (1, "finetune", "data", set()),
        (1, "rater", "direct gradient", both),
        (1, "finetune", "solve", both | {"memory of 'finetune'"}),
        (1, "finetune", "gradient and mixed partial", both),
        (1, "rater", "step", {"weights of 'rater'", "optimizer of 'rater'"}),
        (1, "finetune", "step", {"weights of 'finetune'", "optimizer of 'finetune'"}),
    ]


def test_only_estimators_that_read_it_need_the_optimizer():
    for hypergradient, reads in [
        (mlo.SAMA(), True),
        (mlo.Neumann(num_terms=1, step_size=0.1, preconditioner="optimizer"), True),
        (mlo.Neumann(num_terms=1, step_size=0.1, mixed="forward"), False),
        (mlo.Penalty(learning_rate=0.1), False),
    ]:
        (uses,) = (states for _, _, name, states in used(program_of(hypergradient)) if name == "hypergradient")
        assert ("optimizer of 'finetune'" in uses) == reads


def test_phases_are_unknown_before_the_first_iteration():
    program = Problem().program(mlo.Identity(), mlo.Single())
    try:
        program.phases()
    except ValueError as error:
        assert "no outer iteration has run yet" in str(error)
    else:
        raise AssertionError("no error")
    program.gradients()  # is no part of an iteration
    assert program.iteration.scheduler.timeline.phases == ()


def test_next_use_goes_round():
    a, b, c = (StateName("weights", owner) for owner in "abc")
    phases = [Phase(1, "x", "data", ()), Phase(1, "x", "gradient", (a, b)), Phase(1, "x", "step", (a,))]
    timeline = Timeline()
    assert timeline.next_phase() is None
    for _ in range(2):
        with timeline.iteration():
            timeline.tick = 1
            for phase in phases:
                timeline.note(phase)
                if timeline.phases and phase.name == "gradient":
                    assert [timeline.next_use(s) for s in (a, b, c)] == [1, 3, float("inf")]
                    assert timeline.next_phase() == phases[2]
    assert timeline.phases == tuple(phases)
    assert [timeline.next_use(s) for s in (a, b)] == [2, 2]
    assert timeline.next_phase() == phases[1]


def test_moves_are_in_the_history(tmp_path):
    torch.manual_seed(0)
    program = Problem(warm_up_steps=0).program(
        mlo.Identity(), mlo.Single(), memory=mlo.Memory(device="1GiB", disk=tmp_path)
    )
    program.run(3, progress=False)
    rows = {name: stats.as_row() for name, stats in program.history.phases.items()}
    assert rows["rater/direct gradient"]["moved_bytes"] >= 0
    assert sum(row["moved_bytes"] for row in rows.values()) > 0  # the first iteration keeps only what it needs
    before = sum(row["moved_bytes"] for row in rows.values())
    program.run(2, progress=False)
    assert sum(stats.moved_bytes for stats in program.history.phases.values()) == before  # and then all of it fits
