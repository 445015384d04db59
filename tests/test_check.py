"""`check` says right where it is right, wrong where something is wrong, and leaves no trace."""

import json
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import scalemlo as mlo
from scalemlo.loop.lower_level import LowerLevel
from scalemlo.reporting.tables import plot_check
from tests.problems import Problem, build_modules
from tests.ranks import run_ranks


def program(estimator=None, unroll_steps=3, dtype=torch.float64, spec=None, **changes) -> mlo.Program:
    finetune, rater = Problem(dtype=dtype).levels(*build_modules("mlp", dtype), estimator or mlo.SAMA())
    finetune.unroll_steps = unroll_steps
    for name, value in changes.items():
        setattr(finetune, name, value)
    return mlo.Program([rater, finetune], engine=spec or mlo.Single())


def findings(report) -> dict[str, bool]:
    return {f.what: f.passed for f in report.findings}


def test_everything_agrees_and_nothing_is_left_behind(tmp_path):
    checked, untouched = program(), program()
    for p in (checked, untouched):
        p.run(2, progress=False)
    lower = checked.trainers["finetune"]
    before = lower.state().copied(torch.device("cpu"))
    report = mlo.check(checked)
    assert report.passed, report.verdict
    assert "difference quotient" in " ".join(findings(report))
    after = lower.state()
    assert all(torch.equal(t, after.weights[n]) for n, t in before.weights.items())
    assert all(torch.equal(t, after.optimizer[n][k]) for n, s in before.optimizer.items() for k, t in s.items())
    assert lower.estimator == mlo.SAMA() and lower.num_steps == 6 and lower.memory.get("rater", {}) == {}
    own = next(c for c in report.comparisons if c.is_configured)
    assert own.estimator == "SAMA()" and 0.9 < own.cosine <= 1.0
    exact = next(c for c in report.comparisons if c.estimator == "Unrolled()")
    assert exact.cosine == pytest.approx(1.0) and exact.relative_error == 0.0 and exact.num_hvps == 3
    assert "SAMA() is close to the exact hypergradient" in report.verdict
    report.save(tmp_path / "check.json")
    assert json.loads((tmp_path / "check.json").read_text())["passed"] is True
    plot_check(tmp_path / "check.png", report)
    assert (tmp_path / "check.png").stat().st_size > 10_000


def test_one_step_of_sgd_is_what_the_identity_assumes():
    """With one SGD step below, v hardly moves in it, and the identity is right up to the learning rate."""
    report = mlo.check(program(mlo.Identity(), 1, optimizer=partial(torch.optim.SGD, lr=1e-4)), [mlo.SAMA()])
    own, sama = (next(c for c in report.comparisons if c.estimator == n) for n in ("Identity()", "SAMA()"))
    assert own.cosine > 0.9999 and own.size_ratio == pytest.approx(1e4, rel=1e-2)
    assert sama.cosine > 0.9999 and sama.size_ratio == pytest.approx(1.0, rel=1e-2)


def test_a_run_goes_on_as_if_it_had_not_been_checked_but_for_the_batches():
    checked, other = program(), program()
    mlo.check(checked, [mlo.Identity()])
    for trainer in other.trainers.values():  # takes the batches that the check took
        for _ in range(4 if trainer.name == "finetune" else 2):
            other.iteration.ticks.fetch([trainer])
    torch.testing.assert_close(
        checked.run(2, progress=False).column("loss/rater"), other.run(2, progress=False).column("loss/rater"),
        rtol=0, atol=0,
    )  # fmt: skip


@pytest.mark.parametrize("spec", [mlo.DDP(), mlo.FSDP()], ids=["ddp", "fsdp"])
def test_ranks_find_what_one_process_finds(spec):
    def body(rank, world_size):
        report = mlo.check(program(spec=spec), [mlo.Identity(), mlo.ConjugateGradient(max_steps=2, damping=1.0)])
        return report.passed, [(c.estimator, c.cosine, c.size_ratio) for c in report.comparisons]

    expected = mlo.check(program(), [mlo.Identity(), mlo.ConjugateGradient(max_steps=2, damping=1.0)]).comparisons
    for passed, rows in run_ranks(body, 2):
        assert passed
        assert [r[0] for r in rows] == [c.estimator for c in expected]
        for (_, cosine, ratio), c in zip(rows, expected, strict=True):
            assert cosine == pytest.approx(c.cosine, abs=1e-8) and ratio == pytest.approx(c.size_ratio, rel=1e-6)


