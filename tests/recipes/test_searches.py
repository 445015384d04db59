"""Recipes that search for examples, domains and architectures: short runs of all arms, hypergradients, structure."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from scalemlo.recipes import darts, datarater, domain_weights, long_tail, reward_domains, safe_selection
from scalemlo.recipes.study import study as comparison
from scalemlo.recipes.study.study import Cell
from scalemlo.runs import config as cfg
from tests.recipes.fast import CONFIGS, run_fast

FAST = {
    "long_tail": (
        long_tail, "data=digits", "num_largest=60", "imbalance=20", "num_meta_per_class=4",
        "num_validation_per_class=6", "steps=10", "batch_size=40", "evaluate_every=5",
    ),
    "darts": (darts, "num_per_class=6", "batch_size=20", "search_steps=6", "steps=6", "num_random=2"),
    "datarater": (
        datarater, "source=code", "num_train=200", "num_meta=40", "num_heldout=40", "steps=5", "length=32",
    ),
    "domain_weights": (
        domain_weights, "sources=[code,noise]", "target=[code]", "num_characters=20000", "length=32", "num_meta=20",
        "num_heldout=20", "search_steps=6", "steps=6", "longer_steps=8", "batch_size=16",
    ),
    "reward_domains": (
        reward_domains, "flips=[0.0,0.5]", "num_per_domain=100", "num_meta=50", "num_validation=50", "num_problems=20",
        "steps=10", "batch_size=20", "evaluate_every=5",
    ),
    "safe_selection": (
        safe_selection, "source=code", "before=noise", "length=48", "num_train=80", "num_meta=20", "num_heldout=20",
        "steps_before=5", "search_steps=5", "steps=5", "batch_size=16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAST)
def test_all_arms_run(name):
    module, *overrides = FAST[name]
    result = run_fast(name, *overrides)
    assert list(result["arms"]) == list(module.ARMS)
    for scores in result["arms"].values():
        assert any(value is not None for values in scores.values() for value in values)
        assert all(np.isfinite(value) for values in scores.values() for value in values if value is not None)
    assert all(cost[0]["outer_steps"] > 0 for cost in result["costs"].values())


def test_long_tail_moves_the_net_along_the_hypergradient(fp64):
    """T1-T2 on whole batches: ``-d/dtheta <grad_w L(w, theta), grad_w F(w)>``, by autograd."""
    config = long_tail.LongTailConfig(
        recipe="long_tail", output_dir="", data="digits", num_largest=40, imbalance=10, num_meta_per_class=3,
        num_validation_per_class=3,
    )  # fmt: skip
    torch.manual_seed(0)
    data = long_tail.split(config, 0)
    for part in (data.train, data.meta):
        part.tensors = (part.tensors[0].double(), part.tensors[1])
    config.batch_size = len(data.train)
    program = long_tail.two_levels(Cell(config, "", 0), data)
    net, classifier = (program.trainers[name].engine.module for name in ("weights", "classifier"))
    found = program.gradients()["weights"]
    w, theta = list(classifier.parameters()), dict(net.named_parameters())
    upper = F.cross_entropy(classifier(data.meta.tensors[0]), data.meta.tensors[1])
    losses = F.cross_entropy(classifier(data.train.tensors[0]), data.train.tensors[1], reduction="none")
    weights = net(losses.detach().unsqueeze(1)).squeeze(1)
    lower = (weights * losses).sum() / weights.sum()
    v = torch.autograd.grad(upper, w)
    inner = sum((g * x).sum() for g, x in zip(torch.autograd.grad(lower, w, create_graph=True), v, strict=True))
    expected = torch.autograd.grad(-inner, list(theta.values()))
    for name, value in zip(theta, expected, strict=True):
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-12)


def test_domain_weights_leave_noise():
    result = run_fast(
        "domain_weights", "sources=[code,noise]", "target=[code]", "num_characters=60000", "length=48", "num_meta=60",
        "num_heldout=40", "search_steps=40", "steps=5", "longer_steps=5",
    )  # fmt: skip
    for arm in ("DoGE", "ScaleBiO"):
        assert result["arms"][arm]["target's weight"][0] > 0.6  # 0.5 at the start, and the mean over the search


def test_comparison_goes_on_where_it_was_interrupted(tmp_path):
    """Cells that were found are kept; those of another configuration are refused."""
    module, *overrides = FAST["long_tail"]
    config = cfg.load(CONFIGS / "long_tail.yaml", [*overrides, f"output_dir={tmp_path}", "num_seeds=1"],
                      {"long_tail": module.LongTailConfig})  # fmt: skip
    runs = []
    arms = {
        name: (lambda cell, name=name, arm=arm: runs.append(name) or arm(cell)) for name, arm in module.ARMS.items()
    }

    def interrupted(cell):
        raise comparison.Interrupted

    first = dict(arms)
    last = list(arms)[-1]
    first[last] = interrupted
    assert comparison.Comparison(config, first).run() is True
    config.resume = True
    assert comparison.Comparison(config, arms).run() is False
    assert runs == list(arms)  # each once
    config.steps = 11
    with pytest.raises(ValueError, match="is of another configuration"):
        comparison.Comparison(config, arms).run()
