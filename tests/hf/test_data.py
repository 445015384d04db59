"""Instruction data from made rows and a tokenizer of whole words, so that every id can be read."""

import json
import logging

import pytest
import torch

from scalemlo.hf.data.collate import PadCollator
from scalemlo.recipes.data import instructions as data
from scalemlo.recipes.data.instructions import (
    InstructionDataset,
    Row,
    corrupt,
    keep_short,
    load_instructions,
    split_rows,
    tokenize,
)
from tests.hf.words import ASK, ASSISTANT, BE, BRIEF, END, MORE, NEWLINE, SYSTEM, TEMPLATE, USER, WORDS, word_tokenizer


@pytest.fixture
def tokenizer():
    return word_tokenizer()


def answer(number: int) -> int:
    return len(WORDS) + number


def make_rows(count: int) -> list[Row]:
    return [Row(example_id=100 + number, prompt="ask", completion=f"a{number}") for number in range(count)]


# Loading


def write(path, records):
    is_lines = path.suffix == ".jsonl"
    path.write_text("\n".join(map(json.dumps, records)) + "\n" if is_lines else json.dumps(records))
    return str(path)


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_both_column_styles_load_and_empty_answers_are_reported(tmp_path, suffix, caplog):
    records = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Say.", "input": "", "output": " "},
        {"prompt": "Ask.", "completion": "Yes."},
    ]
    with caplog.at_level(logging.WARNING, logger="scalemlo"):
        rows = load_instructions(write(tmp_path / f"data{suffix}", records))
    assert rows == [
        {"example_id": 0, "prompt": "Add.\n\n1 and 2", "completion": "3"},
        {"example_id": 2, "prompt": "Ask.", "completion": "Yes."},
    ]
    assert "left out 1 of 3 rows" in caplog.text


