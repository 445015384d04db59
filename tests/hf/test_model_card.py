"""The card of a trained model cites the paper of its estimator, whichever that is, and names no folder of its maker."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

import scalemlo as mlo
from scalemlo.hf.trainer.model_card import model_card
from scalemlo.hypergradients import ESTIMATORS
from tests.hf.trainer_runs import tiny_llama, trainer

PAPERS = (Path(__file__).parents[2] / "docs" / "papers.md").read_text()


def card_of(estimator, **options):
    given = dict(
        name="model", base_model="org/base", is_adapter=True, estimators={"finetune": estimator}, data={}, metrics={},
        hyperparameters={}, tags=[], extra={},
    )  # fmt: skip
    return model_card(**(given | options))


def made(estimator):
    """An estimator with its defaults; numbers that have none are 0.1."""
    return estimator(**{f.name: 0.1 for f in dataclasses.fields(estimator) if f.default is dataclasses.MISSING})


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_card_cites_the_paper_that_the_paper_index_has(name):
    section = card_of(made(ESTIMATORS[name])).partition("## Hypergradient\n")[2].partition("\n##")[0]
    found = re.fullmatch(r"\s*- level `finetune`: `\w+\(.*\)`\. ([^,]+ \d{4}), (.+)\n", section)
    assert found, f"no `authors year, title` in {section!r}"
    (row,) = re.findall(rf"^\| `{name}` \|.*$", PAPERS, re.M)
    assert found[1] in row and f"*{found[2]}*" in row


def test_an_estimator_of_ones_own_brings_its_citation():
    class Mine(mlo.Identity):
        citation = "Me 2026, My Estimator"

    assert "`. Me 2026, My Estimator\n" in card_of(Mine())


def test_the_base_model_is_named_on_the_hub_or_not_at_all(tmp_path):
    assert yaml.safe_load(card_of(mlo.SAMA()).split("---")[1])["base_model"] == "org/base"
    for name, expected in ((str(tmp_path), None), ("org/base", "org/base")):
        model = tiny_llama()
        model.config._name_or_path = name
        run = trainer(tmp_path / "run", model=model)
        run.create_model_card()
        card = (tmp_path / "run" / "README.md").read_text()
        assert yaml.safe_load(card.split("---")[1]).get("base_model") == expected
        assert str(tmp_path) not in card
