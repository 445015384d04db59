"""The examples run: on a few steps, and without a network on made data."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from scalemlo.recipes.data import reviews
from tests.tiny_recipe import write_recipe

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load(name):
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


def test_quickstart_learns_which_labels_are_right(load):
    found = load("quickstart").main(steps=60)
    assert found["auroc"] > 0.6
    assert found["reweighted"] > 0.6


def test_quickstart_of_the_readme_is_that_of_the_example():
    """The README shows the losses of the example; they must be the same code."""
    readme = (EXAMPLES.parent / "README.md").read_text()
    shown = readme.split("```python\n")[1].split("```")[0]
    source = (EXAMPLES / "quickstart.py").read_text()
    for line in shown.split("program =")[0].splitlines():
        code = line.split("  #")[0].strip()
        assert code in source, code


@pytest.mark.parametrize(
    "method", ["weak labels only", "100 clean labels only", "mixed", "reweighted", "reweighted + clean"]
)
def test_rotten_tomatoes_methods_learn_made_sentences(load, method):
    example = load("rotten_tomatoes")
    torch.manual_seed(0)
    size = 1500
    x = torch.randn(size, 768)
    label = (x[:, :20].sum(1) > 0).long()
    weak = torch.where(torch.rand(size) < 0.25, 1 - label, label)
    weak[::10] = -1
    rows = torch.randperm(size)
    data = {"x": x, "label": label, "weak": weak, "train": rows[:1100], "test": rows[1100:]}
    accuracy, auroc = example.train(method, data, seed=0, steps=60)
    assert accuracy > 52
    assert (auroc is None) == (not method.startswith("reweighted"))


def test_vader_split_and_reviews(tmp_path):
    split = reviews.split_by_movie([f"movie {i % 40}" for i in range(400)], seed=0)
    movies = [{i % 40 for i in part} for part in split]
    assert not (movies[0] & movies[1] or movies[0] & movies[2] or movies[1] & movies[2])
    assert sum(len(part) for part in split) == 400
    labels = reviews.vader_labels(["a wonderful, great film", "a horrible mess", "the film"]).labels
    assert labels.tolist() == [reviews.FRESH, reviews.ROTTEN, reviews.ABSTAIN]
    (tmp_path / "reviews.csv").write_text(
        "category,text,movie_name\nfresh,good,A\nrotten,bad,B\nplot,x,C\nfresh,good,D\n"
    )
    frame = reviews.load_reviews(tmp_path / "reviews.csv")
    assert frame["label"].tolist() == [reviews.FRESH, reviews.ROTTEN]


def test_trainer_example_weighs_a_tiny_model(load, tmp_path):
    from tests.hf.trainer_runs import tiny_llama
    from tests.hf.words import word_tokenizer

    tiny_llama().save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    made = [{"prompt": f"a{i % 8} ask", "completion": f" a{i % 8 + 8} a{i}"} for i in range(40)]
    (tmp_path / "data.json").write_text(json.dumps(made))
    auroc = load("reweight_with_trainer").main(
        str(tmp_path / "model"), str(tmp_path / "data.json"), sizes=(16, 8, 8), output_dir=str(tmp_path / "run"),
        num_train_epochs=1, per_device_train_batch_size=4, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    assert 0 <= auroc <= 1
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_trainer_quickstart_of_the_readme_runs_as_printed(tmp_path, monkeypatch):
    """On a tiny model, under the hub's name, and rows of made words."""
    readme = (EXAMPLES.parent / "README.md").read_text()
    (block,) = [b for b in re.findall(r"^```python\n(.*?)^```", readme, re.M | re.S) if "ReweightingTrainer" in b]
    assert len(block.splitlines()) <= 15
    write_recipe(tmp_path)
    hub = tmp_path / "HuggingFaceTB" / "SmolLM2-135M-Instruct"
    hub.parent.mkdir()
    (tmp_path / "model").rename(hub)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    rows = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    names = {"train": rows[:48], "clean": rows[48:64], "heldout": rows[64:77]}
    exec(block, names)
    assert len(names["better"]) == 24
    assert (tmp_path / "runs" / "a" / "checkpoint-18").is_dir()
