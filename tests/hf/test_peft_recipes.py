"""The recipes with two levels in one adapted model: who owns which parameters, and a tiny run of each."""

import json
import warnings

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from scalemlo import config as cfg
from scalemlo.recipes import RECIPES
from tests.tiny_recipe import write_recipe

OWNED = {
    "bidora": ("magnitudes", "directions", {"lora_magnitude_vector"}),
    "bilora": ("values", "vectors", {"lora_E"}),
    "autolora": ("selection", "factors", {"lora_E"}),
}
OPTIONS = {
    "bidora": "train.retrain_steps=2 train.orthogonality=0.01 baseline=dora",
    "bilora": "train.orthogonality=0.01 baseline=none",
    "autolora": "train.retrain_steps=2 baseline=lora",
}
CONFIG = """\
output_dir: {folder}/{recipe}
recipe: {recipe}
model: {folder}/model
lora: {{r: 4, alpha: 8, target_modules: [q_proj, v_proj]}}
data: {{name: {folder}/data.jsonl, num_train: 64, num_heldout: 16, validation_fraction: 0.25, max_length: 16}}
train: {{steps: 2, unroll_steps: 2, batch_size: 8}}
upper: {{learning_rate: 1.0e-2}}
lower: {{learning_rate: 1.0e-2}}
hypergradient: {{type: unrolled, num_steps: 1}}
plan: false
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
    summary = json.loads((folder / recipe / "summary.json").read_text())
    plain, retrained = {"lora": ["plain lora"], "dora": ["plain dora"], "none": []}[config.baseline], ["retrained"]
    assert list(summary["rows"]) == ["two levels", *(retrained if config.train.retrain_steps else []), *plain]
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        adapter = PeftModel.from_pretrained(base, folder / recipe / "adapter")
    assert type(adapter.peft_config["default"]).__name__ == "LoraConfig"  # what the papers' methods end as, DoRA too
    if recipe == "autolora":
        assert set(adapter.peft_config["default"].rank_pattern) == set(summary["ranks"])
        assert all(1 <= rank <= 4 for rank in summary["ranks"].values())


def test_options_without_effect_are_refused(folder):
    path = folder / "wrong.yaml"
    for recipe, override, message in (
        ("bilora", "train.retrain_steps=3", "BiLoRA does not retrain"),
        ("autolora", "train.retrain_steps=0", "must be at least 1"),
        ("bidora", "data.validation_fraction=1.5", "must be between 0 and 1"),
    ):
        path.write_text(CONFIG.format(folder=folder, recipe=recipe))
        with pytest.raises(cfg.ConfigError, match=message):
            cfg.load(path, [override], {n: r.config for n, r in RECIPES.items()})