def test_jsonl_strings_may_hold_unicode_line_separators(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a\u2028b", "completion": "c"}\n', encoding="utf-8")
    assert load_instructions(str(path))[0]["prompt"] == "a\u2028b"


def test_asset_name_is_fetched(tmp_path, monkeypatch):
    path = tmp_path / "data.json"
    write(path, [{"prompt": "p", "completion": "c"}])
    monkeypatch.setattr(data, "fetch", lambda name: {"alpaca_en_demo": path}[name])
    assert load_instructions("alpaca_en_demo")[0]["completion"] == "c"


def test_other_names_go_to_the_hub_library(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_list([{"instruction": "i", "output": "o"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_instructions("org/data", split="test") == [{"example_id": 0, "prompt": "i", "completion": "o"}]
    assert asked == [("org/data", "test")]


def test_unusable_sources_are_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_instructions(str(tmp_path / "absent.json"))
    with pytest.raises(ValueError, match=r"must end in \.json or \.jsonl"):
        (tmp_path / "data.csv").write_text("a,b")
        load_instructions(str(tmp_path / "data.csv"))
    with pytest.raises(ValueError, match=r"record 0 has the columns \['question'\]"):
        load_instructions(write(tmp_path / "data.json", [{"question": "?"}]))


# Splitting


def test_parts_are_disjoint_sized_and_seeded():
    rows = make_rows(30)
    split = split_rows(rows, num_train=15, num_meta=6, num_heldout=5, seed=0)
    assert [len(part) for part in split] == [15, 6, 5]
    ids = [row["example_id"] for part in split for row in part]
    assert len(set(ids)) == 26 and set(ids) <= {row["example_id"] for row in rows}
    assert split == split_rows(rows, num_train=15, num_meta=6, num_heldout=5, seed=0)
    assert split != split_rows(rows, num_train=15, num_meta=6, num_heldout=5, seed=1)
    assert ids != sorted(ids), "the parts must be drawn at random, not cut in order"


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match=r"num_train \(8\) \+ num_meta \(2\) \+ num_heldout \(1\) .*\(10\)"):
        split_rows(make_rows(10), num_train=8, num_meta=2, num_heldout=1, seed=0)
    with pytest.raises(ValueError, match=r"num_meta \(-1\)"):
        split_rows(make_rows(10), num_train=8, num_meta=-1, num_heldout=1, seed=0)


# Corruption


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.4, 1.0])
def test_exactly_the_marked_rows_have_another_rows_answer(fraction, seed):
    rows = make_rows(20)
    corrupted, mask = corrupt(rows, fraction, seed)
    assert sum(mask) == round(20 * fraction)
    for before, after, is_corrupted in zip(rows, corrupted, mask, strict=True):
        assert (before["completion"] != after["completion"]) == is_corrupted
        assert (before["example_id"], before["prompt"]) == (after["example_id"], after["prompt"])
    assert sorted(row["completion"] for row in corrupted) == sorted(row["completion"] for row in rows)
    assert rows == make_rows(20), "the clean rows must not change"


def test_corruption_depends_on_the_seed_alone():
    rows = make_rows(20)
    assert corrupt(rows, 0.5, 3) == corrupt(rows, 0.5, 3)
    assert corrupt(rows, 0.5, 3)[1] != corrupt(rows, 0.5, 4)[1]


@pytest.mark.parametrize("seed", range(20))
def test_equal_answers_are_never_exchanged(seed):
    rows = [{**row, "completion": f"a{number // 3}"} for number, row in enumerate(make_rows(7))]
    corrupted, _ = corrupt(rows, 1.0, seed)
    assert all(a["completion"] != b["completion"] for a, b in zip(rows, corrupted, strict=True))


def test_impossible_corruption_is_refused():
    for fraction in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
            corrupt(make_rows(10), fraction, 0)
    with pytest.raises(ValueError, match="selects 1, of which 1"):
        corrupt(make_rows(10), 0.1, 0)
    with pytest.raises(ValueError, match="selects 4, of which 3"):
        corrupt([{**row, "completion": "a0" if i else "a1"} for i, row in enumerate(make_rows(4))], 1.0, 0)


# Tokenizing


def test_only_the_completion_and_its_end_have_labels(tokenizer):
    row = tokenize(Row(example_id=7, prompt="ask more", completion="a1 a2"), tokenizer)
    prompt, completion = [USER, ASK, MORE, END, NEWLINE, ASSISTANT], [answer(1), answer(2), END]
    assert row == {
        "example_id": 7,
        "input_ids": prompt + completion,
        "labels": [-100] * 6 + completion,
    }


def test_system_message_comes_first(tokenizer):
    row = tokenize(make_rows(1)[0], tokenizer, system="be brief")
    assert row["input_ids"][:4] == [SYSTEM, BE, BRIEF, END]


def test_template_that_changes_the_prompt_is_refused(tokenizer):
    template = "{% if messages|length > 1 %}a1 {% endif %}" + TEMPLATE
    with pytest.raises(ValueError, match="example 100 differently"):
        tokenize(make_rows(1)[0], tokenizer, chat_template=template)


def test_missing_template_is_refused_unless_given(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat_template"):
        tokenize(make_rows(1)[0], tokenizer)
    assert tokenize(make_rows(1)[0], tokenizer, chat_template=TEMPLATE)["input_ids"][0] == USER


def test_keep_short_counts_the_whole_row(tokenizer):
    rows = [Row(example_id=i, prompt="ask", completion=" ".join(["a1"] * i)) for i in range(1, 6)]
    # <user> ask <end> newline <assistant>, the answer, <end>: i + 6 tokens.
    assert [row["example_id"] for row in keep_short(rows, tokenizer, 9)] == [1, 2, 3]


def test_dataset_truncates_drops_and_reports(tokenizer, caplog):
    rows = [
        Row(example_id=1, prompt="ask", completion="a1"),
        Row(example_id=2, prompt="ask", completion="a1 a2 a3 a4"),
        Row(example_id=3, prompt="ask more more more more", completion="a1"),
    ]
    with caplog.at_level(logging.WARNING, logger="scalemlo"):
        dataset = InstructionDataset(rows, tokenizer, max_length=8)
    assert [row["example_id"] for row in dataset] == [1, 2] and len(dataset) == 2
    assert dataset[1]["labels"] == [-100] * 5 + [answer(1), answer(2), answer(3)]
    assert all(len(dataset[1][key]) == 8 for key in ("input_ids", "labels"))
    assert (dataset.num_dropped, dataset.num_truncated) == (1, 1)
    assert "dropped 1 of 3 rows" in caplog.text and "answers of 1" in caplog.text


def test_dataset_without_any_label_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"max_length \(5\) leaves no answer token in any of 3 rows"):
        InstructionDataset(make_rows(3), tokenizer, max_length=5)


# Batches


def two_rows() -> list[data.TokenizedRow]:
    return [
        {"example_id": 5, "input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]},
        {
            "example_id": 9,
            "input_ids": [1, 2, 2, 2, 3, 4],
            "labels": [-100] * 4 + [3, 4],
        },
    ]


def test_batch_is_padded_on_the_right_and_label_columns_are_cut():
    batch = PadCollator(0)(two_rows())
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[1, 2, 3, 4, 0, 0], [1, 2, 2, 2, 3, 4]],
        "attention_mask": [[1, 1, 1, 1, 0, 0], [1] * 6],
        "labels": [[3, 4, -100, -100], [-100, -100, 3, 4]],
        "example_id": [5, 9],
    }
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    whole = PadCollator(0, trim_labels=False)(two_rows())["labels"]
    assert whole.shape == (2, 6) and torch.equal(whole[:, 2:], batch["labels"])


def test_length_is_rounded_up():
    batch = PadCollator(0, pad_to_multiple_of=4, trim_labels=False)(two_rows())
    assert all(batch[name].shape == (2, 8) for name in ("input_ids", "attention_mask", "labels"))
    assert batch["attention_mask"].sum(dim=1).tolist() == [4, 6]
    assert (batch["labels"][:, 6:] == -100).all()
    with pytest.raises(ValueError, match=r"pad_to_multiple_of \(0\)"):
        PadCollator(0, pad_to_multiple_of=0)


@pytest.mark.parametrize("labels", [[-100] * 4, [1, -100, -100, -100]])
def test_row_without_a_predictable_label_is_named(labels):
    rows = two_rows()
    rows[0]["labels"] = labels  # a label on the first token has nothing to be predicted from
    with pytest.raises(ValueError, match=r"row 0 of the batch \(example_id 5\)"):
        PadCollator(0)(rows)


def test_pad_token_equal_to_the_end_token_keeps_the_end_label(tokenizer):
    """With pad == eos, masking labels by comparing ids with the pad id would teach the model never to stop."""
    dataset = InstructionDataset(make_rows(2), tokenizer)
    batch = PadCollator(END)(list(dataset))
    assert (batch["labels"][:, -1] == END).all()
