"""Ghost products equal the reference where they apply, and give way to the forward derivative where they do not."""

import gc
import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

import scalemlo as mlo
from scalemlo.autodiff.layer_products import is_affine, obstacle, product
from scalemlo.derivatives.ghost import GhostProducts
from tests.problems import (
    LOWER_MODULES,
    Dropped,
    Finetune,
    Problem,
    Rate,
    build_modules,
    errors,
    example_losses,
    token_batch,
)
from tests.ranks import run_ranks

GHOST, FORWARD = mlo.Identity(mixed="ghost"), mlo.Identity(mixed="forward")
ENGINES = {"single-1": (mlo.Single, 1), "ddp-2": (mlo.DDP, 2), "fsdp-2": (mlo.FSDP, 2)}
sgd = partial(torch.optim.SGD, lr=0.1)


# ---- one layer -----------------------------------------------------------------------------------------------------
class AddsOneRMSNorm(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x):
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (1 + self.weight)


class Curved(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(4))
        self.register_buffer("shift", torch.ones(4))

    def forward(self, x):
        return torch.sin(self.scale * x + self.shift)


def floats(*shape: int) -> Tensor:
    return torch.randn(3, *shape, dtype=torch.float64)


LAYERS = {
    "linear, narrow": (lambda: nn.Linear(4, 2), lambda: floats(5, 4)),
    "linear, wide": (lambda: nn.Linear(2, 7), lambda: floats(5, 2)),
    "linear without bias": (lambda: nn.Linear(2, 7, bias=False), lambda: floats(2)),
    "Conv1D of transformers": (lambda: Conv1D(6, 4), lambda: floats(5, 4)),
    "Conv1D of transformers, narrow": (lambda: Conv1D(2, 4), lambda: floats(5, 4)),
    "embedding": (lambda: nn.Embedding(9, 4, padding_idx=2), lambda: torch.randint(0, 9, (3, 6))),
    "layer norm": (lambda: nn.LayerNorm(4), lambda: floats(5, 4)),
    "rms norm": (lambda: nn.RMSNorm(4), lambda: floats(5, 4)),
    "rms norm of transformers": (lambda: LlamaRMSNorm(4), lambda: floats(5, 4)),
    "rms norm that adds one": (lambda: AddsOneRMSNorm(4), lambda: floats(5, 4)),
    "group norm": (lambda: nn.GroupNorm(2, 4), lambda: floats(4, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, groups=2), lambda: floats(4, 7)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 3, stride=2), lambda: floats(2, 7, 7)),
    "transposed conv2d": (lambda: nn.ConvTranspose2d(2, 3, 3), lambda: floats(2, 4, 4)),
    "anything else": (Curved, lambda: floats(5, 4)),
}


FROZEN = [
    (c, f) for c in LAYERS for f in ("nothing", "weight", "bias") if f in ("nothing", *LAYERS[c][0]()._parameters)
]


@pytest.mark.parametrize(("case", "frozen"), FROZEN)
def test_part_of_one_layer(case, frozen):
    """Against the gradient of each example alone."""
    torch.manual_seed(1)
    make, data = LAYERS[case]
    module, x = make().double(), data()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p))
    v = {n: torch.randn_like(p) for n, p in module.named_parameters() if n != frozen}
    if not v:
        return  # nothing left to move
    output = module(x)
    delta = torch.randn_like(output)
    expected = []
    for i in range(3):
        gradients = torch.autograd.grad(module(x[i : i + 1]), [module.get_parameter(n) for n in v], delta[i : i + 1])
        expected.append(sum((g * v[n]).sum() for n, g in zip(v, gradients, strict=True)))
    weights = {} if is_affine(module) else {n: p.detach() for n, p in module.named_parameters()}
    found = product(module, v, x, delta, weights=weights, buffers=dict(module.named_buffers()))
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-12)


def test_layers_known_to_have_none():
    assert "submodules" in obstacle(nn.MultiheadAttention(4, 2))
    assert "max_norm" in obstacle(nn.Embedding(3, 2, max_norm=1.0))
    assert obstacle(nn.Embedding(3, 2)) is None


# ---- whole problems ------------------------------------------------------------------------------------------------
def in_own_dtype(self, x):
    """LlamaRMSNorm without its casts: they round gradients and tangents to fp32 at different places."""
    return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


@pytest.mark.parametrize("engine", ENGINES)
def test_products_equal_the_reference(engine):
    spec, world_size = ENGINES[engine]
    exact = [Problem(kind=kind, accumulation=a) for kind in LOWER_MODULES for a in (1, 4)]
    single = [
        Problem(kind=kind, dtype=torch.float32, normalize=False, accumulation=a)
        for kind in LOWER_MODULES
        for a in (1, 4)
    ]

    def body(rank, world_size):
        found = [errors(rank, world_size, single, GHOST, False, spec())]
        LlamaRMSNorm.forward = in_own_dtype  # in this process, which ends here
        return found + [errors(rank, world_size, exact, GHOST, False, spec())]

    for in_fp32, in_fp64 in run_ranks(body, world_size):
        assert max(in_fp32) < 1e-5, in_fp32
        assert max(in_fp64) < 1e-10, in_fp64


