"""Checkpoints and live programs as files for `from_pretrained`: the same weights, the same logits, little memory."""

import gc
import json
from functools import partial

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import scalemlo as mlo
from scalemlo.checkpoint import weight_files
from scalemlo.checkpoint.export import to_full
from scalemlo.cli.main import main
from scalemlo.hf.models.export import to_hf
from scalemlo.hf.models.saving import save_pretrained
from tests.problems import gpt2_tied, llama, mlp, token_batch
from tests.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
MODELS = {"llama": llama, "gpt2_tied": gpt2_tied}
ENGINES = {"single": mlo.Single(), "ddp": mlo.DDP(), "fsdp": mlo.FSDP()} | {
    f"zero{stage}": mlo.DeepSpeed(stage=stage) for stage in (2, 3)
}


class Lower(mlo.Level):
    def loss(self, batch):
        out = self.module(input_ids=batch["input_ids"])
        return mlo.mean(getattr(out, "logits", out).float().square().flatten(1).mean(1))


def adapter(base, **options):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    return get_peft_model(base, config)


def trained(module, engine="single"):
    level = Lower("lower", module, data=[token_batch(0)], optimizer=partial(torch.optim.SGD, lr=0.1))
    program = mlo.Program([level], engine=ENGINES[engine])
    program.run(2, progress=False)
    return program


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=token_batch(5)["input_ids"]).logits


def reference(program, make):
    """Logits of a plain copy of the live model; rank 0 alone gets them. Collective."""
    state = program.state_dict("lower")
    if not state:
        return None
    model = make()
    model.load_state_dict(state)
    return logits(model)


def seeded(make):
    torch.manual_seed(3)
    return make()


def exported(rank, world_size, engines, folder):
    gc.freeze()
    for engine in engines:
        for kind, make in MODELS.items():
            program = trained(seeded(make), engine)
            expected = reference(program, make)
            save_pretrained(program, "lower", folder / "live", max_shard_bytes=4000)
            program.save(folder / engine / kind)
            if rank == 0:
                assert len(list((folder / "live").glob("model-*.safetensors"))) > 2
                seeded(make).save_pretrained(folder / "base")
                to_hf(folder / engine / kind, folder / "converted", base=str(folder / "base"), max_shard_bytes=4000)
                for name in ("live", "converted"):
                    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder / name)), expected), engine
        program = trained(adapter(seeded(llama)), engine)
        expected = reference(program, lambda: adapter(llama()))
        save_pretrained(program, "lower", folder / "adapter")
        program.save(folder / engine / "adapter")
        if rank == 0:
            to_hf(folder / engine / "adapter", folder / "converted adapter")
            for name in ("adapter", "converted adapter"):
                assert torch.equal(logits(PeftModel.from_pretrained(seeded(llama), folder / name)), expected), engine


@pytest.mark.parametrize("engines, world_size", [(["single"], 1), (["fsdp", "zero3"], 2)])
def test_logits_are_those_of_the_live_model(engines, world_size, tmp_path):
    if "zero3" in engines:
        pytest.importorskip("deepspeed")
    run_ranks(exported, world_size, engines, tmp_path, init_process_group=world_size > 1, timeout_seconds=400)


@pytest.mark.full
def test_logits_on_the_other_engines(tmp_path):
    pytest.importorskip("deepspeed")
    run_ranks(exported, 2, ["ddp", "zero2"], tmp_path, timeout_seconds=400)


class Held(weight_files.WeightFiles):
    """Counts the bytes of one file's tensors."""

    peak = 0

    def add(self, name, tensor):
        super().add(name, tensor)
        Held.peak = max(Held.peak, self._held_bytes)


def test_only_one_file_is_held(tmp_path, monkeypatch):
    module = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(12)))

    class Sum(mlo.Level):
        def loss(self):
            return self.module(torch.ones(2, 64)).sum()

    program = mlo.Program([Sum("sum", module, optimizer=partial(torch.optim.SGD, lr=1e-3))])
    program.run(1, progress=False)
    program.save(tmp_path)
    size = module[0].weight.nbytes
    monkeypatch.setattr("scalemlo.checkpoint.export.WeightFiles", Held)
    to_full(tmp_path, tmp_path / "full", max_shard_bytes=2 * size)
    assert Held.peak == 2 * size
    index = json.loads((tmp_path / "full/sum.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 12 * size and len(set(index["weight_map"].values())) == 6
    for name, p in module.named_parameters():
        with safe_open(tmp_path / "full" / index["weight_map"][name], "pt") as f:
            assert torch.equal(f.get_tensor(name), p)
    assert main(["convert", str(tmp_path), str(tmp_path / "full")]) == 0  # files of the first are removed
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["sum.safetensors"]
    assert load_file(tmp_path / "full/sum.safetensors").keys() == dict(module.named_parameters()).keys()


def test_refusals(tmp_path):
    trained(llama()).save(tmp_path)
    with pytest.raises(ValueError, match="level 'lower' of .* is no adapter: give base"):
        to_hf(tmp_path, tmp_path / "out")
    gpt2_tied().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="is not what level 'lower' began with: it has no"):
        to_hf(tmp_path, tmp_path / "out", base=str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"level='upper': .* has the levels \['lower'\]"):
        to_hf(tmp_path, tmp_path / "out", level="upper")


def test_of_a_plain_module_the_weights_are_saved(tmp_path):
    program = trained(mlp())
    save_pretrained(program, "lower", tmp_path)
    saved, live = load_file(tmp_path / "model.safetensors"), program.state_dict("lower")
    assert saved.keys() == live.keys() and all(torch.equal(t, live[name]) for name, t in saved.items())
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
