"""Every format and container that TRL takes, with a tokenizer of whole words, so that every id can be read."""

import logging

import datasets
import numpy as np
import pandas as pd
import pytest
import torch

from scalemlo.hf.data.collate import ClassificationCollator, PadCollator, PreferenceCollator
from scalemlo.hf.data.overlap import overlapping_rows, warn_of_overlap
from scalemlo.hf.data.prepare import prepare_dataset
from scalemlo.hf.data.tasks import TASKS
from scalemlo.hf.data.tokenizing import ensure_pad_token
from tests.hf.words import ASK, ASSISTANT, END, MORE, NEWLINE, PAD, TEMPLATE, USER, WORDS, word_tokenizer

A0 = len(WORDS)  # the id of the word a0
A1, A2, A3 = A0 + 1, A0 + 2, A0 + 3
GENERATION = TEMPLATE.replace(
    " {{ m['content'] }} <end>\n",
    " {% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} <end>{% endgeneration %}"
    "{% else %}{{ m['content'] }} <end>{% endif %}\n",
)


@pytest.fixture
def tokenizer():
    return word_tokenizer()


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def only_row(rows, tokenizer, **options):
    prepared = prepare_dataset(rows, tokenizer, **options)
    assert len(prepared) == 1
    return prepared[0]


def masked(count, ids):
    return [-100] * count + ids[count:]


# Formats


def test_text_is_ended_and_labelled_throughout(tokenizer):
    row = only_row([{"text": "ask a1"}], tokenizer)
    assert row == {"example_id": 0, "input_ids": [ASK, A1, END], "labels": [ASK, A1, END]}
    assert only_row([{"text": "ask a1 <end>"}], tokenizer) == row, "no second end"


def test_prompt_and_completion_have_labels_on_the_completion_unless_told_otherwise(tokenizer):
    rows = [{"prompt": "ask more ", "completion": "a1 a2"}]
    ids = [ASK, MORE, A1, A2, END]
    assert only_row(rows, tokenizer)["labels"] == masked(2, ids)
    assert only_row(rows, tokenizer, completion_only_loss=False)["labels"] == ids
    chat = [{"prompt": [user("ask")], "completion": [assistant("a1")]}]
    ids = [USER, ASK, END, NEWLINE, ASSISTANT, A1, END, NEWLINE]
    row = only_row(chat, tokenizer)
    assert row["input_ids"] == ids and row["labels"] == masked(5, ids)


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_conversations_are_rendered_by_the_template(tokenizer, column):
    names = {"role": "from", "content": "value"} if column == "conversations" else {}
    talk = [{names.get(k, k): v for k, v in m.items()} for m in (user("ask"), assistant("a1"))]
    row = only_row([{column: talk}], tokenizer)
    assert row["input_ids"] == row["labels"] == [USER, ASK, END, NEWLINE, ASSISTANT, A1, END, NEWLINE]


def test_assistant_only_loss_follows_the_generation_marks(tokenizer):
    talk = [user("ask"), assistant("a1"), user("more"), assistant("a2 a3")]
    row = only_row([{"messages": talk}], tokenizer, assistant_only_loss=True, chat_template=GENERATION)
    said = [i for i in row["labels"] if i != -100]
    assert said == [A1, END, A2, A3, END]
    assert len(row["labels"]) == len(row["input_ids"])
    with pytest.raises(ValueError, match="generation"):
        prepare_dataset([{"messages": talk}], tokenizer, assistant_only_loss=True)


def test_preferences_share_their_prompt_said_or_not(tokenizer):
    chosen, rejected = [ASK, MORE, A1, END], [ASK, MORE, A2, A3, END]
    said = {"prompt": "ask more ", "chosen": "a1", "rejected": "a2 a3"}
    row = only_row([said], tokenizer)
    assert row == {
        "example_id": 0,
        "chosen_input_ids": chosen,
        "chosen_labels": masked(2, chosen),
        "rejected_input_ids": rejected,
        "rejected_labels": masked(2, rejected),
    }
    talks = {"chosen": [user("ask"), assistant("a1")], "rejected": [user("ask"), assistant("a2")]}
    row = only_row([talks], tokenizer)
    assert row["chosen_labels"] == [-100] * 5 + [A1, END, NEWLINE]
    assert row["rejected_labels"] == [-100] * 5 + [A2, END, NEWLINE]


