"""What has a weight: closed forms, and weights that find what helps."""

import numpy as np
import pandas as pd
import pytest
import torch

import scalemlo as mlo
from scalemlo.hf.data.collate import PadCollator
from scalemlo.hf.data.packing import PackingCollator
from scalemlo.hf.data.prepare import prepare_dataset
from scalemlo.hf.data.tasks import TASKS
from scalemlo.hf.losses.next_token import example_losses, token_losses
from scalemlo.hf.trainer.config import ReweightingConfig
from scalemlo.hf.trainer.reweighting import REWEIGHTINGS
from tests.hf.trainer_runs import rows, tiny_llama, trainer
from tests.hf.words import word_tokenizer

KINDS = [
    ("example", "dataset"), ("example", "batch"), ("example", "none"), ("domain", "dataset"), ("scorer", "batch"),
    ("scorer", "none"), ("token", "batch"),
]  # fmt: skip
FEATURES = {("scorer", "none"): ["loss", "embedding"]}
"""The net sees embeddings too in one of its cases."""


def features(kind, normalization):
    return FEATURES.get((kind, normalization), ["loss"])


def test_every_name_of_the_configuration_is_known():
    from scalemlo.hf.trainer.config import NORMALIZATIONS

    assert list(REWEIGHTINGS) == list(NORMALIZATIONS)


@pytest.mark.parametrize("kind, normalization", KINDS)
def test_losses_are_those_of_the_equations(kind, normalization, tmp_path):
    args = ReweightingConfig(
        output_dir=str(tmp_path), use_cpu=True, reweighting=kind, weight_normalization=normalization,
        domain_column="source", scorer_features=features(kind, normalization),
    )  # fmt: skip
    data = prepare_dataset(rows(12), word_tokenizer(), domain_column="source")
    model = tiny_llama().double()
    reweighting = REWEIGHTINGS[kind](args, data, example_losses, model)
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
        seen = losses[:, None]
        if "embedding" in args.scorer_features:
            ids, mask = batch["input_ids"], batch["attention_mask"]
            alone = [
                model.model(row[: m.sum()][None]).last_hidden_state[0].mean(0) for row, m in zip(ids, mask, strict=True)
            ]
            means = torch.stack(alone).detach()
            spread = means.var(1, correction=0, keepdim=True) + 1e-5
            seen = torch.cat([seen, (means - means.mean(1, keepdim=True)) / spread.sqrt()], dim=1)
        w = rater(seen)
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
            scorer_features=features(kind, normalization),
        )  # fmt: skip
        torch.manual_seed(1)
        for p in run.program.trainers["rater"].engine.parameters.values():
            p.data = (p.data + 0.5 * torch.randn_like(p)).double()
        found.append(run.program.gradients()["rater"])
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-6, atol=1e-8)
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


@pytest.mark.parametrize("kind", ["scorer", "token"])
def test_nets_export_weights_and_a_filtered_set(kind, tmp_path):
    options = {"scorer_features": ["embedding"]} if kind == "scorer" else {}
    run = trainer(tmp_path, train=rows(12), reweighting=kind, max_steps=2, meta_learning_rate=0.05, **options)
    run.train()
    run.save_weights(str(tmp_path / "weights.csv"))
    table = pd.read_csv(tmp_path / "weights.csv")
    np.testing.assert_allclose(table["weight"], run.example_weights(), rtol=1e-6)
    assert table["weight"].between(0, 1).all() and table["weight"].nunique() > 1
    best = table.nlargest(3, "weight")["example_id"]
    assert run.filtered_dataset(top_k_percent=25) == [rows(12)[i] for i in sorted(best)]


def test_embeddings_are_refused_where_there_are_none(tmp_path):
    pairs = [{"prompt": f"a{i} ask", "chosen": " a1 a2", "rejected": f" a{i}"} for i in range(26)]
    with pytest.raises(ValueError, match=r"pairs of sequences.*scorer_features=\['loss'\]"):
        trainer(tmp_path, train=pairs, meta=pairs[:9], evaluated=pairs[:4], reweighting="scorer",
                scorer_features=["embedding"])  # fmt: skip
    with pytest.raises(ValueError, match="Linear has no config.hidden_size"):
        trainer(tmp_path, model=torch.nn.Linear(2, 2), reweighting="scorer", scorer_features=["embedding"])


def test_packed_rows_get_the_same_weights_in_the_same_order(tmp_path):
    data = prepare_dataset(rows(26), word_tokenizer())
    meta = prepare_dataset(rows(9, "more", 50), word_tokenizer())
    tables = []
    for collator in (PadCollator(0), PackingCollator(0, max_length=16)):
        run = trainer(
            tmp_path, train=data, meta=meta, evaluated=meta, reweighting="scorer", max_steps=2, learning_rate=1e-3,
            meta_optim="sgd", given={"data_collator": collator, "losses": example_losses},
        )  # fmt: skip
        run.train()
        tables.append(run.example_weights())
    assert len(np.unique(tables[0])) > 5
    np.testing.assert_allclose(tables[1], tables[0], rtol=1e-5)
    with pytest.raises(ValueError, match="one example per row"):
        run.predict(meta)
    for options in ({"reweighting": "token"}, {"reweighting": "scorer", "scorer_features": ["embedding"]}):
        with pytest.raises(ValueError, match="packs several|are packed into a row"):
            trainer(
                tmp_path, train=data, meta=meta, evaluated=meta, **options,
                given={"data_collator": PackingCollator(0, max_length=16), "losses": example_losses},
            ).train()  # fmt: skip
