"""The trainer on two ranks follows the one on one, on every engine; resumed there, it is bit for bit the whole run."""

import pytest
import torch

from tests.hf.trainer_runs import losses_of, trainer, weights_of
from tests.ranks import run_ranks

TOLERANCE = dict(rtol=1e-5, atol=1e-5)
OPTIONS = dict(unroll_steps=2, eval_strategy="steps", eval_steps=4, hypergradient="sama", per_device_eval_batch_size=2)
PLAIN = dict(per_device_train_batch_size=4)
ACCUMULATED = dict(per_device_train_batch_size=1, gradient_accumulation_steps=4, per_device_meta_batch_size=4)


def run_of(folder, engine, **options):
    trained = trainer(folder, engine=engine, **(OPTIONS | options))
    trained.train()
    return trained, (losses_of(trained), weights_of(trained), trained.example_weights())


def on_ranks(rank, world_size, folder, engines, resume):
    found = {}
    for engine in engines:
        for name, options in {"plain": PLAIN, "accumulated": ACCUMULATED}.items():
            if engine != engines[0] and name == "plain":
                continue
            trained, found[engine, name] = run_of(f"{folder}/{engine}-{name}", engine, **options)
            logits = trained.predict([{"prompt": f"a{i} be", "completion": " a1"} for i in range(5)]).predictions
            assert logits.shape[0] == 5
            kept = trained.filtered_dataset(50)
            assert len(kept) == 13
        if engine in resume:
            save = dict(save_strategy="steps", save_steps=2, logging_steps=3, **PLAIN)
            _, whole = run_of(f"{folder}/{engine}-whole", engine, **save)
            parted = trainer(f"{folder}/{engine}-whole", engine=engine, **(OPTIONS | save))
            parted.train(resume_from_checkpoint=f"{folder}/{engine}-whole/checkpoint-2")
            assert losses_of(parted) == whole[0]
            assert all(torch.equal(value, whole[1][name]) for name, value in weights_of(parted).items())
    return found if rank == 0 else None


def check(folder, engines, resume=()):
    _, expected = run_of(folder / "one", "auto", per_device_train_batch_size=8)
    found = run_ranks(on_ranks, 2, str(folder), engines, resume, timeout_seconds=280)[0]
    for case, (losses, weights, table) in found.items():
        for ours, theirs in zip(losses, expected[0], strict=True):
            ours, theirs = ([x for x in values if x is not None] for values in (ours, theirs))
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5), case
        for name, value in expected[1].items():
            torch.testing.assert_close(weights[name], value, **TOLERANCE, msg=lambda m, n=name, c=case: f"{c} {n}: {m}")
        torch.testing.assert_close(torch.tensor(table), torch.tensor(expected[2]), **TOLERANCE)


def test_two_ranks_follow_one_on_ddp_and_fsdp(tmp_path):
    check(tmp_path, ["ddp", "fsdp"], resume=["fsdp"])


@pytest.mark.full
def test_two_ranks_follow_one_on_zero3(tmp_path):
    pytest.importorskip("deepspeed")
    check(tmp_path, ["zero3"], resume=["zero3"])


@pytest.mark.full
def test_ddp_resumes_bit_for_bit(tmp_path):
    check(tmp_path, ["ddp"], resume=["ddp"])
