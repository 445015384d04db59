"""The DeepSpeed engine: training, hypergradients and second-order products are those of one process."""

import gc
import importlib
import sys
from functools import cache, partial

import pytest
import torch
from torch import Tensor, nn

import scalemlo as mlo
from scalemlo.derivatives.hessian import hessian
from tests.cases import CASES
from tests.problems import Problem, Snapshot, build_modules, full_tensors, relative_error
from tests.ranks import run_ranks
from tests.test_hessian import direction, reference
from tests.test_parity import measured

pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install 'scalemlo[deepspeed]'")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

ADAMW = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-3)
DRAWN = {"nystrom", "forward gradient", "zeroth order"}  # whose draws depend on the padding of stages 1 and 2
FORWARD = mlo.Identity(mixed="forward")


@pytest.fixture(scope="module", autouse=True)
def imported():
    """What DeepSpeed imports late, once for all ranks, which are forked."""
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")


def problem(kind: str, accumulation: int = 1) -> Problem:
    return Problem(kind=kind, dtype=torch.float32, lower_optimizer=ADAMW, normalize=False, accumulation=accumulation)


def trained(rank, world_size, spec, kinds, hypergradient) -> list[tuple[list[float], dict[str, Tensor]]]:
    """Losses of four outer iterations and the weights after them."""
    gc.freeze()  # DeepSpeed collects garbage for every engine
    found = []
    for kind, accumulation in kinds:
        program = problem(kind, accumulation).program(hypergradient, spec)
        history = program.run(4, progress=False)
        weights = {}
        for name, trainer in program.trainers.items():
            weights |= {f"{name}/{n}": t for n, t in full_tensors(trainer, trainer.weights()).items()}
        found.append(([r[f"loss/{n}"] for r in history.steps for n in program.trainers], weights))
    return found


@cache
def trained_by_one_process(kinds, hypergradient):
    return run_ranks(trained, 1, mlo.Single(), kinds, hypergradient)[0]


@pytest.mark.parametrize(
    ("stage", "world_size", "kinds", "hypergradient"),
    [
        (3, 1, (("mlp", 2),), FORWARD),
        (3, 2, (("gpt2_tied", 2), ("llama_lora", 1)), FORWARD),
        (3, 2, (("mlp", 2),), mlo.Identity()),  # ghost products
        (2, 2, (("mlp", 2),), FORWARD),
        (1, 2, (("mlp", 2),), FORWARD),
    ],
)
def test_training_is_that_of_one_process(stage, world_size, kinds, hypergradient):
    expected = trained_by_one_process(kinds, hypergradient)
    for by_rank in run_ranks(trained, world_size, mlo.DeepSpeed(stage=stage), kinds, hypergradient):
        for (losses, weights), (expected_losses, expected_weights) in zip(by_rank, expected, strict=True):
            assert losses == pytest.approx(expected_losses, rel=1e-5)
            assert relative_error(weights, {n: expected_weights[n] for n in weights}) < 1e-5


def product_errors(rank, world_size, spec, kinds) -> list[float]:
    gc.freeze()
    found = []
    for kind in kinds:
        case = problem(kind, accumulation=2)
        program = case.program(FORWARD, spec)
        program.run(2, progress=False)
        state = Snapshot.of(program)
        lower = program.trainers["finetune"]
        before = lower.weights().clone()
        program.gradients()
        assert all(torch.equal(before[n], t) for n, t in lower.weights().items())
        shapes = {n: p.shape for n, p in build_modules(kind, torch.float32)[0].named_parameters()}
        full = direction((n, shapes[n]) for n in lower.block.names)
        v = mlo.Shards({n: t.float() for n, t in lower.engine.shard(full).items()}, lower.engine.group)
        expected, _ = reference(case, state)
        for products in ("remat", "retain"):
            with hessian(lower.loss_at(), lower.block, products) as operator:
                for _ in range(2):
                    product = operator(v)
            found.append(relative_error(full_tensors(lower, product), expected))
        assert all(torch.equal(before[n], t) for n, t in lower.weights().items())
    return found


@pytest.mark.parametrize(
    ("stage", "world_size", "kinds"),
    [(3, 1, ["mlp"]), (3, 2, ["gpt2_tied", "llama_lora"]), (2, 2, ["mlp"]), (1, 2, ["mlp"])],
)
def test_products_equal_double_backward(stage, world_size, kinds):
    for by_rank in run_ranks(product_errors, world_size, mlo.DeepSpeed(stage=stage), kinds):
        assert max(by_rank) < 1e-5, by_rank


@cache
def exact(name: str, kind: str) -> dict[str, Tensor]:
    return measured(name, mlo.Single(), kind, torch.float64)


def hypergradients(rank, world_size, spec, kind, names) -> dict[str, dict[str, Tensor]]:
    gc.freeze()
    return {n: measured(n, spec, kind, torch.float32) for n in names}


@pytest.mark.parametrize(("stage", "names"), [(3, ["sama", "unrolled"]), (2, ["sama"])])
def test_estimators_are_those_of_one_process_in_fp64(stage, names):
    for by_case in run_ranks(hypergradients, 2, mlo.DeepSpeed(stage=stage), "mlp", names):
        errors = {n: relative_error(found, exact(n, "mlp")) for n, found in by_case.items()}
        assert max(errors.values()) < 1e-5, errors


