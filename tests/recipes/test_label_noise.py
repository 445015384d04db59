"""Label noise: its wrong labels and hypergradients, and short runs of all arms."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

from scalemlo.recipes import CONFIGS, label_noise
from scalemlo.recipes.study.study import Cell
from scalemlo.runs import config as cfg
from tests.recipes.fast import CONFIGS as FOLDER
from tests.recipes.fast import run_fast


def configured(*overrides: str) -> label_noise.LabelNoiseConfig:
    """The recipe's configuration, changed."""
    return cfg.load(FOLDER / "label_noise.yaml", overrides, CONFIGS)


def test_all_arms_run():
    result = run_fast("label_noise", "num_train=200", "steps=10", "evaluate_every=5")
    assert list(result["arms"]) == list(label_noise.ARMS)
    for scores in result["arms"].values():
        assert 0 < scores["accuracy, %"][0] <= 100
    assert result["costs"]["the same, twice as long"][0]["outer_steps"] == 20


def test_wrong_labels_are_as_many_as_asked_for_and_of_all_other_classes():
    labels = torch.arange(1000) % 10
    given, is_right = label_noise.with_wrong_labels(labels, 0.4, torch.Generator().manual_seed(0))
    assert torch.equal(is_right, given == labels)
    assert int((~is_right).sum()) == 400
    shifts = torch.bincount((given - labels)[~is_right] % 10, minlength=10)
    assert shifts[0] == 0
    assert bool((shifts[1:] > 20).all())  # 44 expected


def test_parts_do_not_overlap():
    data = label_noise.split(configured(), 0)
    parts = [{x.numpy().tobytes() for x in part.tensors[0]} for part in (data.train, data.clean, data.validation)]
    assert not any(parts[i] & parts[j] for i, j in ((0, 1), (0, 2), (1, 2)))
    assert torch.equal(data.clean.tensors[1].bincount(), torch.full((10,), 10))


def test_the_table_finds_wrong_labels(tmp_path):
    config = configured("num_train=300", "steps=100", "table.learning_rate=0.3", f"output_dir={tmp_path}")
    torch.manual_seed(0)
    outcome = label_noise.weighted(Cell(config, "table of weights", 0), by_table=True)
    assert outcome.scores[label_noise.AUROC] > 0.7  # 0.5 at the start


@pytest.mark.parametrize("by_table", [True, False])
def test_the_hypergradient_is_that_of_plain_autograd(fp64, by_table):
    """T1-T2 on whole batches: ``-d/dtheta <grad_w L(w, theta), grad_w F(w)>``."""
    config = configured("num_train=60", "batch_size=100")
    torch.manual_seed(0)
    data = label_noise.split(config, 0)
    for name in ("train", "clean"):
        x, *rest = getattr(data, name).tensors
        setattr(data, name, TensorDataset(x.double(), *rest))
    program = label_noise.two_levels(Cell(config, "", 0), data, by_table=by_table)
    module, classifier = (program.trainers[name].engine.module for name in ("weights", "classifier"))
    found = program.gradients()["weights"]
    w, theta = list(classifier.parameters()), dict(module.named_parameters())
    x, y, index = data.train.tensors
    losses = F.cross_entropy(classifier(x), y, reduction="none")
    weights = theta["logits"].sigmoid()[index] if by_table else module.net(losses.detach().unsqueeze(1)).squeeze(1)
    lower = (weights * losses).sum() / weights.sum()
    v = torch.autograd.grad(F.cross_entropy(classifier(data.clean.tensors[0]), data.clean.tensors[1]), w)
    inner = sum((g * d).sum() for g, d in zip(torch.autograd.grad(lower, w, create_graph=True), v, strict=True))
    expected = torch.autograd.grad(-inner, list(theta.values()))
    assert sum(float(t.norm()) for t in expected) > 1e-6
    for name, value in zip(theta, expected, strict=True):
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-12)


def test_a_share_of_wrong_labels_outside_its_range_is_refused():
    with pytest.raises(cfg.ConfigError, match="wrong_share=1.5 must lie between 0 and 1"):
        configured("wrong_share=1.5")
