"""The recipes with two levels in one adapted model: who owns which parameters, and a tiny run of each."""

import importlib
import json
import warnings

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import scalemlo as mlo
from scalemlo.recipes import RECIPES, bilevel_peft
from scalemlo.recipes.study.study import Cell
from scalemlo.runs import config as cfg
from tests.tiny_recipe import write_recipe

OWNED = {
    "bidora": ("magnitudes", "directions", {"lora_magnitude_vector"}),
    "bilora": ("values", "vectors", {"lora_E"}),
    "autolora": ("selection", "factors", {"lora_E"}),
}
OPTIONS = {
    "bidora": "train.retrain_steps=2 train.orthogonality=0.01",
    "bilora": "train.orthogonality=0.01",
    "autolora": "train.retrain_steps=2",
}
ARMS = {
    "bidora": ["DoRA", "DoRA, longer", "BiDoRA"],
    "bilora": ["LoRA", "LoRA, longer", "BiLoRA"],
    "autolora": ["LoRA", "LoRA, longer", "AutoLoRA"],
}
CONFIG = """\
output_dir: {folder}/{recipe}
recipe: {recipe}
model: {folder}/model
lora: {{r: 4, alpha: 8, target_modules: [q_proj, v_proj]}}
data: {{name: {folder}/data.jsonl, num_train: 64, num_heldout: 16, validation_fraction: 0.25, max_length: 16}}
train: {{steps: 2, unroll_steps: 2, longer_steps: 7, batch_size: 8}}
upper: {{learning_rate: 1.0e-2}}
lower: {{learning_rate: 1.0e-2}}
hypergradient: {{type: unrolled, num_steps: 1}}
num_seeds: 1
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("peft"))


def load(folder, recipe):
    path = folder / f"{recipe}.yaml"
    path.write_text(CONFIG.format(folder=folder, recipe=recipe))
    return cfg.load(path, OPTIONS[recipe].split(), {n: r.config for n, r in RECIPES.items()})


@pytest.mark.parametrize("recipe", OWNED)
def test_every_parameter_is_at_its_level_once(folder, recipe):
    program = RECIPES[recipe].build(load(folder, recipe))
    upper, lower, kinds = OWNED[recipe]
    names = {name: list(trainer.block.names) for name, trainer in program.trainers.items()}
    assert list(names) == [upper, lower]
    kinds_of = {level: {n.split(".")[-3 if n.endswith("weight") else -2] for n in names[level]} for level in names}
    assert kinds_of == {upper: kinds, lower: {"lora_A", "lora_B"}}
    assert len(names[upper]) == 4 and len(names[lower]) == 8  # 2 layers with q_proj and v_proj each
    module = program.trainers[lower].engine.module
    assert sorted(sum(names.values(), [])) == sorted(n for n, p in module.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("recipe", OWNED)
def test_tiny_run(folder, recipe):
    config = load(folder, recipe)
    assert RECIPES[recipe].run(config) is False
    result = json.loads((folder / recipe / "result.json").read_text())
    assert list(result["arms"]) == ARMS[recipe]
    assert all(np.isfinite(value) for value in result["arms"][ARMS[recipe][-1]]["held-out loss"])
    steps, retrain_steps = [costs[0]["outer_steps"] for costs in result["costs"].values()], config.train.retrain_steps
    *plain, longer, method = steps
    assert set(plain) == {2 * 2 + retrain_steps} and longer == 7 and method == 2 + retrain_steps
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        adapter = PeftModel.from_pretrained(base, folder / recipe / "adapter-0")
    assert type(adapter.peft_config["default"]).__name__ == "LoraConfig"  # what the papers' methods end as, DoRA too
    if recipe == "autolora":
        ranks = adapter.peft_config["default"].rank_pattern
        assert len(ranks) == 4 and all(1 <= rank <= 4 for rank in ranks.values())
        assert result["arms"]["AutoLoRA"]["mean rank"] == [sum(ranks.values()) / 4]


@pytest.mark.parametrize("recipe", OWNED)
def test_derivatives_of_a_tiny_program_agree(folder, recipe):
    """Second ways to the same derivatives; DoRA's magnitudes, AutoLoRA's and BiLoRA's gates."""
    report = mlo.check(RECIPES[recipe].build(load(folder, recipe)))
    assert report.passed, report.verdict
    own = [c for c in report.comparisons if c.is_configured]
    assert len(own) == 1 and own[0].size_ratio > 0


@pytest.mark.parametrize("recipe", OWNED)
def test_the_saved_adapter_is_the_model_that_was_scored(folder, recipe, tmp_path):
    """Its loss on the held-out examples is the arm's."""
    config = load(folder, recipe)
    config.output_dir = str(tmp_path)
    module = importlib.import_module(f"scalemlo.recipes.{recipe}")
    cell = Cell(config, ARMS[recipe][-1], 0)
    outcome = module.ARMS[cell.arm](cell)
    data = bilevel_peft.prepare(cell)
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    adapter = PeftModel.from_pretrained(base, tmp_path / "adapter-0").eval()
    batch = data.collate([data.heldout[i] for i in range(len(data.heldout))])
    with torch.no_grad():
        loss = float(data.task.losses(adapter, batch).mean())
    assert loss == pytest.approx(outcome.scores["held-out loss"], rel=1e-5)


def test_options_without_effect_are_refused(folder):
    path = folder / "wrong.yaml"
    for recipe, override, message in (
        ("bilora", "train.retrain_steps=3", "BiLoRA does not retrain"),
        ("autolora", "train.retrain_steps=0", "must be at least 1"),
        ("bidora", "train.retrain_steps=0", "directions are retrained"),
        ("bidora", "data.validation_fraction=1.5", "must be between 0 and 1"),
    ):
        path.write_text(CONFIG.format(folder=folder, recipe=recipe))
        with pytest.raises(cfg.ConfigError, match=message):
            cfg.load(path, [override], {n: r.config for n, r in RECIPES.items()})