def history_and_weights(program: mlo.Program, steps: int) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    rows = program.run(steps, progress=False).steps
    return rows, {n: t.clone() for trainer in program.trainers.values() for n, t in trainer.weights().items()}


def assert_same_run(found, expected, name: str = "finetune", ghost: float | list[float] = 1.0):
    """The same losses, norms and weights; products were used where ``ghost`` says so."""
    (rows, weights), (expected_rows, expected_weights) = found, expected
    used = [row.pop(f"ghost/{name}") for row in rows]
    assert used == (ghost if isinstance(ghost, list) else [ghost] * len(rows))
    for row, expected_row in zip(rows, expected_rows, strict=True):
        assert row == pytest.approx(expected_row, rel=1e-9, abs=1e-12)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_run_is_that_of_the_forward_derivative(engine):
    """By default, over several steps and micro-batches: the lower gradient comes out of the same pass."""
    spec, world_size = ENGINES[engine]

    def body(rank, world_size):
        problems = [Problem(kind="mlp", accumulation=2), Problem(kind="gpt2_tied")]
        for problem in problems:
            runs = [history_and_weights(problem.program(h, spec()), 4) for h in (mlo.Identity(), FORWARD)]
            assert_same_run(*runs)

    run_ranks(body, world_size)


def test_masks_are_those_of_the_step():
    def run(hypergradient):
        lower, upper = build_modules("mlp", torch.float64)
        finetune = Finetune("finetune", Dropped(lower), data=[token_batch(i) for i in range(4)], optimizer=sgd,
                            hypergradient=hypergradient, gradient_accumulation_steps=2)  # fmt: skip
        rate = Rate("rater", upper, data=[token_batch(9)], optimizer=sgd)
        return history_and_weights(mlo.Program([rate, finetune]), 3)

    assert_same_run(run(mlo.Identity()), run(FORWARD))


def test_bf16_agrees_with_its_forward_derivative():
    measured = Problem(kind="llama", dtype=torch.float32, normalize=False).hypergradient(
        GHOST, mlo.Single(dtype="bf16")
    )
    problem = Problem(kind="llama", dtype=torch.float32, normalize=False)
    expected = problem.reference(measured.state, adaptive=False)
    a, b = (torch.cat([t[n].double().flatten() for n in expected]) for t in (measured.gradient, expected))
    assert torch.cosine_similarity(a, b, dim=0) > 0.99


def test_vectors_are_gathered_unit_by_unit():
    """Beside what a plain lower gradient gathers: one all-gather per block and two for the root."""

    def body(rank, world_size):
        program = Problem(kind="llama", dtype=torch.float32).program(mlo.Identity(), mlo.FSDP())
        program.run(1, progress=False)  # the comparison lies behind
        gathers, is_inside = [], [False]
        all_gather, vectors = dist.all_gather_into_tensor, GhostProducts._vectors

        def counted(*args, **kwargs):
            gathers.append(is_inside[0])
            return all_gather(*args, **kwargs)

        def of_vectors(self, unit):
            is_inside[0] = True
            found = vectors(self, unit)
            is_inside[0] = False
            return found

        dist.all_gather_into_tensor, GhostProducts._vectors = counted, of_vectors  # in this process, which ends here
        assert program.step()["ghost/finetune"] == 1.0
        return sum(gathers)

    num_blocks = 2
    assert run_ranks(body, 2) == [num_blocks + 2] * 2


def test_the_graph_is_freed():
    """Taps in the graph refer to the collector; a reference back would keep every step's graph alive."""
    program = Problem(kind="mlp").program(GHOST, mlo.Single())
    gc.collect()
    gc.disable()
    try:
        sizes = []
        for _ in range(4):
            program.step()
            sizes.append(sum(1 for o in gc.get_objects() if isinstance(o, torch.Tensor)))
    finally:
        gc.enable()
    assert sizes[-1] <= sizes[1], sizes


