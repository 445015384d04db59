"""What has a weight: closed forms, and weights that find what helps."""

import numpy as np
import pandas as pd
import pytest
import torch

import scalemlo as mlo
from scalemlo.hf.config import ReweightingConfig
from scalemlo.hf.losses import example_losses, token_losses
from scalemlo.hf.prepare import prepare_dataset
from scalemlo.hf.reweighting import REWEIGHTINGS
from scalemlo.hf.tasks import TASKS
from tests.hf.trainer_runs import rows, tiny_llama, trainer
from tests.hf.words import word_tokenizer

KINDS = [
    ("example", "dataset"), ("example", "batch"), ("example", "none"), ("domain", "dataset"), ("scorer", "batch"),
    ("scorer", "none"), ("token", "batch"),
]  # fmt: skip


def test_every_name_of_the_configuration_is_known():
    from scalemlo.hf.config import NORMALIZATIONS

    assert list(REWEIGHTINGS) == list(NORMALIZATIONS)


@pytest.mark.parametrize("kind, normalization", KINDS)
def test_losses_are_those_of_the_equations(kind, normalization, tmp_path):
    args = ReweightingConfig(
        output_dir=str(tmp_path), use_cpu=True, reweighting=kind, weight_normalization=normalization,
        domain_column="source",
    )  # fmt: skip
    data = prepare_dataset(rows(12), word_tokenizer(), domain_column="source")
    model = tiny_llama().double()
    reweighting = REWEIGHTINGS[kind](args, data, example_losses)
    rater = reweighting.module.double()
    for p in rater.parameters():
        p.data += torch.randn_like(p)
    batch = TASKS[data.kind].collator(0)([data[i] for i in (7, 0, 3, 4)])
    losses = example_losses(model, batch).detach()
    if kind == "example":
        table = torch.sigmoid(rater.logits)
        w = table[batch["example_id"]]
        scale = {"dataset": table.mean(), "batch": w.mean(), "none": 1.0}[normalization]
        expected = (w * losses).mean() / scale
    elif kind == "domain":  # sum_d p_d times the mean loss of d, over the whole set
        batch = TASKS[data.kind].collator(0)(list(data))
        losses = example_losses(model, batch).detach()
        p = torch.softmax(rater.logits, 0)
        expected = sum(p[d] * losses[batch["domain_id"] == d].mean() for d in range(2))
    elif kind == "scorer":
        w = rater(losses[:, None])
        expected = (w * losses).mean() / (w.mean() if normalization == "batch" else 1.0)
    else:
        per_token, mask = token_losses(model, batch)
        total = weight = 0.0
        for i in range(4):
            for t in range(per_token.shape[1]):
                if mask[i, t]:
                    w = rater(torch.stack([per_token[i, t], losses[i]])[None].detach())[0]
                    total, weight = total + w * per_token[i, t], weight + w
        expected = total / weight
    torch.testing.assert_close(reweighting.loss(model, rater, batch), expected, rtol=1e-12, atol=1e-12)
    assert reweighting.example_weights(model, rater, batch).shape == batch["example_id"].shape


@pytest.mark.parametrize("kind, normalization", KINDS)
def test_ghost_products_and_forward_derivatives_agree(kind, normalization, tmp_path):
    """The hypergradient by default is that of the forward derivative, whatever stands in the way of ghost products."""
    found = []
    for mixed in ("auto", "forward"):
        run = trainer(
            tmp_path, model=tiny_llama().double(), reweighting=kind, weight_normalization=normalization,
            domain_column="source", hypergradient=mlo.Identity(mixed=mixed),
        )  # fmt: skip
        torch.manual_seed(1)
        for p in run.program.trainers["rater"].engine.parameters.values():
            p.data += 0.5 * torch.randn_like(p)
        found.append(run.program.gradients()["rater"])
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-5, atol=1e-7)
    assert max(float(v.abs().max()) for v in found[0].values()) > 1e-5


def test_weights_find_the_examples_that_the_meta_set_wants(tmp_path):
    """Half of the answers follow one rule, half another; the meta set has the first rule's."""

    def row(i, good, word="ask"):
        return {
            "prompt": f"a{i % 10} {word}",
            "completion": f" a{i % 10 + (10 if good else 25)}",
            "source": "bg"[good],
        }

    train = [row(i, i // 10 % 2 == 0) for i in range(40)]
    meta = [row(i, True, "more ask") for i in range(10)]
    for kind, learning_rate in (("example", 10.0), ("domain", 2.0)):
        run = trainer(
            tmp_path / kind, train=train, meta=meta, reweighting=kind, domain_column="source", max_steps=25,
            meta_optim="sgd", meta_learning_rate=learning_rate, learning_rate=1e-2, logging_steps=40,
        )  # fmt: skip
        run.train()
        table = run.weights_table()
        assert list(table.columns) == ["example_id", "weight", "domain", "text"]
        by_domain = table.groupby("domain")["weight"].mean()
        assert by_domain["g"] > 1.05 * by_domain["b"], (kind, by_domain)
        for suffix in ("csv", "parquet"):
            run.save_weights(str(tmp_path / f"weights.{suffix}"))
        pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "weights.parquet"), table)
        assert table["text"][1].startswith("a1 ask")
        kept = run.filtered_dataset(top_k_percent=50)
        assert np.mean([row["source"] == "g" for row in kept]) > 0.75, (kind, table)
    with pytest.raises(ValueError, match="top_k_percent=0"):
        run.filtered_dataset(0)
    with pytest.raises(ValueError, match="csv or .parquet"):
        run.save_weights("weights.xlsx")