@pytest.mark.full
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_estimator(stage):
    names = [n for n in CASES if stage == 3 or n not in DRAWN]
    for by_case in run_ranks(hypergradients, 2, mlo.DeepSpeed(stage=stage), "mlp", names):
        errors = {n: relative_error(found, exact(n, "mlp")) / CASES[n].rounding for n, found in by_case.items()}
        assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_points_the_same_way(stage):
    names = ["identity, forward", "neumann"] if stage == 3 else ["identity, forward"]
    for by_case in run_ranks(hypergradients, 2, mlo.DeepSpeed(stage=stage, dtype="bf16"), "llama", names):
        for name, found in by_case.items():
            a, b = (torch.cat([t[n].double().flatten() for n in found]) for t in (found, exact(name, "llama")))
            assert torch.cosine_similarity(a, b, dim=0) > 0.99, name


def test_weights_are_partitioned_and_state_dicts_are_whole():
    """Odd sizes, so that the last rank holds fewer entries; the state dict loads into the plain module."""

    def body(rank, world_size, stage):
        gc.freeze()
        program = problem("mlp").program(FORWARD, mlo.DeepSpeed(stage=stage))
        program.run(1, progress=False)
        engine = program.trainers["finetune"].engine
        module = engine.module
        if stage == 3:
            assert all(p.numel() == 0 for p in module.parameters()), "a parameter stayed gathered"
        held = sum(t.numel() for t in program.trainers["finetune"].weights().values())
        return held, program.state_dict("finetune")

    lower = build_modules("mlp", torch.float32)[0]
    total = sum(p.numel() for p in lower.parameters())
    for stage in (1, 3):
        (held, state), (other, empty) = run_ranks(body, 2, stage)
        assert total <= held + other < 1.05 * total
        assert not empty
        lower.load_state_dict(state)


class Methods(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.5]))
        self.linear = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale

    def example_losses(self, x: Tensor) -> Tensor:
        return self(x).square().mean(1)


def test_methods_and_parameters_that_a_micro_batch_does_not_reach():
    class Sometimes(mlo.Level):
        def loss(self, batch):
            losses = self.module.example_losses(batch[:, 1:])
            return mlo.mean(losses if batch[0, 0] > 0 else losses.detach() + self.module(batch[:, 1:]).sum(1))

    def body(rank, world_size, spec):
        torch.manual_seed(0)
        data = [torch.randn(4, 6) for _ in range(6)]
        level = Sometimes(
            "only", Methods(), data=data, optimizer=ADAMW, gradient_accumulation_steps=2, max_grad_norm=0.1
        )
        program = mlo.Program([level], engine=spec)
        program.run(3, progress=False)
        trainer = program.trainers["only"]
        return full_tensors(trainer, trainer.weights())

    expected = run_ranks(body, 1, mlo.Single())[0]

    def all_stages(rank, world_size):
        gc.freeze()
        return [body(rank, world_size, mlo.DeepSpeed(stage=stage)) for stage in (1, 2, 3)]

    for by_stage in run_ranks(all_stages, 1):
        for weights in by_stage:
            assert relative_error(weights, expected) < 1e-5


def test_a_module_that_is_not_fp32_is_refused():
    class Only(mlo.Level):
        def loss(self, batch):
            return self.module(batch).sum()

    level = Only("only", nn.Linear(2, 2).double(), data=[torch.zeros(1, 2)], optimizer=ADAMW)
    with pytest.raises(ValueError, match="fp32 masters"):
        mlo.Program([level], engine=mlo.DeepSpeed())


def test_without_the_package_the_error_says_what_to_install():
    def body(rank, world_size):
        sys.modules["deepspeed"] = None
        with pytest.raises(ValueError, match=r"pip install 'scalemlo\[deepspeed\]'"):
            problem("mlp").program(FORWARD, mlo.DeepSpeed())

    run_ranks(body, 1)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_resumed_run_goes_on_bit_for_bit(stage, tmp_path):
    def body(rank, world_size):
        gc.freeze()
        spec = mlo.DeepSpeed(stage=stage)
        whole = problem("mlp").program(FORWARD, spec)
        whole.run(2, progress=False)
        whole.save(tmp_path)
        whole.run(2, progress=False)
        resumed = problem("mlp").program(FORWARD, spec)
        resumed.load(tmp_path)
        resumed.run(2, progress=False)
        for name in whole.trainers:
            expected, found = whole.trainers[name].weights(), resumed.trainers[name].weights()
            assert all(torch.equal(expected[n], found[n]) for n in expected)
        assert whole.history.steps[-1]["loss/finetune"] == resumed.history.steps[-1]["loss/finetune"]

    run_ranks(body, 2)


def test_weights_of_submodules_in_a_method_are_refused_at_stage_3():
    """They are there in their own modules' forward passes alone; in a method they would count for nothing."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = torch.nn.Linear(3, 4), torch.nn.Linear(4, 1)

        def forward(self, x):
            return self.head(self.body(x).tanh()).squeeze(-1)

        def size(self):
            return sum(p.square().sum() for p in self.parameters())

    class Fit(mlo.Level):
        def loss(self, batch):
            return mlo.mean(self.module(batch).square()) + 0.1 * self.module.size()

    def body(rank, world_size):
        sgd = partial(torch.optim.SGD, lr=0.1)
        program = mlo.Program(
            [Fit("fit", Net(), data=[torch.ones(4, 3)], optimizer=sgd)], engine=mlo.DeepSpeed(stage=3)
        )
        with pytest.raises(ValueError, match="'fit': a method of its module uses weights of submodules.*stage=2"):
            program.step()
        return True

    assert run_ranks(body, 2) == [True, True]
