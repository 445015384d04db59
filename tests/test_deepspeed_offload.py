"""DeepSpeed with masters, or weights too, in host memory: nothing but where they lie changes."""

import gc
import importlib
from functools import partial

import pytest
import torch

import scalemlo as mlo
from tests.problems import full_tensors, relative_error
from tests.ranks import run_ranks
from tests.test_deepspeed import FORWARD, Methods, problem, product_errors, trained, trained_by_one_process

deepspeed = pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install 'scalemlo[deepspeed]'")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

OFFLOADED = [mlo.DeepSpeed(stage=stage, offload_optimizer=True, offload_parameters=stage == 3) for stage in (1, 2, 3)]


@pytest.fixture(scope="module", autouse=True)
def imported():
    """What DeepSpeed imports late, once for all ranks, which are forked."""
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")


def test_training_and_products_are_those_of_one_process():
    """And DeepSpeed does offload: its masters are the optimizer's parameters, apart from the weights."""
    kinds = (("mlp", 2),)

    def body(rank, world_size):
        gc.freeze()
        found = []
        for spec in OFFLOADED:
            program = problem("mlp").program(FORWARD, spec)
            engine = program.trainers["finetune"].engine
            optimizer = engine._partition._optimizer
            assert optimizer.offload_optimizer if spec.stage == 3 else optimizer.cpu_offload
            assert spec.stage < 3 or optimizer.offload_param
            masters = {m.untyped_storage().data_ptr() for m in engine._partition.masters}
            assert {p.to_local().untyped_storage().data_ptr() for p in engine.parameters.values()} <= masters
            computed = optimizer.bit16_groups_flat if spec.stage < 3 else optimizer.fp16_partitioned_groups_flat
            assert not masters & {t.untyped_storage().data_ptr() for t in computed}
            for v in (engine.shards_device, *(t.device for t in program.gradients()["finetune"].values())):
                assert torch.device(v).type == "cpu"
            [(losses, weights)] = trained(rank, world_size, spec, kinds, FORWARD)
            found.append((losses, weights, max(product_errors(rank, world_size, spec, ["mlp"]))))
        return found

    [(expected_losses, expected)] = trained_by_one_process(kinds, FORWARD)
    for by_stage in run_ranks(body, 2, timeout_seconds=300):
        for losses, weights, product_error in by_stage:
            assert losses == pytest.approx(expected_losses, rel=1e-5)
            assert relative_error(weights, expected) < 1e-5
            assert product_error < 1e-5


@pytest.mark.full
def test_bf16_accumulates_in_fp32_as_without_and_resumes(tmp_path):
    """Bit for bit what it is with everything on the device, in one go or in two."""

    def body(rank, world_size):
        gc.freeze()
        for spec in OFFLOADED:
            weights = []
            for offloads in (False, True):
                bf16 = mlo.DeepSpeed(
                    stage=spec.stage,
                    dtype="bf16",
                    offload_optimizer=offloads,
                    offload_parameters=offloads and spec.offload_parameters,
                )
                program = problem("mlp", accumulation=2).program(FORWARD, bf16)
                program.run(2, progress=False)
                program.save(tmp_path / f"{spec.stage}-{offloads}")
                program.run(2, progress=False)
                weights.append(program.trainers["finetune"].weights().clone())
            resumed = problem("mlp", accumulation=2).program(FORWARD, bf16)
            resumed.load(tmp_path / f"{spec.stage}-True")
            resumed.run(2, progress=False)
            weights.append(resumed.trainers["finetune"].weights())
            for other in weights[1:]:
                assert all(torch.equal(t, weights[0][n]) for n, t in other.items())

    run_ranks(body, 2, timeout_seconds=300)


def only(optimizer, data, spec):
    """A program of one level whose first parameter is reached by some micro-batches only."""

    class Sometimes(mlo.Level):
        def loss(self, batch):
            losses = self.module.example_losses(batch[:, 1:])
            return mlo.mean(losses if batch[0, 0] > 0 else self.module.linear_only(batch[:, 1:]).square().mean(1))

    class Net(Methods):
        def linear_only(self, x):
            return self.linear(x)

    torch.manual_seed(0)
    level = Sometimes("only", Net(), data=data, optimizer=optimizer, gradient_accumulation_steps=2)
    return mlo.Program([level], engine=spec)


def stepped(rank, world_size, optimizer, specs) -> list:
    gc.freeze()
    found = []
    for spec in specs:
        torch.manual_seed(1)
        data = [torch.randn(4, 6) for _ in range(8)]
        for i, batch in enumerate(data):  # the second micro-batch of a step misses the parameter, then the first
            batch[:, 0] = 1.0 if (i % 4) in (0, 3) else -1.0
        program = only(optimizer, data, spec)
        program.run(4, progress=False)
        trainer = program.trainers["only"]
        found.append(full_tensors(trainer, trainer.weights()))
    return found


def test_a_parameter_that_only_some_micro_batches_reach():
    adamw = partial(torch.optim.AdamW, lr=1e-2, eps=1e-3)
    [expected] = run_ranks(stepped, 1, adamw, [mlo.Single()])[0]
    for by_stage in run_ranks(stepped, 2, adamw, OFFLOADED):
        assert max(relative_error(weights, expected) for weights in by_stage) < 1e-5


@pytest.mark.full  # compiles DeepSpeed's kernel, for a minute
@pytest.mark.timeout(900)
def test_deepspeeds_own_adam_steps_on_the_host():
    def cpu_adam(parameters):
        return deepspeed.ops.adam.DeepSpeedCPUAdam(parameters, lr=1e-2, eps=1e-3, weight_decay=1e-2)

    adamw = partial(torch.optim.AdamW, lr=1e-2, eps=1e-3, weight_decay=1e-2)
    [expected] = run_ranks(stepped, 1, adamw, [mlo.Single()])[0]
    for by_stage in run_ranks(stepped, 1, cpu_adam, OFFLOADED, timeout_seconds=600):
        assert max(relative_error(weights, expected) for weights in by_stage) < 1e-5
