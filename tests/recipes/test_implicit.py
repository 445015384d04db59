"""Deep equilibrium and prompted segmentation: short runs of all arms, hypergradients against exact ones in fp64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from scalemlo.recipes import deep_equilibrium, prompted_segmentation
from scalemlo.recipes.study.restart import Repeated, Restart
from scalemlo.recipes.study.study import Cell
from scalemlo.runs import config as cfg
from tests.recipes.fast import run_fast

FAST = {
    "deep_equilibrium": (
        deep_equilibrium, "num_per_class=4", "num_states=8", "batch_size=10", "steps=4", "num_iterations=3",
        "num_test_iterations=5",
    ),
    "prompted_segmentation": (
        prompted_segmentation, "targets=[6,8]", "num_examples=4", "num_test=6", "num_pretraining=24", "batch_size=12",
        "pretraining_steps=3", "num_channels=4", "prompt_size=4", "steps=3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAST)
def test_all_arms_run(name):
    module, *overrides = FAST[name]
    result = run_fast(name, *overrides)
    assert list(result["arms"]) == list(module.ARMS)
    for scores in result["arms"].values():
        assert all(np.isfinite(value) for values in scores.values() for value in values)
        assert all(0 <= value <= 100 for value in next(iter(scores.values())))


# ---- deep equilibrium ------------------------------------------------------------------------------------------------
def _equilibrium(*, jacobian_free: bool):
    """A program in fp64 whose states are the fixed points, and its first batch."""
    config = deep_equilibrium.DeepEquilibriumConfig(
        recipe="deep_equilibrium", output_dir="", num_per_class=2, num_states=7, batch_size=6, num_iterations=1,
        hypergradient=cfg.ESTIMATOR_CONFIGS["conjugate_gradient"](max_steps=400, tolerance=1e-13),
    )  # fmt: skip
    torch.manual_seed(0)
    data = deep_equilibrium.training_data(config, 0)
    data.tensors = (data.tensors[0].double(), data.tensors[1])
    program = deep_equilibrium.two_levels(Cell(config, "", 0), data, jacobian_free=jacobian_free)
    layer = program.trainers["network"].engine.module
    _, x, labels = next(iter(deep_equilibrium.Batches(data, 6, 0)))
    states = program.trainers["states"].engine.module.values
    with torch.no_grad():
        layer.recurrent.mul_(20)  # some rows are scaled down to the contraction
        states.copy_(layer.iterated(x, 400))
    return program, layer, states, x, labels


@pytest.mark.parametrize("jacobian_free", [False, True])
def test_the_fixed_point_is_differentiated_exactly(fp64, jacobian_free):
    """``df/dtheta^T (I - J)^-T v`` with the dense Jacobian of every example; ``df/dtheta^T v`` where free of it."""
    program, layer, states, x, labels = _equilibrium(jacobian_free=jacobian_free)
    found = program.gradients()["network"]

    z = states.detach().requires_grad_()
    loss = F.cross_entropy(layer.logits(z), labels)
    v, *direct = torch.autograd.grad(loss, [z, *layer.readout.parameters()])
    solved = v.clone()
    if not jacobian_free:
        for i in range(len(x)):
            jacobian = torch.autograd.functional.jacobian(lambda s, i=i: layer(s, x[i : i + 1]), z[i : i + 1].detach())
            matrix = torch.eye(7) - jacobian[0, :, 0]
            solved[i] = torch.linalg.solve(matrix.T, v[i])
        assert (solved - v).norm() > 0.1 * v.norm()
    names = [name for name, _ in layer.named_parameters() if not name.startswith("readout")]
    parameters = dict(layer.named_parameters())
    implicit = torch.autograd.grad(layer(z, x), [parameters[name] for name in names], solved)
    for name, value in [*zip(names, implicit, strict=True), ("readout.weight", direct[0]), ("readout.bias", direct[1])]:
        torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-11)


def test_the_equilibrium_gradient_is_that_of_many_unrolled_iterations(fp64):
    program, layer, _, x, labels = _equilibrium(jacobian_free=False)
    found = program.gradients()["network"]
    loss = F.cross_entropy(layer.logits(layer.iterated(x, 300)), labels)
    for name, value in zip(found, torch.autograd.grad(loss, list(layer.parameters())), strict=True):
        torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-11)


def test_states_settle_at_the_fixed_point():
    """The lower steps of the configuration come within a fiftieth of it."""
    config = deep_equilibrium.DeepEquilibriumConfig(
        recipe="deep_equilibrium", output_dir="", num_per_class=5, num_states=16, batch_size=20
    )
    torch.manual_seed(0)
    data = deep_equilibrium.training_data(config, 0)
    program = deep_equilibrium.two_levels(Cell(config, "", 0), data, jacobian_free=False)
    layer = program.trainers["network"].engine.module
    _, x, _ = next(iter(deep_equilibrium.Batches(data, 20, 0)))
    fixed = layer.iterated(x, 200).detach()
    restart = Restart(program, "states")
    program.step()
    states = program.trainers["states"].weights()["values"]
    assert (states - fixed).norm() < 0.02 * fixed.norm()
    restart(program, {})
    assert not states.any()


def test_lower_steps_see_the_batch_of_the_upper_one():
    config = deep_equilibrium.DeepEquilibriumConfig(
        recipe="deep_equilibrium", output_dir="", num_per_class=3, batch_size=10
    )
    data = deep_equilibrium.training_data(config, 0)
    once = [labels for _ in range(2) for *_, labels in deep_equilibrium.Batches(data, 10, 5)]
    shuffled = deep_equilibrium.Batches(data, 10, 5)
    epochs = [labels for _ in range(2) for *_, labels in shuffled]
    again = Repeated(deep_equilibrium.Batches(data, 10, 5), 2)
    twice = [labels for _ in range(2) for *_, labels in again]
    assert all(torch.equal(a, b) for a, b in zip(epochs, twice[::2], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(epochs, twice[1::2], strict=True))
    assert torch.equal(torch.stack(once[:3]), torch.stack(epochs[:3])) and not torch.equal(epochs[0], epochs[3])


# ---- prompted segmentation -------------------------------------------------------------------------------------------
SEGMENTATION = prompted_segmentation.PromptedSegmentationConfig(
    recipe="prompted_segmentation", output_dir="", num_examples=4, num_channels=3, prompt_size=5,
    decoder=cfg.OptimizerConfig(type="sgd", learning_rate=0.3),
)  # fmt: skip


def test_the_prompt_is_differentiated_through_the_decoder_s_step(fp64):
    torch.manual_seed(0)
    cell = Cell(SEGMENTATION, "", 0)
    model = prompted_segmentation.Promptable(3, 5)
    images, masks, _ = prompted_segmentation.pictures([6], range(10), 4, 0.3, "train", torch.Generator().manual_seed(0))
    with torch.no_grad():
        data = *model.encoder(images.double()), masks.double()
    program = prompted_segmentation.two_levels(cell, model, data)
    prompt = program.trainers["prompt"].engine.module.embedding
    decoder = program.trainers["decoder"].engine.module
    found = program.gradients()["prompt"]["embedding"]

    w = dict(decoder.named_parameters())

    def loss(w, rows):
        fine, coarse, target = (part[rows] for part in data)
        return F.binary_cross_entropy_with_logits(
            torch.func.functional_call(decoder, w, (fine, coarse, prompt)), target
        )

    gradients = torch.autograd.grad(loss(w, slice(0, 2)), list(w.values()), create_graph=True)
    stepped = {name: p - 0.3 * g for (name, p), g in zip(w.items(), gradients, strict=True)}
    (expected,) = torch.autograd.grad(loss(stepped, slice(2, 4)), prompt)
    (direct,) = torch.autograd.grad(loss(w, slice(2, 4)), prompt)
    assert (expected - direct).norm() > 1e-3 * expected.norm()
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)


def test_masks_are_of_the_digit_that_is_asked_for():
    generator = torch.Generator().manual_seed(0)
    images, masks, digits = prompted_segmentation.pictures([7], range(10), 8, 0.0, "test", generator)
    assert (digits == 7).all()
    for image, mask in zip(images[:, 0], masks, strict=True):
        left = bool(mask[:, :8].any())
        assert left != bool(mask[:, 8:].any())  # in one half only
        half = slice(0, 8) if left else slice(8, 16)
        assert torch.equal(mask[:, half] > 0, image[:, half] > 0)
        assert (image > 0).sum() > mask.sum()  # another digit stands beside


def test_a_prompt_chooses_the_digit():
    """A short pretraining comes well above the Dice coefficient of the mask of everything that is bright."""
    cell = Cell(
        prompted_segmentation.PromptedSegmentationConfig(
            recipe="prompted_segmentation", output_dir="", pretraining_steps=150, num_pretraining=600,
            model=cfg.OptimizerConfig(learning_rate=1e-2),
        ), "", 0,
    )  # fmt: skip
    model = prompted_segmentation.pretrained(cell)
    images, masks, digits = prompted_segmentation.pictures(
        range(5), range(5), 100, 0.3, "test", torch.Generator().manual_seed(1)
    )
    with torch.no_grad():
        chosen = prompted_segmentation.dice(model(images, digits), masks)
        bright = prompted_segmentation.dice(images[:, 0], masks)
    assert chosen > bright + 5


def test_half_of_an_odd_number_of_pictures_is_refused():
    with pytest.raises(ValueError, match="num_examples=3 must be even"):
        prompted_segmentation.PromptedSegmentationConfig(recipe="prompted_segmentation", output_dir="", num_examples=3)