def test_a_level_between_keeps_its_whole_gradient():
    """Its gradient goes through the level below it too: the pass that gives products has a part of it only."""

    class Middle(mlo.Level):
        def loss(self, batch, rater, low):
            losses = (low(self.module(batch)) - batch).square().mean(1)
            return mlo.weighted_mean(losses, rater(losses.detach()[:, None])[:, 0])

    class Low(mlo.Level):
        def loss(self, batch, middle):
            return (self.module(middle(batch)) - batch).square().mean()

    class Top(mlo.Level):
        def loss(self, batch, middle):
            return middle(batch).square().mean()

    def run(hypergradient):
        torch.manual_seed(2)
        options = dict(data=[torch.randn(4, 3).double()], optimizer=sgd)
        levels = [
            Top("rater", nn.Sequential(nn.Linear(1, 1), nn.Sigmoid()).double(), **options),
            Middle("middle", nn.Linear(3, 3).double(), hypergradient=hypergradient, **options),
            Low("low", nn.Linear(3, 3).double(), hypergradient=FORWARD, **options),
        ]
        return history_and_weights(mlo.Program(levels), 2)

    expected = run(FORWARD)
    assert_same_run((run(mlo.Identity())[0], {}), (expected[0], {}), "middle", 0.0)
    assert_same_run(run(GHOST), expected, "middle")


# ---- where they do not apply ---------------------------------------------------------------------------------------
class Train(mlo.Level):
    weigh = staticmethod(lambda losses, rater, batch: torch.sigmoid(rater(losses.detach()[:, None])[:, 0]))
    finish = staticmethod(lambda loss, rater: loss)

    def loss(self, batch, rater):
        losses = F.cross_entropy(self.module(batch[0]), batch[1], reduction="none")
        return self.finish(mlo.weighted_mean(losses, self.weigh(losses, rater, batch)), rater)


class RateClasses(mlo.Level):
    def loss(self, batch, train):
        return F.cross_entropy(train(batch[0]), batch[1])


def classifier(make=lambda: nn.Linear(5, 3), hypergradient=GHOST, num_batches=1, **attributes) -> mlo.Program:
    torch.manual_seed(0)
    data = [(torch.randn(8, 5).double(), torch.randint(0, 3, (8,))) for _ in range(num_batches)]
    train = Train("train", make().double(), data=data, optimizer=sgd, hypergradient=hypergradient)
    for name, value in attributes.items():
        setattr(train, name, value)
    return mlo.Program([RateClasses("rater", nn.Linear(1, 1).double(), data=data[:1], optimizer=sgd), train])


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class Direct(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, x):
        return x @ self.linear.weight.T + self.linear.bias


def attached(losses, rater, batch):
    return torch.sigmoid(rater(losses[:, None])[:, 0])


def one_is_zero(losses, rater, batch):
    return Train.weigh(losses, rater, batch) * (torch.arange(8) > 0)


REFUSED = {
    "a factor": (dict(finish=lambda loss, rater: 2 * loss), "nothing added and no factor"),
    "a regulariser": (dict(finish=lambda loss, rater: loss + rater(torch.ones(1, 1).double()).sum()), "nothing added"),
    "weights of attached losses": (dict(weigh=attached), "detach what the weights are computed from"),
    "a weight of zero": (dict(weigh=one_is_zero), "exactly 0"),
    "weights used directly": (dict(make=Direct), "linear.weight.*not called"),
    "batch normalisation": (
        dict(make=lambda: nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))),
        "'1' makes losses of one example depend on others",
    ),
    "losses that mix examples": (dict(make=lambda: mixing()), r"mixes examples \(mean\)"),
    "rows that are no examples": (
        dict(make=lambda: nn.Sequential(Halved(), nn.Linear(5, 3), Joined())),
        "see 16 in the first dimension of the output of '1', not the 8 examples",
    ),
}  # fmt: skip


class Halved(nn.Module):
    def forward(self, x):
        return torch.cat([x, 2 * x])


class Joined(nn.Module):
    def forward(self, x):
        return x[: len(x) // 2] + x[len(x) // 2 :].tanh()


@pytest.mark.parametrize("case", REFUSED)
def test_asked_for_they_are_refused_by_name(case):
    options, message = REFUSED[case]
    with pytest.raises(mlo.DerivativeError, match=message):
        classifier(**options).step()


@pytest.mark.parametrize("case", REFUSED)
def test_by_default_the_forward_derivative_is_taken_silently(case):
    options, _ = REFUSED[case]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = history_and_weights(classifier(hypergradient=mlo.Identity(), **options), 3)
    assert_same_run(found, history_and_weights(classifier(hypergradient=FORWARD, **options), 3), "train", 0.0)


def test_a_plain_classifier_is_fine():
    def make():
        return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.ReLU(inplace=True), nn.Linear(7, 3))

    found = history_and_weights(classifier(make, mlo.Identity()), 3)
    assert_same_run(found, history_and_weights(classifier(make, FORWARD), 3), "train")


def mixing() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), Centred(), nn.Tanh(), nn.Linear(7, 3))


