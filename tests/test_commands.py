"""Commands that need no model: validate, env, ls, cp, report, and the run.yaml that replays a run."""

import argparse
import json
import logging
import os
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from scalemlo.cli import COMMANDS
from scalemlo.cli.env import relevant_variables
from scalemlo.cli.main import main
from scalemlo.recipes import CONFIGS, RECIPES
from scalemlo.runs import config as cfg
from scalemlo.runs.packaged import packaged
from scalemlo.runs.provenance import Provenance
from scalemlo.runs.schema import as_text, described_arguments, schema_of
from tests.tiny_recipe import write_recipe

ROOT = Path(__file__).parent.parent
FILES = packaged("configs")
CONFIG = str(FILES["reweight_smollm2"])


@pytest.mark.parametrize("name", FILES)
def test_configurations_are_valid(name):
    cfg.load(FILES[name], [], CONFIGS)


@pytest.mark.parametrize("path", sorted((ROOT / "configs/schemas").glob("*.json")), ids=lambda path: path.stem)
def test_schemas_are_fresh_and_named_in_their_configurations(path):
    recipe = path.stem
    files = [file for file in FILES.values() if cfg.recipe_of(file, [], CONFIGS) == recipe]
    command = f"scalemlo validate {files[0]} --schema {path}"
    assert path.read_text() == as_text(schema_of(CONFIGS[recipe], recipe)), f"run: {command}"
    for file in files:
        assert f"# yaml-language-server: $schema=schemas/{recipe}.json\n" in file.read_text()


def test_validate_prints_what_would_run(capsys):
    changes = ["engine=zero3", "train.steps=7", "hypergradient.type=neumann"]
    assert main(["validate", CONFIG, *changes]) == 0
    found = OmegaConf.create(capsys.readouterr().out)
    assert found.engine.type == "deepspeed" and found.engine.stage == 3 and found.train.steps == 7
    assert found.hypergradient.num_terms == 10 and found.weights.momentum == 0.0


def test_validate_lists_every_problem(capsys):
    assert main(["validate", CONFIG, "train.stepz=1", "report_to=tensorbored", "data.num_meta=many"]) == 2
    out, error = capsys.readouterr()
    assert out == "" and "3 problem(s)" in error
    for words in ("train.stepz: unknown key. Did you mean 'steps'", "report_to:", "data.num_meta:"):
        assert words in error


def test_schema_describes_keys_and_knows_shorthands(capsys, tmp_path):
    assert main(["validate", CONFIG, "--schema", "-", "train.stepz=1"]) == 0  # whatever else is wrong with the file
    schema = json.loads(capsys.readouterr().out)
    assert schema["properties"]["seed"]["description"] == "Seeds data, initialisation, shuffling and dropout."
    for name, definition in schema["$defs"].items():
        assert definition["additionalProperties"] is False, name
    optimizer = schema["$defs"]["OptimizerConfig"]["properties"]
    assert optimizer["betas"]["description"] == "Decay rates of AdamW's moments."
    engine = schema["properties"]["engine"]["anyOf"]
    assert {"fsdp", "zero3"} <= set(engine[0]["enum"])
    assert any("zero3" in e.get("properties", {}).get("type", {}).get("enum", ()) for e in engine[1:])
    assert described_arguments(
        "A.\n\nArgs:\n    a: One\n        and ``two``.\n    b: :class:`X`.\n\nRaises:\n    c: No."
    ) == {
        "a": "One and two.",
        "b": "X.",
    }


def test_ls_and_cp(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["ls"]) == 0
    out = capsys.readouterr().out
    assert all(name in out and recipe.paper in out for name, recipe in RECIPES.items())
    assert all(name in out for name in FILES)
    assert main(["cp", "reweight_smollm2", "mine/run.yaml"]) == 0
    text = Path("mine/run.yaml").read_text()
    assert text.startswith("# scalemlo train mine/run.yaml")
    schema = text.partition("$schema=")[2].split()[0]
    assert os.path.isabs(schema) and Path(schema).is_file()
    assert main(["validate", "mine/run.yaml"]) == 0
    assert main(["cp", "reweight_smollm2", "mine/run.yaml"]) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["cp", "reweight_smollm2", "mine/run.yaml", "--force"]) == 0
    assert main(["cp", "reweight_smol"]) == 2
    assert "Did you mean 'reweight_smollm2'?" in capsys.readouterr().err


