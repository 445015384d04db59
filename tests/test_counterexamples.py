"""The counterexamples are what docs/counterexamples.md says."""

import importlib.util
from pathlib import Path

import pytest

import scalemlo as mlo

PATH = Path(__file__).parent.parent / "benchmarks" / "counterexamples.py"


@pytest.fixture(scope="module")
def cases():
    spec = importlib.util.spec_from_file_location("counterexamples", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_one_step_estimators_differ_from_the_derivative_through_all_steps(cases):
    report = cases.many_steps()
    assert report.passed, report.verdict
    own = next(c for c in report.comparisons if c.is_configured)
    assert 0.5 < own.cosine < 0.95
    assert "is correlated with the exact hypergradient" in report.verdict


def test_a_middle_level_has_partial_second_derivatives(cases):
    program = cases.three_levels()
    assert program.gradients()["x"]["value"].item() == pytest.approx(0.8 + 1)  # the total derivative is 0.8 + 1/4
    report = mlo.check(program)
    assert report.passed, report.verdict  # also where the gradient of a level is exactly zero
    assert "y: no exact hypergradient to compare with" in report.verdict
