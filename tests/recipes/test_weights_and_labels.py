"""Group fairness, label correction and learning by ignoring: their hypergradients, and short runs of all arms."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

from scalemlo.cli import main as cli
from scalemlo.recipes import group_fairness, label_correction, learning_by_ignoring
from scalemlo.recipes.study.study import Cell
from scalemlo.runs import config as cfg
from tests.recipes.fast import run_fast

FAST = {
    "group_fairness": (
        "data=digits", "num_train=150", "num_meta_per_group=5", "num_validation_per_group=10", "steps=10",
        "evaluate_every=5",
    ),
    "label_correction": ("data=digits", "steps=10", "evaluate_every=5"),
    "learning_by_ignoring": ("steps=6", "evaluate_every=3"),
}  # fmt: skip
MODULES = {
    "group_fairness": group_fairness,
    "label_correction": label_correction,
    "learning_by_ignoring": learning_by_ignoring,
}


@pytest.mark.parametrize("name", FAST)
def test_all_arms_run(name):
    result = run_fast(name, *FAST[name])
    assert list(result["arms"]) == list(MODULES[name].ARMS)
    for scores in result["arms"].values():
        for values in scores.values():
            assert all(value is None or 0 <= value <= 100 for value in values)


def test_the_upper_loss_of_group_fairness_has_the_gradient_of_the_smooth_maximum(fp64):
    level = group_fairness.Weigh("weights", torch.nn.Linear(1, 1), data=[0], optimizer=torch.optim.SGD)
    level.temperature = 0.3
    classifier = torch.nn.Linear(3, 2)
    x, y, groups = torch.randn(9, 3), torch.randint(2, (9,)), torch.tensor([0, 0, 0, 1, 1, 3, 3, 3, 3])
    found = torch.autograd.grad(level.loss((x, y, groups), classifier), list(classifier.parameters()))
    losses = F.cross_entropy(classifier(x), y, reduction="none")
    means = torch.stack([losses[groups == g].mean() for g in (0, 1, 3)])
    expected = torch.autograd.grad(0.3 * (means / 0.3).logsumexp(0), list(classifier.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_weights_move_towards_the_group_that_does_worse(fp64):
    """With a classifier that goes by the mark, the groups whose mark is on the other side need more weight."""
    config = group_fairness.GroupFairnessConfig(
        recipe="group_fairness", output_dir="", data="digits", num_train=150, num_meta_per_group=5,
        num_validation_per_group=5, batch_size=150,
    )  # fmt: skip
    torch.manual_seed(0)
    data = doubled(group_fairness.split(config, 0))
    program = group_fairness.two_levels(Cell(config, "", 0), data)
    for _ in range(40):
        trainer = program.trainers["classifier"]
        trainer.fetch(0)
        trainer.step(trainer.compute_gradient([trainer]).gradients["classifier"] * 1.0)
    gradient = program.gradients()["weights"]["logits"]
    x, y, groups = data.meta.tensors
    with program.inference("classifier") as classifier:
        losses = F.cross_entropy(classifier(x), y, reduction="none")
    worst = int(torch.stack([losses[groups == g].mean() for g in range(4)]).argmax())
    assert gradient[worst] < 0


def test_the_hypergradient_through_two_nets_is_that_of_plain_autograd(fp64):
    """With the identity for both inverse Hessians: d/dtheta of -c <grad_W L(W, theta), grad_V F(V)>."""
    config = learning_by_ignoring.LearningByIgnoringConfig(
        recipe="learning_by_ignoring", output_dir="", proximity=0.7, batch_size=5000
    )
    torch.manual_seed(0)
    data = doubled(learning_by_ignoring.split(config, 0))
    program = learning_by_ignoring.three_levels(Cell(config, "", 0), data)
    found = program.gradients()["ignore"]["weight"].squeeze(1)

    nets = {n: dict(program.trainers[n].engine.module.named_parameters()) for n in ("pretrained", "finetuned")}
    module = learning_by_ignoring.Net(config.hidden)
    x, y = data.meta.tensors
    v, w = nets["finetuned"], nets["pretrained"]
    upper = F.cross_entropy(torch.func.functional_call(module, v, (x,)), y)
    direction = torch.autograd.grad(upper, list(v.values()))
    theta = torch.zeros(len(data.domain), requires_grad=True)
    x, y, rows = data.source.tensors
    losses = F.cross_entropy(torch.func.functional_call(module, w, (x,)), y, reduction="none")
    weights = theta.sigmoid()[rows]
    gradients = torch.autograd.grad((weights * losses).sum() / weights.sum(), list(w.values()), create_graph=True)
    product = -config.proximity * sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
    (expected,) = torch.autograd.grad(product, theta)
    assert expected.norm() > 0
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)


def test_the_corrector_is_differentiated_through_training(fp64):
    """It begins with trust, and its gradient is the derivative of the upper loss after a step that depends on it."""
    config = label_correction.LabelCorrectionConfig(
        recipe="label_correction", output_dir="", data="digits", batch_size=5000, corrector_size=0, clean_weight=0.6,
        classifier=cfg.OptimizerConfig(type="sgd", learning_rate=0.4),
        hypergradient=cfg.ESTIMATOR_CONFIGS["unrolled"](),
    )  # fmt: skip
    torch.manual_seed(0)
    data = doubled(label_correction.split(config, 0))
    program = label_correction.two_levels(Cell(config, "", 0), data, with_clean=True)
    x, weak = data.weak.tensors
    with program.inference("corrector") as corrector:
        assert torch.equal(corrector(x, weak).argmax(1), weak)
    found = program.gradients()["corrector"]["transition"]

    clean_x, clean_y = data.clean.tensors
    weight = torch.zeros(10, 64, requires_grad=True)
    bias = torch.zeros(10, requires_grad=True)
    transition = (config.trust * torch.eye(10)).requires_grad_()
    log_p = F.linear(x, weight, bias).log_softmax(1)
    lower = -(transition[weak].softmax(1) * log_p).sum(1).mean()
    lower = lower + 0.6 * F.cross_entropy(F.linear(clean_x, weight, bias), clean_y)
    by_weight, by_bias = torch.autograd.grad(lower, (weight, bias), create_graph=True)
    logits = F.linear(clean_x, weight - 0.4 * by_weight, bias - 0.4 * by_bias)
    (expected,) = torch.autograd.grad(F.cross_entropy(logits, clean_y), transition)
    assert expected.norm() > 1e-6
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)


def doubled(data):
    """The parts of a split in fp64."""
    for name, part in vars(data).items():
        if isinstance(part, TensorDataset):
            x, *rest = part.tensors
            setattr(data, name, TensorDataset(x.double(), *rest))
    return data


def test_settings_that_make_no_sense_are_named(capsys):
    path = str(Path(__file__).parents[2] / "configs" / "long_tail.yaml")
    for override, said in {
        "imbalance=-3": "imbalance=-3 must be at least 1 and below 2 * num_largest=4000",
        "imbalance=4000": "imbalance=4000 must be at least 1 and below 2 * num_largest=4000",
        "classifier.lr_scheduler_type=liner": "lr_scheduler_type='liner' is unknown",
        "classifier.lr_scheduler_type=reduce_lr_on_plateau": "is unknown",
    }.items():
        assert cli.main(["validate", path, override]) == 2
        assert said in capsys.readouterr().err