def test_implicit_prompts_of_plain_preferences_end_on_a_word(tokenizer):
    row = only_row([{"chosen": "ask more a12", "rejected": "ask more a13"}], tokenizer)
    assert row["chosen_labels"] == [-100, -100, A0 + 12, END]
    assert row["rejected_labels"] == [-100, -100, A0 + 13, END]


def test_classes_stand_beside_the_sequence(tokenizer):
    assert only_row([{"text": "ask a1", "label": 2}], tokenizer) == {
        "example_id": 0, "input_ids": [ASK, A1], "label": 2
    }  # fmt: skip
    pair = only_row([{"text": "ask", "text_pair": "more", "label": 0}], tokenizer)
    assert pair["input_ids"] == [ASK, MORE]
    assert only_row([{"text": "ask", "label": 1}], tokenizer, format="text")["labels"] == [ASK, END]
    with pytest.raises(ValueError, match="label is 'good'"):
        prepare_dataset([{"text": "ask", "label": "good"}], tokenizer)


def test_tokenised_rows_keep_their_labels_and_lose_their_padding(tokenizer):
    ids = [PAD, 5, 6, 7]
    rows = [{"input_ids": ids, "attention_mask": [0, 1, 1, 1], "labels": [-100, -100, 6, 7]}]
    assert only_row(rows, tokenizer) == {"example_id": 0, "input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    assert only_row([{"input_ids": [5, 6], "completion_mask": [0, 1]}], tokenizer)["labels"] == [-100, 6]
    assert only_row([{"input_ids": [5, 6]}], tokenizer)["labels"] == [5, 6]
    arrays = {"input_ids": torch.tensor([5, 6]), "labels": np.array([-100, 6])}
    assert only_row([arrays], tokenizer)["labels"] == [-100, 6]
    with pytest.raises(ValueError, match="labels has 1 entries for 2 input_ids"):
        prepare_dataset([{"input_ids": [5, 6], "labels": [5]}], tokenizer)


def test_columns_of_other_names_are_renamed_or_named(tokenizer):
    rows = [{"question": "ask ", "answer": "a1", "text": "more"}]
    names = {"prompt": "question", "completion": "answer"}
    assert only_row(rows, tokenizer, column_names=names)["labels"] == [-100, A1, END]
    with pytest.raises(ValueError, match=r"train has the columns \['question'\].*prompt \+ completion.*column_names="):
        prepare_dataset([{"question": "ask"}], tokenizer, name="train")
    with pytest.raises(ValueError, match="'answr', but dataset has the columns"):
        prepare_dataset(rows, tokenizer, column_names={"completion": "answr"})
    with pytest.raises(ValueError, match="column_names has the key 'reply'"):
        prepare_dataset(rows, tokenizer, column_names={"reply": "answer"})


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"text": "ask"}], {"format": "chat"}, "format='chat' is unknown"),
        ([{"text": "ask"}], {"format": "messages"}, "fit no format"),
        ([{"text": "ask"}], {"on_overflow": "split"}, "on_overflow='split'"),
        ([{"text": "ask"}], {"max_length": 1}, r"max_length \(1\)"),
        ([{"text": "ask"}], {"completion_only_loss": True}, "completion_only_loss=True needs prompt"),
        ([{"text": "ask"}], {"assistant_only_loss": True}, "needs conversations"),
        ([{"text": "ask"}], {"domain_column": "source"}, "domain_column='source' is not among"),
        ([{"text": "ask"}, {"text": None}], {}, "row 1 of dataset has no 'text'"),
        ([{"text": "ask"}, {"text": 3}], {}, "row 1 of dataset: text is a int"),
        ([{"prompt": "ask", "completion": [assistant("a1")]}], {}, "prompt must be messages"),
        (["ask"], {}, "are strs and must be dicts"),
        ([], {}, "has no rows"),
        ("org/name", {}, "load it first"),
        (3, {}, "is a int"),
        (iter([{"text": "ask"}]), {}, "only once"),
        ({"text": ["ask"]}, {}, "dict of columns|single dict|are strs"),
    ],
)  # fmt: skip
def test_what_cannot_be_prepared_is_refused(tokenizer, rows, options, message):
    with pytest.raises(ValueError, match=message):
        prepare_dataset(rows, tokenizer, **options)