def test_env_shows_versions_and_hides_secrets(capsys, monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    for words in ("### Versions", "- torch: ", "distributed backends: ", "- NCCL_DEBUG: INFO", "### Stale build locks"):
        assert words in out
    assert "hf_secret" not in out and "- HF_TOKEN: (set, not shown)" in out
    assert relevant_variables({"HOME": "/", "WORLD_SIZE": "2"}) == {"WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    "words, message",
    [
        (["convert", "a", "b", "--base", "c"], "--base has no effect with --to full"),
        (
            ["plan", CONFIG, "--sweep", "world-size=2", "--json", "a", "--no-advice"],
            "--json, --no-advice has no effect",
        ),
        (["plan", CONFIG, "--sweep", "world-size=2", "--world-size", "4"], "--world-size has no effect with --sweep"),
    ],
)
def test_options_without_effect_are_refused(capsys, words, message):
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_a_sweep_plans_for_every_number_of_ranks(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "160")
    run = str(write_recipe(tmp_path) / "run.yaml")
    assert main(["plan", run, "train.unroll_steps=1", "--sweep", "world-size=1,4", "--device-memory", "1GiB"]) == 0
    rows = re.findall(r"^\W*([14]) .*iB.*yes", capsys.readouterr().out, re.M)
    assert rows == ["1", "4"]
    assert (tmp_path / "run" / "plan_sweep.png").read_bytes()[:4] == b"\x89PNG"
    assert main(["plan", run, "--sweep", "ranks=1"]) == 2
    assert "must look like world-size=8,16,32" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_what_every_argument_is(capsys, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    assert " ".join(COMMANDS[name].__doc__.split()) in out
    parser = argparse.ArgumentParser()
    COMMANDS[name].configure(parser)
    for action in parser._actions:
        assert action.help, f"{action.dest} is not explained"
        assert action.help in out


def test_report_of_no_run_is_one_line(capsys, tmp_path):
    assert main(["report", str(tmp_path)]) == 2
    assert "no run in it" in capsys.readouterr().err


def test_run_yaml_has_deepspeeds_configuration_as_it_was_and_replays(tmp_path):
    options = ["engine=deepspeed", "engine.config.zero_optimization.sub_group_size=7", "engine.stage=2"]
    options += ["engine.config.optimizer.params.betas=[0.9,0.999]", "report_to=none"]
    first = cfg.load(CONFIG, options, CONFIGS)
    cfg.save(first, tmp_path / "run.yaml")
    written = OmegaConf.to_container(OmegaConf.load(tmp_path / "run.yaml"))
    assert written["engine"]["config"] == {
        "zero_optimization": {"sub_group_size": 7},
        "optimizer": {"params": {"betas": [0.9, 0.999]}},
    }
    again = cfg.load(tmp_path / "run.yaml", [], CONFIGS)
    assert again.engine.build() == first.engine.build()
    assert cfg.plain(again) | {"provenance": None} == cfg.plain(first)


def test_run_yaml_says_where_it_came_from_and_a_replay_what_differs(tmp_path, caplog, monkeypatch):
    cfg.save(cfg.load(CONFIG, [], CONFIGS), tmp_path / "run.yaml")
    with caplog.at_level(logging.WARNING):
        found = cfg.load(tmp_path / "run.yaml", [], CONFIGS).provenance
    assert not caplog.records and isinstance(found, Provenance)
    assert found.world_size == 1 and found.versions["torch"] and found.command and found.date.endswith("+00:00")
    with caplog.at_level(logging.WARNING):
        monkeypatch.setenv("WORLD_SIZE", "4")
        cfg.load(tmp_path / "run.yaml", ["provenance.versions.torch=1.0.0"], CONFIGS)
    assert "torch: 1.0.0 then" in caplog.text and "processes: 1 then, 4 now" in caplog.text


def test_the_page_names_every_command():
    page = (ROOT / "docs/cli.md").read_text()
    for name in COMMANDS:
        assert f"| `{name}" in page, name


@pytest.mark.parametrize("key", ["train.batch_size", "train.gradient_accumulation_steps", "train.unroll_steps"])
def test_of_some_things_there_must_be_one(key):
    with pytest.raises(cfg.ConfigError, match=rf"{key}: must be at least 1 \(got 0\)"):
        cfg.load(CONFIG, [f"{key}=0"], CONFIGS)