class Twice(nn.Module):
    """Uses a weight in its layer and past it, as no tap sees."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 7, bias=False), nn.Linear(7, 3)

    def forward(self, x):
        z = self.first(x).tanh()
        return self.last(z + 0.1 * (z @ self.first.weight @ self.first.weight.T))


def test_products_that_are_wrong_are_found_out():
    with pytest.raises(mlo.DerivativeError, match="differ from those of single examples' gradients"):
        classifier(Twice).step()
    with pytest.warns(UserWarning, match="single examples' gradients.*is used from here on") as caught:
        found = history_and_weights(classifier(Twice, mlo.Identity()), 3)
    assert len([w for w in caught if "ghost" in str(w.message)]) == 1
    assert_same_run(found, history_and_weights(classifier(Twice, FORWARD), 3), "train", 0.0)


class SometimesMixed(nn.Module):
    """Mixup from the second batch on."""

    def __init__(self, mix):
        super().__init__()
        self.first, self.last, self.mix, self.num_calls = nn.Linear(5, 7), nn.Linear(7, 3), mix, 0

    def forward(self, x):
        z = self.first(x).tanh()
        if self.training:
            self.num_calls += 1
            z = 0.6 * z + 0.4 * self.mix(z) if self.num_calls > 2 else z  # a step calls it for both levels
        return self.last(z)


MIXES = {
    "flip": lambda z: z.flip(0),
    "roll": lambda z: z.roll(1, 0),
    "a permutation": lambda z: z[torch.arange(len(z)).flip(0)],
    "index_select": lambda z: z.index_select(0, torch.arange(len(z)).flip(0)),
    "the batch's mean": lambda z: z.mean(0),
    "attention between examples": lambda z: (z @ z.T).softmax(-1) @ z,
    "seen by its examples alone": lambda z: torch.einsum("bi,cj->bcij", z, z).sum((1, 2)),
}


@pytest.mark.parametrize("how", MIXES)
def test_examples_that_are_mixed_from_the_second_batch_on(how):
    """Every graph with operations that were not there before is looked at again."""

    def make():
        return SometimesMixed(MIXES[how])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = history_and_weights(classifier(make, mlo.Identity()), 3)
    assert_same_run(found, history_and_weights(classifier(make, FORWARD), 3), "train", [1.0, 0.0, 0.0])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_batch_with_a_weight_of_zero_falls_back_alone(engine):
    """On all ranks together, also where only one of them has such a weight."""
    spec, world_size = ENGINES[engine]

    class SomeZero(Finetune):
        def loss(self, batch, rater):
            losses = example_losses(self.module, batch)
            weights = rater(losses.detach().unsqueeze(-1)).squeeze(-1)
            is_marked = batch["input_ids"][:, 0] == 36
            return mlo.weighted_mean(losses, torch.where(is_marked, torch.zeros_like(weights), weights))

    def body(rank, world_size):
        def run(hypergradient):
            lower, upper = build_modules("mlp", torch.float64)
            data = [token_batch(i) for i in range(4)]
            for batch in data:
                batch["input_ids"][:, 0] = 1
            data[1]["input_ids"][0, 0] = data[3]["input_ids"][0, 0] = 36  # a row of the first rank
            finetune = SomeZero("finetune", lower, data=data, optimizer=sgd, hypergradient=hypergradient,
                                gradient_accumulation_steps=2)  # fmt: skip
            rate = Rate("rater", upper, data=[token_batch(9)], optimizer=sgd)
            return history_and_weights(mlo.Program([rate, finetune], engine=spec()), 2)

        assert_same_run(run(mlo.Identity()), run(FORWARD), "finetune", 0.0)

    run_ranks(body, world_size)


def test_sama_needs_the_gradient_first():
    with pytest.raises(ValueError, match="SAMA needs that gradient first"):
        mlo.SAMA(mixed="ghost")
    assert not any(key.startswith("ghost") for key in Problem(kind="mlp").program(mlo.SAMA(), mlo.Single()).step())


def test_a_run_says_once_why_there_are_no_products(caplog):
    torch.manual_seed(0)
    weights, model = nn.Linear(3, 1), nn.Linear(3, 1)
    data = [(torch.randn(4, 3), torch.randn(4, 1))]

    def fit(batch, weights, model):
        losses = (model(batch[0]) - batch[1]).square()
        return mlo.mean((weights(batch[0]).sigmoid() * losses).squeeze(-1))

    def validate(batch, model):
        return mlo.mean((model(batch[0]) - batch[1]).square().squeeze(-1))

    sgd = partial(torch.optim.SGD, lr=0.1)
    program = mlo.Program(
        [
            mlo.Level("weights", weights, loss=validate, data=data, optimizer=sgd),
            mlo.Level("model", model, loss=fit, data=data, optimizer=sgd),
        ]
    )
    program.run(3, progress=False)
    said = [record.getMessage() for record in caplog.records if "take the forward derivative" in record.getMessage()]
    assert len(said) == 1 and said[0].startswith("level 'model'") and "weighted_mean" in said[0]
