"""Self-supervised recipes of two and three levels: hypergradients against autograd, and short runs of all arms."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import TensorDataset

import scalemlo as mlo
from scalemlo.recipes import bissl, masked_autoencoder, objective_weights
from scalemlo.recipes.models.text_objectives import PAD, TextEncoder
from scalemlo.recipes.models.vision_transformer import Encoder, MaskedAutoencoder, draw_order
from scalemlo.recipes.study.study import Cell
from scalemlo.runs import config as cfg
from tests.recipes.fast import run_fast

DIGITS = ("data=digits", "patch_size=2", "num_unlabelled=60", "num_labelled_per_class=4", "dim=8", "batch_size=20")
FAST = {
    "masked_autoencoder": (
        masked_autoencoder, *DIGITS, "steps=4", "unroll_steps=2", "longer_steps=5", "labels_steps=3",
    ),
    "bissl": (
        bissl, *DIGITS, "pretrain_steps=3", "outer_steps=2", "unroll_steps=2", "longer_steps=5", "finetune_steps=3",
    ),
    "objective_weights": (
        objective_weights, "num_unlabelled=60", "num_labelled=40", "num_words=100", "length=10", "dim=8", "steps=3",
        "finetune_steps=3", "batch_size=10",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAST)
def test_all_arms_run(name):
    module, *overrides = FAST[name]
    result = run_fast(name, *overrides)
    assert list(result["arms"]) == list(module.ARMS)
    for scores in result["arms"].values():
        assert all(0 < value < 100 for values in scores.values() for value in values)
    steps = {arm: cost[0]["outer_steps"] for arm, cost in result["costs"].items()}
    assert all(count > 0 for arm, count in steps.items() if arm != "untrained encoder")


@pytest.fixture
def plain_attention():
    """The kernel that autograd differentiates twice."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.fixture
def same_draws(monkeypatch):
    """Every draw is the same one for every example, so that a loss can be taken again outside of a program."""

    def sample(distribution):
        shape = distribution.mean.shape
        uniform = torch.rand(shape[1:], generator=torch.Generator().manual_seed(1)).expand(shape)
        if isinstance(distribution, torch.distributions.Bernoulli):
            return (uniform < distribution.probs).to(distribution.probs.dtype)
        return -(-uniform.log()).log()

    monkeypatch.setattr(mlo, "sample", sample)


def test_patches_are_drawn_first_as_often_as_their_weights_say():
    torch.manual_seed(0)
    weights = torch.tensor([0.6, 0.3, 0.1])
    order = draw_order(weights.log().expand(20_000, 3))
    assert (order.sort(1).values == torch.arange(3)).all()
    first = torch.bincount(order[:, 0]) / len(order)
    second = torch.bincount(order[order[:, 0] == 0, 1], minlength=3) / (order[:, 0] == 0).sum()
    torch.testing.assert_close(first, weights, atol=0.015, rtol=0)
    torch.testing.assert_close(second, torch.tensor([0, 0.75, 0.25]), atol=0.02, rtol=0)


def test_masked_pixels_are_hidden_from_the_autoencoder():
    """Errors of masked patches do not depend on what was in them, but through the target."""
    torch.manual_seed(0)
    module = MaskedAutoencoder(Encoder(8, 2, dim=8))
    images = torch.randn(3, 1, 8, 8)
    order = torch.arange(16).flip(0).expand(3, 16)
    patches = module.encoder.patches(images)
    assert torch.equal(patches[:, 5], images[:, 0, 2:4, 2:4].flatten(1))  # fifth: second row, second column
    drawn, target = [], images.clone()
    for masked in (torch.zeros(()), torch.ones(())):
        target[:, 0, 6:, 6:] = masked  # the last patch, which is masked
        errors = module(target, order, 12)
        drawn.append(errors[:, 1:])
        seen = module(torch.where(torch.arange(8)[None, None, :, None] < 2, 5.0, target), order, 12)
        assert not torch.allclose(seen[:, 1:], errors[:, 1:])  # the first row is visible
    assert torch.equal(*drawn)


def test_masking_moves_along_the_hypergradient(fp64, same_draws, plain_attention):
    """With the identity for both inverse Hessians, on whole batches, by autograd."""
    config = masked_autoencoder.MaskedAutoencoderConfig(
        recipe="masked_autoencoder", output_dir="", data="digits", patch_size=2, num_unlabelled=30,
        num_labelled_per_class=3, dim=8, depth=1, unroll_steps=1, batch_size=5000, hypergradient=IDENTITY(),
    )  # fmt: skip
    torch.manual_seed(0)
    data = doubled(masked_autoencoder.split(config, 0))
    program = masked_autoencoder.three_levels(Cell(config, "", 0), data)
    nets = {name: trainer.engine.module for name, trainer in program.trainers.items()}
    torch.nn.init.normal_(nets["masking"][3].weight, std=0.1)
    found = program.gradients()["masking"]

    encoder, probe, masking = (dict(nets[n].named_parameters()) for n in ("autoencoder", "probe", "masking"))
    module, linear = nets["autoencoder"], nets["probe"]

    def features(x):
        return module.features(x)

    def probe_loss(part):
        x, y = part.tensors
        return F.cross_entropy(linear(features(x)), y)

    upper = probe_loss(data.second)
    of_encoder = [p for n, p in encoder.items() if n.startswith("encoder.")]
    v = torch.autograd.grad(upper, [*of_encoder, *probe.values()])
    v_encoder, v_probe = v[: len(of_encoder)], v[len(of_encoder) :]
    slope = torch.autograd.grad(probe_loss(data.first), list(probe.values()), create_graph=True)
    through = torch.autograd.grad(dot(slope, v_probe), of_encoder)
    total = [a - b for a, b in zip(v_encoder, through, strict=True)]

    (images,) = data.unlabelled.tensors
    weights = nets["masking"](images)
    order = draw_order(weights.log())
    chosen = weights.gather(1, order[:, :12])
    lower = (chosen * module(images, order, 12)).sum() / chosen.sum()
    slope = torch.autograd.grad(lower, of_encoder, create_graph=True)
    expected = torch.autograd.grad(-dot(slope, total), list(masking.values()))
    assert all(e.norm() > 0 for e in expected)
    close(found, masking, expected)


