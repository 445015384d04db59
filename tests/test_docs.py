"""The code and configuration blocks of the documentation run, and its tables leave no estimator out."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn

import scalemlo as mlo
from scalemlo.derivatives.update_rules import UPDATE_RULES
from scalemlo.hypergradients import ESTIMATORS
from scalemlo.hypergradients.update_derivative import RULES
from scalemlo.runs.config import HypergradientConfig
from tests.test_closed_form import Vector

DOCS = Path(__file__).parent.parent / "docs"
SIZE = 5
SGD = partial(torch.optim.SGD, lr=0.1)


@pytest.fixture
def written(monkeypatch) -> dict[str, Any]:
    """What the blocks of the page define; what they register is taken back."""
    for rules in (RULES, UPDATE_RULES):
        monkeypatch.setitem(rules, torch.optim.Adadelta, None)
    monkeypatch.setitem(ESTIMATORS, "one_step", None)
    names: dict[str, Any] = {"__name__": "write_your_own"}
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / "write_your_own.md").read_text(), re.M | re.S)
    assert len(blocks) == 4
    for block in blocks:
        exec(block, names)
    return names


def hypergradient(estimator: mlo.Hypergradient, optimizer=SGD) -> torch.Tensor:
    """Of ``F = |w - t|^2 / 2`` through ``L = (w - A x)^T H (w - A x) / 2 + sum sin(w) x``."""
    generator = torch.Generator().manual_seed(2)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    a, t, h = draw(SIZE, SIZE), draw(SIZE), torch.diag(torch.linspace(2.0, 4.0, SIZE, dtype=torch.float64))

    class Lower(mlo.Level):
        def loss(self, upper):
            w, x = self.module(), upper()
            return (w - a @ x) @ h @ (w - a @ x) / 2 + (w.sin() * x.tanh()).sum()

    class Upper(mlo.Level):
        def loss(self, lower):
            return (lower() - t).square().sum() / 2

    lower = Lower("lower", Vector(draw(SIZE)), optimizer=optimizer, hypergradient=estimator)
    program = mlo.Program([Upper("upper", Vector(draw(SIZE)), optimizer=SGD), lower])
    before = lower.module.value.detach().clone()
    found = program.gradients()["upper"]["value"]
    assert torch.equal(lower.module.value.detach(), before)
    return found


def test_estimators_of_the_page_equal_those_they_are_written_like(written):
    close = partial(torch.testing.assert_close, rtol=1e-12, atol=0)
    close(hypergradient(written["OneStep"]()), 0.1 * hypergradient(mlo.Identity()))
    one_step = mlo.ConjugateGradient(max_steps=1, tolerance=None)
    close(hypergradient(written["SteepestDescent"](num_steps=1)), hypergradient(one_step))
    solved = hypergradient(mlo.ConjugateGradient(max_steps=20, tolerance=1e-14))
    for products in ("remat", "retain"):
        found = hypergradient(written["SteepestDescent"](num_steps=40, products=products))
        torch.testing.assert_close(found, solved, rtol=1e-8, atol=1e-12)
    found = hypergradient(written["DifferencedGradients"]())
    torch.testing.assert_close(found, hypergradient(mlo.Identity()), rtol=1e-7, atol=0)


def test_the_optimizer_of_the_page_is_that_of_torch(written):
    parameter = nn.Parameter(torch.randn(SIZE, dtype=torch.float64))
    optimizer = torch.optim.Adadelta([parameter], lr=0.5)
    state: dict[str, torch.Tensor] = {}
    for _ in range(3):
        weight, gradient = parameter.detach().clone(), torch.randn(SIZE, dtype=torch.float64, requires_grad=True)
        found = RULES[torch.optim.Adadelta](optimizer.param_groups[0], state, gradient.detach(), weight)
        state, moved = UPDATE_RULES[torch.optim.Adadelta](optimizer.param_groups[0], state, weight, gradient)
        (slope,) = torch.autograd.grad(-moved.sum(), gradient)
        torch.testing.assert_close(found, slope, rtol=1e-12, atol=1e-15)
        state = {key: t.detach() for key, t in state.items()}
        parameter.grad = gradient.detach()
        optimizer.step()
        torch.testing.assert_close(moved.detach(), parameter.detach(), rtol=1e-14, atol=1e-15)
    adadelta = partial(torch.optim.Adadelta, lr=0.5)
    for estimator in (mlo.Unrolled(), mlo.SAMA()):
        assert bool(hypergradient(estimator, adadelta).isfinite().all())


def test_the_migrated_example_runs():
    (block,) = re.findall(r"^```python\n(.*?)^```", (DOCS / "migrating_from_betty.md").read_text(), re.M | re.S)
    names: dict[str, Any] = {"__name__": "migrating_from_betty"}
    exec(block, names)
    assert len(names["history"].column("loss/inner")) == 20
    assert max(names["history"].column("gradient_norm/outer")) > 0


def test_tables_name_every_estimator():
    for page in ("estimators.md", "papers.md"):
        rows = re.findall(r"^\| `(\w+)` \|", (DOCS / page).read_text(), re.M)
        assert sorted(rows) == sorted(ESTIMATORS), page


def test_yaml_form():
    adapter = TypeAdapter(HypergradientConfig)
    assert adapter.validate_python({"type": "neumann", "num_terms": 5}).build() == mlo.Neumann(num_terms=5)
    assert "hypergradient: {type: neumann, num_terms: 5}" in (DOCS / "estimators.md").read_text()


def test_links_lead_somewhere():
    for page in DOCS.glob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