# ---- what is wrong -----------------------------------------------------------------------------------------------
def test_a_wrong_derivative_is_found(monkeypatch):
    from scalemlo.loop.level_trainer import LevelTrainer

    original = LevelTrainer.compute_mixed

    def scaled(self, *args, **kwargs):
        return {n: x * 1.01 for n, x in original(self, *args, **kwargs).items()}

    monkeypatch.setattr(LevelTrainer, "compute_mixed", scaled)
    report = mlo.check(program(), [])
    assert not report.passed
    assert "mixed partial by rater: forward and reverse mode" in report.verdict
    assert report.verdict.startswith("NOT TO BE TRUSTED")


def test_a_wrong_unrolling_is_found(monkeypatch):
    original = mlo.Unrolled.pull_back
    monkeypatch.setattr(
        mlo.Unrolled,
        "pull_back",
        lambda self, v, problem: ({n: x * 1.01 for n, x in original(self, v, problem)[0].items()}, None),
    )
    monkeypatch.setattr("scalemlo.loop.gradients.TickGradients._note_solve", lambda self, lower, result: None)

    def pull_back(self, v, lower, level, uppers, fixed):
        return lower.estimator.pull_back(v, LowerLevel(lower, level, uppers, self.of))[0]

    monkeypatch.setattr("scalemlo.loop.gradients.TickGradients._pull_back", pull_back)
    report = mlo.check(program(), [])
    assert not findings(report)["exact hypergradient of rater: difference quotient"]


def test_a_hop_of_another_update_is_found(monkeypatch):
    from scalemlo.loop.level_trainer import LevelTrainer

    original = LevelTrainer.compute_mixed
    monkeypatch.setattr(LevelTrainer, "compute_mixed", lambda *args: {n: x * 1.5 for n, x in original(*args).items()})
    report = mlo.check(program(mlo.Identity(mixed="forward")), [])
    assert not findings(report)["whole gradient: hops move as live gradients do"]
    assert "rater: level 'finetune': the mixed partial with the levels above is not the derivative" in report.verdict


def test_a_lost_path_is_found(monkeypatch):
    from scalemlo.loop.gradients import TickGradients

    monkeypatch.setattr(TickGradients, "_sweep", lambda self, adjoints, level, fixed: None)
    report = mlo.check(program(mlo.Identity()), [])
    assert not findings(report)["whole gradient: no path is lost"]
    assert "rater: the response part of its gradient is 0.0e+00, but where its parameters move" in report.verdict


class Drifting(nn.Module):
    """Draws another number at each call that no seed reaches: live and skeleton passes disagree."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.generator = None

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * next(COUNTER)


COUNTER = iter(range(1, 10**6))


def test_a_module_that_is_no_function_of_its_weights_is_found():
    class Train(mlo.Level):
        def loss(self, batch, rater):
            losses = self.module(batch)[:, 0] ** 2
            return mlo.weighted_mean(losses, rater(batch).sigmoid()[:, 0])

    class Rate(mlo.Level):
        def loss(self, batch, train):
            return (train(batch) ** 2).mean()

    sgd = partial(torch.optim.SGD, lr=1e-6)
    data = [torch.randn(8, 4)]
    lower = Train("train", Drifting(), data=data, optimizer=sgd, hypergradient=mlo.Identity(mixed="forward"))
    report = mlo.check(mlo.Program([Rate("rater", nn.Linear(4, 1), data=data, optimizer=sgd), lower]), [])
    assert not findings(report)["gradient: engine and skeleton"]


def test_an_unknown_optimizer_leaves_the_second_ways():
    report = mlo.check(program(mlo.Identity(), 1, optimizer=partial(torch.optim.RMSprop, lr=1e-3)), [mlo.SAMA()])
    assert report.passed
    assert "no exact hypergradient to compare with" in report.verdict and "RMSprop" in report.verdict
    sama = next(c for c in report.comparisons if c.estimator == "SAMA()")
    assert "RMSprop" in sama.note


def test_levels_in_the_middle_have_no_exact_reference_and_say_so():
    class Vector(nn.Module):
        def __init__(self):
            super().__init__()
            self.value = nn.Parameter(torch.randn(3, dtype=torch.float64))

        def forward(self):
            return self.value

    class Top(mlo.Level):
        def loss(self, b, c):
            return (b() * c()).sum() + c().square().sum()

    class Middle(mlo.Level):
        def loss(self, a, c):
            return (self.module() - a()).square().sum() + (c() * self.module()).sum()

    class Low(mlo.Level):
        def loss(self, b):
            return (self.module() - b()).square().sum()

    sgd = partial(torch.optim.SGD, lr=0.1)
    kinds = {"a": Top, "b": Middle, "c": Low}
    levels = [kind(name, Vector(), optimizer=sgd) for name, kind in kinds.items()]
    report = mlo.check(mlo.Program(levels))
    assert report.passed, report.verdict
    assert "b: no exact hypergradient" in report.verdict
    assert {(c.upper, c.lower) for c in report.comparisons} == {("a", "b"), ("a", "c"), ("b", "c")}