def test_bissl_pulls_the_upper_backbone_by_the_slope_of_the_lower_one(fp64, same_draws):
    """With the identity for the inverse Hessian: ``lambda dL_D/dP + gamma dL_D/dD``."""
    config = bissl.BiSSLConfig(
        recipe="bissl", output_dir="", data="digits", patch_size=2, num_unlabelled=10, num_labelled_per_class=2, dim=8,
        depth=1, unroll_steps=1, batch_size=5000, coupling=0.3, upper_weight=0.2, hypergradient=IDENTITY(),
    )  # fmt: skip
    torch.manual_seed(0)
    data = doubled(bissl.split(config, 0))
    cell = Cell(config, "", 0)
    program = bissl.two_levels(cell, data, bissl.pretrained(cell, data, 0))
    pretext, downstream = (program.trainers[n].engine.module for n in ("pretext", "downstream"))
    with torch.no_grad():
        for p in pretext.parameters():
            p.add_(0.05 * torch.randn_like(p))  # away from D
    found = program.gradients()["downstream"]

    x, y = data.labelled.tensors
    names = [n for n, _ in downstream.encoder.named_parameters()]
    of_p, of_d = (list(m.encoder.parameters()) for m in (pretext, downstream))
    by_p = torch.autograd.grad(F.cross_entropy(downstream.head(pretext.features(x)), y), of_p)
    by_d = torch.autograd.grad(F.cross_entropy(downstream(x), y), of_d)
    for name, p, d in zip(names, by_p, by_d, strict=True):
        torch.testing.assert_close(found[f"encoder.{name}"], 0.3 * p + 0.2 * d, rtol=1e-9, atol=1e-13)


def test_objective_weights_move_along_the_hypergradient(fp64, same_draws):
    """With the identity for both inverse Hessians: ``-c d/dtheta sum_k p_k <dL_k/dW, dF/dV>``."""
    config = objective_weights.ObjectiveWeightsConfig(
        recipe="objective_weights", output_dir="", num_unlabelled=20, num_labelled=20, num_words=50, length=8, dim=8,
        batch_size=5000, proximity=0.7, hypergradient=IDENTITY(),
    )  # fmt: skip
    torch.manual_seed(0)
    data = objective_weights.split(config, 0)
    data.words = data.words.double()
    program = objective_weights.three_levels(Cell(config, "", 0), data)
    found = program.gradients()["weights"]["logits"]
    pretrainer, classifier = (program.trainers[n].engine.module for n in ("encoder", "classifier"))
    x, y = data.second.tensors
    of_v = [p for n, p in classifier.encoder.named_parameters() if n != "hidden"]
    v = torch.autograd.grad(F.cross_entropy(classifier(x), y), of_v)
    of_w = [p for n, p in pretrainer.encoder.named_parameters() if n != "hidden"]
    by_objective = pretrainer(data.unlabelled.tensors[0]).mean(0)
    slopes = torch.stack([
        dot(torch.autograd.grad(loss, of_w, retain_graph=True, materialize_grads=True), v) for loss in by_objective
    ])  # fmt: skip
    expected = -0.7 * (slopes - slopes.mean()) / 3  # softmax at equal weights
    assert expected.norm() > 1e-6
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)


def test_padding_makes_no_difference(fp64):
    torch.manual_seed(0)
    encoder = TextEncoder(torch.randn(20, 12), 6, 8, 2)
    short = torch.tensor([[3, 1, 2]])
    features = encoder.features(F.pad(short, (0, 3), value=PAD))
    torch.testing.assert_close(features, encoder.features(short), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(features, encoder.features(F.pad(short, (0, 3), value=4)))


IDENTITY = cfg.ESTIMATOR_CONFIGS["identity"]


def dot(a, b):
    return sum((x * y).sum() for x, y in zip(a, b, strict=True))


def close(found, names, expected):
    for name, value in zip(names, expected, strict=True):
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-12)


def doubled(data):
    """The parts of a split in fp64."""
    for name, part in vars(data).items():
        if isinstance(part, TensorDataset):
            setattr(data, name, TensorDataset(*(t.double() if t.is_floating_point() else t for t in part.tensors)))
    return data