def test_a_missing_template_is_refused_unless_given(tokenizer):
    tokenizer.chat_template = None
    rows = [{"messages": [user("ask"), assistant("a1")]}]
    with pytest.raises(ValueError, match="no chat_template"):
        prepare_dataset(rows, tokenizer)
    assert only_row(rows, tokenizer, chat_template=TEMPLATE)["input_ids"][0] == USER


def test_the_pad_token_is_the_end_token_where_there_is_none(tokenizer):
    assert ensure_pad_token(tokenizer) == PAD
    tokenizer.pad_token = None
    assert ensure_pad_token(tokenizer) == END and tokenizer.pad_token == "<end>"
    assert ensure_pad_token(tokenizer, "<unk>") == WORDS.index("<unk>")
    with pytest.raises(ValueError, match="pad_token='nowhere'"):
        ensure_pad_token(tokenizer, "nowhere")
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither pad_token nor eos_token"):
        ensure_pad_token(tokenizer)


# Length


def test_long_rows_are_cut_or_left_out_and_counted(tokenizer, caplog):
    rows = [
        {"prompt": "ask ", "completion": "a1"},
        {"prompt": "ask ", "completion": "a1 a2 a3"},
        {"prompt": "ask ask ask ask ", "completion": "a1"},
    ]
    with caplog.at_level(logging.WARNING, logger="scalemlo"):
        cut = prepare_dataset(rows, tokenizer, max_length=4)
    assert [row["example_id"] for row in cut] == [0, 1] and cut.num_examples == 3
    assert cut[1]["labels"] == [-100, A1, A2, A3]
    assert (cut.counts.num_truncated, cut.counts.num_too_long, cut.counts.num_without_label) == (1, 0, 1)
    assert "of 3 rows, 1 truncated, 0 left out as too long, 1 as without a label" in caplog.text
    dropped = prepare_dataset(rows, tokenizer, max_length=4, on_overflow="drop")
    assert dropped.example_ids == [0] and dropped.counts.num_too_long == 2
    with pytest.raises(ValueError, match="no row to train on: of 1 read, 0 are longer .* 1 have no label"):
        prepare_dataset(rows[2:], tokenizer, max_length=4)


# Containers


