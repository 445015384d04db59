"""What does not fit is refused by a sentence before the first step, with the field, the values and the way out."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForSequenceClassification

import scalemlo as mlo
from scalemlo.checkpoint.writable import check_writable
from scalemlo.hf import MLOConfig
from scalemlo.hf.data.fit import num_positions
from tests.hf.trainer_runs import arguments, rows, trainer


def classifier(num_labels: int = 2) -> LlamaForSequenceClassification:
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, num_labels=num_labels,
    )  # fmt: skip
    return LlamaForSequenceClassification(config)


def classes(count: int, num_labels: int = 2) -> list[dict]:
    return [{"text": f"a{i} ask", "label": i % num_labels} for i in range(count)]


def message_of(make, **options) -> str:
    with pytest.raises(ValueError) as caught:
        make(**options)
    return str(caught.value)


def test_a_meta_set_of_another_format(tmp_path):
    message = message_of(trainer, folder=tmp_path, model=classifier(), train=classes(16), meta=rows(9))
    assert "meta_dataset has rows of the format 'prompt_completion' (language_modeling)" in message
    assert "train_dataset of 'classification'" in message and "same format" in message


@pytest.mark.parametrize(
    "name",
    ["per_device_train_batch_size", "per_device_eval_batch_size", "per_device_meta_batch_size", "unroll_steps"]
    + ["gradient_accumulation_steps", "verify_every", "max_length"],
)
@pytest.mark.parametrize("value", [0, -1])
def test_nothing_to_count(name, value, tmp_path):
    assert (
        message_of(arguments, folder=tmp_path, **{name: value}) == f"{name}={value} must be an integer of at least 1."
    )


def test_an_unknown_way_to_verify(tmp_path):
    assert "verify='never' is unknown; choose one of ['first', 'always', 'off']" in message_of(
        MLOConfig, output_dir=str(tmp_path), use_cpu=True, verify="never"
    )


def test_how_to_verify_reaches_the_program(tmp_path):
    made = trainer(tmp_path, verify="always", verify_every=7)
    assert made.program.iteration.gradients.verification.is_due(made.program.trainers["finetune"], 1)
    assert (made.args.verify, made.args.verify_every) == ("always", 7)


def test_token_ids_beyond_the_embeddings(tmp_path):
    train = [{"input_ids": [2, 5, 6]}] * 9 + [{"input_ids": [2, 64, 6]}]
    message = message_of(trainer, folder=tmp_path, train=train)
    assert message.startswith("train_dataset, row 9: input_ids has the token id 64, and LlamaForCausalLM has 64 embed")
    assert "resize_token_embeddings" in message


def test_labels_below_the_ignored_one(tmp_path):
    meta = [{"input_ids": [2, 5, 6], "labels": [-100, -101, 6]}] * 9
    message = message_of(trainer, folder=tmp_path, meta=meta)
    assert message.startswith("meta_dataset, row 0: labels has the token id -101")


def test_classes_that_the_head_lacks(tmp_path):
    message = message_of(trainer, folder=tmp_path, model=classifier(2), train=classes(16, 3), meta=classes(8))
    assert message.startswith("train_dataset, row 2: the label 2 is none of the 2 classes of LlamaForSequenceClass")
    assert "num_labels=" in message


def test_more_tokens_than_positions(tmp_path):
    train = [{"input_ids": [2] * 65}] * 9
    message = message_of(trainer, folder=tmp_path, train=train)
    assert "input_ids has 65 tokens, and LlamaForCausalLM was made for 64 positions" in message
    assert "Set max_length=64." in message


def test_positions_by_other_names():
    config = GPT2Config(vocab_size=30, n_embd=8, n_layer=1, n_head=2, n_positions=12)
    assert num_positions(GPT2LMHeadModel(config)) == 12
    assert num_positions(torch.nn.Linear(2, 2)) is None


def test_an_output_folder_that_cannot_be_written(tmp_path):
    taken = tmp_path / "taken"
    taken.write_text("a file")
    message = message_of(trainer, folder=taken / "run")
    assert message.startswith(f"output_dir='{taken}/run' cannot be written to (Not a directory)")
    net = torch.nn.Linear(2, 1)

    class Fit(mlo.Level):
        def loss(self, batch):
            return mlo.mean(self.module(batch).square().squeeze(-1))

    program = mlo.Program([Fit("fit", net, data=[torch.ones(2, 2)], optimizer=lambda p: torch.optim.SGD(p, 0.1))])
    with pytest.raises(ValueError, match="cannot be written to"):
        program.run(1, checkpoint=mlo.Checkpointing(taken / "run"), progress=False)
    assert program.num_steps == 0


def test_looking_leaves_no_folder(tmp_path):
    check_writable(tmp_path / "a" / "b", "output_dir")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "kept").mkdir()
    check_writable(tmp_path / "kept", "output_dir")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_ranks_that_look_at_once_do_not_take_the_folder_from_each_other(tmp_path):
    def look(turn):
        check_writable(tmp_path / f"run_{turn // 8}" / "checkpoints", "output_dir")

    with ThreadPoolExecutor(8) as ranks:
        list(ranks.map(look, range(800)))
    assert list(tmp_path.iterdir()) == []