class Torch(torch.utils.data.Dataset):
    """No `__iter__`, and no `IndexError` at its end."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index % len(self.rows)]


def test_every_container_gives_the_same_rows(tokenizer):
    rows = [{"text": f"ask a{i}", "source": "xyx"[i]} for i in range(3)]
    table = datasets.Dataset.from_list(rows)
    containers = [
        rows,
        Torch(rows),
        pd.DataFrame(rows, index=[7, 8, 9]),
        pd.DataFrame(rows).convert_dtypes(),
        table,
        table.with_format("torch"),
        table.to_iterable_dataset(),
        datasets.DatasetDict({"train": table}),
        datasets.IterableDatasetDict({"train": table.to_iterable_dataset()}),
    ]
    prepared = [prepare_dataset(data, tokenizer, domain_column="source", domains=["y", "x"]) for data in containers]
    expected = [
        {"example_id": i, "domain_id": [1, 0, 1][i], "input_ids": [ASK, A0 + i, END], "labels": [ASK, A0 + i, END]}
        for i in range(3)
    ]
    assert all(list(data) == expected for data in prepared)
    assert prepare_dataset(prepared[0], tokenizer) is prepared[0]
    found = prepare_dataset(rows, tokenizer, domain_column="source")
    assert found.domains == ["x", "y"] and found.domain_ids == [0, 1, 0]


def test_splits_and_streams_say_what_they_need(tokenizer):
    table = datasets.Dataset.from_list([{"text": "ask"}])
    splits = datasets.DatasetDict({"train": table, "test": table})
    assert len(prepare_dataset(splits, tokenizer, split="test")) == 1
    with pytest.raises(ValueError, match=r"has the splits \['test', 'train'\]; choose"):
        prepare_dataset(splits, tokenizer)
    with pytest.raises(ValueError, match="split='valid' does not exist"):
        prepare_dataset(splits, tokenizer, split="valid")
    with pytest.raises(ValueError, match="split='train' is for a DatasetDict"):
        prepare_dataset(table, tokenizer, split="train")
    with pytest.raises(ValueError, match="transform"):
        prepare_dataset(table.with_transform(dict), tokenizer)
    stream = table.add_column("source", ["x"]).to_iterable_dataset()
    with pytest.raises(ValueError, match="is a stream, whose domains"):
        prepare_dataset(stream, tokenizer, domain_column="source")
    with pytest.raises(ValueError, match="not among domains"):
        list(prepare_dataset(stream, tokenizer, domain_column="source", domains=["z"]))


def test_own_ids_are_kept_and_must_be_unique(tokenizer):
    rows = [{"text": "ask", "example_id": 5}, {"text": "more", "example_id": 2}]
    prepared = prepare_dataset(rows, tokenizer)
    assert prepared.example_ids == [5, 2] and prepared.num_examples == 6
    with pytest.raises(ValueError, match="same example_id"):
        prepare_dataset([rows[0], rows[0]], tokenizer)
    with pytest.raises(ValueError, match="example_id is 'b'"):
        prepare_dataset([{"text": "ask", "example_id": "b"}], tokenizer)


# Batches


def test_each_kind_has_its_batches(tokenizer):
    rows = [{"prompt": "ask ", "chosen": "a1", "rejected": rejected} for rejected in ("a2 a3", "a2")]
    pairs = prepare_dataset(rows, tokenizer)
    batch = PreferenceCollator(PAD)(list(pairs))
    assert batch["input_ids"].shape == (2, 2, 4) and batch["labels"].shape == (2, 2, 3)
    assert batch["input_ids"][0].tolist() == [[ASK, A1, END, PAD], [ASK, A2, A3, END]]
    assert batch["labels"][0].tolist() == [[A1, END, -100], [A2, A3, END]]
    classes = prepare_dataset([{"text": "ask", "label": 1}, {"text": "ask a1", "label": 0}], tokenizer)
    batch = ClassificationCollator(PAD)(list(classes))
    assert batch["labels"].tolist() == [1, 0] and batch["attention_mask"].tolist() == [[1, 0], [1, 1]]
    text = prepare_dataset([{"text": "ask a1", "source": "x"}], tokenizer, domain_column="source")
    assert PadCollator(PAD)(list(text))["domain_id"].tolist() == [0]
    assert [TASKS[data.kind].collator for data in (text, pairs, classes)] == [
        PadCollator, PreferenceCollator, ClassificationCollator
    ]  # fmt: skip


# Overlap


def test_rows_that_stand_in_both_are_counted_whatever_their_ids(tokenizer, caplog):
    train = prepare_dataset([{"text": f"ask a{i}"} for i in range(4)], tokenizer, name="train")
    meta = prepare_dataset([{"text": "ask a9"}, {"text": "ask a2"}], tokenizer, name="meta")
    assert overlapping_rows(train, meta) == [1]
    with caplog.at_level(logging.WARNING, logger="scalemlo"):
        assert warn_of_overlap(train, meta) == 1
    assert "1 of 2 rows of meta also stand in train" in caplog.text
    assert warn_of_overlap(train, prepare_dataset([{"text": "ask a9"}], tokenizer)) == 0
