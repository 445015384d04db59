"""ReweightingTrainer and MLOTrainer in one process."""

import dataclasses
import json
import logging
import os
import signal
from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, TrainerCallback, TrainingArguments

import scalemlo as mlo
from scalemlo.hf import MLOCallback, MLOConfig, MLOTrainer, ReweightingTrainer
from scalemlo.versions import NEWER, OLDER
from tests.hf.trainer_runs import arguments, losses_of, rows, tiny_llama, trainer, weights_of
from tests.hf.words import word_tokenizer


class Events(MLOCallback):
    def __init__(self):
        self.heard = []

    def on_level_step_end(self, args, state, control, *, level, loss, **kwargs):
        assert np.isfinite(loss)
        self.heard.append(f"step of {level}")

    def on_hypergradient(self, args, state, control, *, level, norm, **kwargs):
        assert norm > 0
        self.heard.append(f"hypergradient of {level}")

    def on_step_begin(self, args, state, control, **kwargs):
        self.heard.append("step begin")

    def on_substep_end(self, args, state, control, **kwargs):
        self.heard.append("substep end")

    def on_step_end(self, args, state, control, **kwargs):
        self.heard.append(f"step end {state.global_step}")

    def on_log(self, args, state, control, logs, **kwargs):
        self.heard.append(f"log {state.global_step}")

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        assert "eval_loss" in metrics
        self.heard.append(f"evaluate {state.global_step}")

    def on_save(self, args, state, control, **kwargs):
        self.heard.append(f"save {state.global_step}")

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.heard.append("epoch begin")

    def on_epoch_end(self, args, state, control, **kwargs):
        self.heard.append("epoch end")

    def on_train_begin(self, args, state, control, model, processing_class, optimizer, **kwargs):
        assert model is not None and processing_class is not None and optimizer is not None
        self.heard.append("train begin")

    def on_train_end(self, args, state, control, **kwargs):
        self.heard.append("train end")


def test_events_come_in_the_order_of_the_levels_steps(tmp_path):
    events = Events()
    run = trainer(
        tmp_path, given={"callbacks": [events]}, train=rows(8), unroll_steps=2, max_steps=4, logging_steps=3,
        gradient_accumulation_steps=2, per_device_train_batch_size=2, per_device_meta_batch_size=4,
        eval_strategy="steps", eval_steps=3, save_strategy="steps", save_steps=3,
    )  # fmt: skip
    run.train()
    heard = events.heard
    first = ["step begin", "substep end", "step of finetune", "step end 1"]
    second = ["step begin", "hypergradient of rater", "step of rater", "step of finetune", "step end 2"]
    assert heard[:2] == ["train begin", "epoch begin"]
    assert heard[2:6] == first
    assert [e for e in heard[6:12] if e != "substep end"] == second
    assert heard[12:14] == ["epoch end", "epoch begin"]  # 8 examples, 4 per step
    # Due at step 3, in the middle of an outer iteration: done at its end.
    # Of the evaluation and of the end something is logged too.
    assert heard[-7:] == ["epoch end", "log 4", "log 4", "evaluate 4", "save 4", "log 4", "train end"]
    assert heard.count("substep end") == 4


def test_logs_have_the_names_that_transformers_has(tmp_path):
    run = trainer(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2)
    output = run.train()
    step, evaluation, end = run.state.log_history[-3:]
    assert {"loss", "grad_norm", "learning_rate", "epoch", "step"} <= set(step)
    assert {"meta_loss", "rater/grad_norm", "rater/learning_rate"} <= set(step)
    assert {"eval_loss", "eval_runtime", "eval_samples_per_second"} <= set(evaluation)
    assert {"train_runtime", "train_samples_per_second", "train_loss"} <= set(end)
    assert output.global_step == 2 and output.metrics["train_samples_per_second"] > 0
    assert run.state.log_history[0]["learning_rate"] == 1e-2  # of the step that was taken, not of the next one
    # The losses are those of the program's own history.
    logged = [log["loss"] for log in run.state.log_history if "loss" in log]
    assert logged == run.program.history.column("loss/finetune")


def test_epochs_give_the_number_of_steps(tmp_path):
    run = trainer(tmp_path, max_steps=-1, num_train_epochs=2, unroll_steps=4, logging_strategy="epoch")
    run.train()  # 26 examples, 8 per step: 3 steps per epoch, 6 rounded up to 8
    assert run.state.global_step == 8
    assert [log["step"] for log in run.state.log_history if "loss" in log] == [4, 8]


def test_resumed_run_is_bit_for_bit_the_whole_one_and_models_load(tmp_path):
    options = dict(save_strategy="steps", save_steps=2, save_total_limit=2, logging_steps=3, unroll_steps=2,
                   hypergradient="sama", max_steps=8, eval_strategy="steps", eval_steps=4)  # fmt: skip
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    assert sorted(p.name for p in (tmp_path / "whole").iterdir()) == ["checkpoint-6", "checkpoint-8"]

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= 4

    parted = trainer(tmp_path / "parted", given={"callbacks": [Stop]}, **options)
    parted.train()
    assert parted.state.global_step == 4
    resumed = trainer(tmp_path / "parted", **options)
    resumed.train(resume_from_checkpoint=True)
    assert losses_of(resumed) == losses_of(whole)
    for name, value in weights_of(whole).items():
        assert torch.equal(value, weights_of(resumed)[name]), name

    folder = tmp_path / "whole" / "checkpoint-8"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, whole.program.state_dict("finetune")[name]), name
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 8
    assert json.loads((folder / "training_args.json").read_text())["hypergradient"] == "sama"
    assert not [p for p in folder.rglob("*") if p.suffix in (".bin", ".pkl")]


def test_accumulation_changes_nothing(tmp_path):
    once = trainer(tmp_path)
    once.train()
    often = trainer(
        tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=8, per_device_meta_batch_size=8
    )
    often.train()
    _agree(once, often)


def test_activation_checkpointing_changes_nothing(tmp_path):
    names = {f.name for f in dataclasses.fields(TrainingArguments)}
    name = NEWER if NEWER in names else OLDER
    plain, checkpointed = trainer(tmp_path), trainer(tmp_path, **{name: True})
    assert getattr(checkpointed.model, f"is_{name}")
    for run in (plain, checkpointed):
        run.train()
    _agree(plain, checkpointed)


def _agree(one, other):
    for a, b in zip(losses_of(one), losses_of(other), strict=True):
        assert [x for x in a if x is not None] == pytest.approx([x for x in b if x is not None], rel=1e-5, abs=1e-5)
    for name, value in weights_of(one).items():
        torch.testing.assert_close(value, weights_of(other)[name], rtol=1e-5, atol=1e-5)


def test_the_best_model_is_kept_and_loaded(tmp_path):
    worse_from = []

    def metric(prediction):
        worse_from.append(None)
        assert prediction.predictions.shape[:2] == prediction.label_ids.shape
        return {"score": [0.1, 0.9, 0.5, 0.4][len(worse_from) - 1]}

    run = trainer(
        tmp_path, given={"compute_metrics": metric, "callbacks": [EarlyStoppingCallback(2)]}, max_steps=8,
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, save_total_limit=1,
        load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=True,
    )  # fmt: skip
    run.train()
    assert run.state.global_step == 4  # two evaluations after the best one
    assert run.state.best_global_step == 2 and run.state.best_metric == 0.9
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    best = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2").state_dict()
    for name, value in run.program.state_dict("finetune").items():
        assert torch.equal(value, best[name])


def test_patience_goes_on_with_a_resumed_run(tmp_path):
    """EarlyStopping's count is part of a checkpoint; and train() called again goes on."""
    options = dict(
        given={"callbacks": [EarlyStoppingCallback(3)], "compute_metrics": lambda prediction: {"score": 0.0}},
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, metric_for_best_model="score",
        greater_is_better=True, load_best_model_at_end=False, restore_callback_states_from_checkpoint=True,
    )  # fmt: skip
    run = trainer(tmp_path, max_steps=3, **options)
    run.train()
    options["given"]["callbacks"] = [EarlyStoppingCallback(3)]
    resumed = trainer(tmp_path, max_steps=8, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == 4
    resumed.train()
    assert resumed.state.global_step == 5


def test_evaluate_and_predict(tmp_path):
    run = trainer(tmp_path, given={"preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1)},
                  evaluated={"one": rows(3, "be"), "two": rows(4, "brief")}, per_device_eval_batch_size=2)  # fmt: skip
    metrics = run.evaluate()
    assert {"eval_one_loss", "eval_two_loss"} <= set(metrics)
    output = run.predict(rows(5, "be"))
    assert output.predictions.shape == output.label_ids.shape and len(output.label_ids) == 5
    assert set(output.metrics) >= {"test_loss", "test_runtime"}
    alone = run.evaluate(rows(1, "be"))["eval_loss"]  # independent of batch and padding
    losses = [run.evaluate([row])["eval_loss"] for row in rows(3, "be")]
    assert alone == pytest.approx(losses[0]) and metrics["eval_one_loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_ctrl_c_leaves_a_checkpoint(tmp_path):
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                os.kill(os.getpid(), signal.SIGINT)

    run = trainer(tmp_path, given={"callbacks": [Interrupt]}, save_strategy="steps", save_steps=100)
    run.train()
    assert (tmp_path / "checkpoint-3").is_dir() and run.state.global_step == 3


def test_peft_optimizers_and_datasets(tmp_path):
    data = Dataset.from_list(rows(20))
    run = trainer(tmp_path, train=data, given={"peft_config": LoraConfig(r=2, target_modules=["q_proj"])})
    run.train()
    run.save_model(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    trained = {name: t for name, t in run.program.state_dict("finetune").items() if "lora_" in name}
    assert trained and all(torch.equal(t, loaded.state_dict()[name]) for name, t in trained.items())
    kept = run.filtered_dataset(top_k_percent=25)
    assert isinstance(kept, Dataset) and len(kept) == 5
    best = set(np.argsort(-run.example_weights())[:5])
    assert {data.to_list().index(row) for row in kept} == best

    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    other = trainer(tmp_path, model=model, given={"optimizers": (optimizer, None)}, max_steps=1)
    assert other.program.trainers["finetune"].optimizer is optimizer
    other.train()


def test_adapter_of_another_name_is_saved(tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="mine")
    run = trainer(tmp_path, model=model, max_steps=1)
    run.train()
    run.save_model(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter", adapter_name="mine").state_dict()
    trained = {name: t for name, t in run.program.state_dict("finetune").items() if "lora_" in name}
    assert trained and all(torch.equal(t, loaded[name]) for name, t in trained.items())


def test_hub_gets_a_complete_folder(tmp_path, monkeypatch):
    from huggingface_hub import HfApi

    uploads = []

    class Repository:
        repo_id = "me/model"

    class Done:
        def done(self):
            return True

        def result(self):
            return None

    def upload(self, *, folder_path, run_as_future=False, **options):
        uploads.append((sorted(p.name for p in folder_path.iterdir()) if hasattr(folder_path, "iterdir") else
                        sorted(os.listdir(folder_path)), options))  # fmt: skip
        return Done()

    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **options: Repository())
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    run = trainer(
        tmp_path, push_to_hub=True, hub_model_id="me/model", hub_token="secret", save_strategy="steps", save_steps=3,
        eval_strategy="steps", eval_steps=3, hypergradient="sama", hub_strategy="checkpoint",
    )  # fmt: skip
    run.train()
    files, options = uploads[-1]
    assert options["repo_id"] == "me/model" and "checkpoint-*" in options["ignore_patterns"]
    assert {"README.md", "model.safetensors", "config.json", "tokenizer.json", "training_args.json"} <= set(files)
    assert [o.get("path_in_repo") for _, o in uploads] == [None, "last-checkpoint"] * 2 + [None]
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers") and "scalemlo" in card
    for text in ("Choe et al. 2023", "eval_loss", "26 examples", "learning rate", "torch 2", "reweighting | example"):
        assert text in card, text
    assert "secret" not in card + (tmp_path / "training_args.json").read_text()


def test_reports_go_to_the_integrations_of_transformers(tmp_path, monkeypatch):
    from transformers.integrations import integration_utils

    heard = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            heard.append(logs)

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Tracker)
    trainer(tmp_path, report_to="tensorboard", max_steps=1).train()
    assert {"loss", "meta_loss", "rater/grad_norm", "rater/learning_rate"} <= set(heard[0])


def test_any_program_trains_with_callbacks_and_checkpoints(tmp_path):
    class Lower(mlo.Level):
        def loss(self, batch, upper):
            return ((self.module(batch) - upper(batch)) ** 2).mean()

    class Upper(mlo.Level):
        def loss(self, batch, lower):
            return lower(batch).square().mean() + self.module(batch).square().mean()

    def build(**options):
        torch.manual_seed(0)
        data = [torch.randn(4, 3) for _ in range(5)]
        sgd = partial(torch.optim.SGD, lr=0.1)
        levels = [
            Upper("upper", torch.nn.Linear(3, 1), data=data, optimizer=sgd),
            Lower("lower", torch.nn.Linear(3, 1), data=data, optimizer=sgd, unroll_steps=2),
        ]
        args = MLOConfig(output_dir=str(tmp_path), use_cpu=True, logging_steps=2, save_strategy="no",
                         disable_tqdm=True, **options)  # fmt: skip
        return MLOTrainer(levels, args)

    run = build(num_train_epochs=2)
    run.train()
    assert run.state.global_step == 10 and run.program.num_steps == 5
    assert {"loss", "upper/loss", "upper/learning_rate"} <= set(run.state.log_history[0])
    with pytest.raises(ValueError, match="learning_rate=0.5 is said by the levels"):
        build(learning_rate=0.5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"meta": []}, "meta_dataset"),
        ({"train": [{"question": "a1", "answer": "a2"}]}, "question.*fit no format"),
        ({"domain_column": "topic", "reweighting": "domain"}, "topic"),
        ({"per_device_train_batch_size": 64}, "26 examples, one step takes 64"),
        ({"eval_strategy": "steps", "evaluated": False}, "needs eval_dataset"),
        ({"given": {"processing_class": None}}, "processing_class"),
        ({"model_init_kwargs": {"dtype": "fp32"}}, "model_init_kwargs"),
    ],
)
def test_what_cannot_work_is_said_before_training(change, message, tmp_path):
    if change.get("evaluated") is False:
        with pytest.raises(ValueError, match=message):
            ReweightingTrainer(tiny_llama(), arguments(tmp_path, eval_strategy="steps"), rows(26), rows(9, "more", 50),
                               processing_class=word_tokenizer())  # fmt: skip
        return
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **change)


def test_missing_meta_set_pad_token_and_losses(tmp_path, caplog):
    with pytest.raises(ValueError, match="meta_dataset is missing.*small set"):
        ReweightingTrainer(tiny_llama(), arguments(tmp_path), rows(26), processing_class=word_tokenizer())
    without_pad = word_tokenizer()
    without_pad.pad_token = None
    with pytest.raises(ValueError, match="no pad token.*eos_token"):
        trainer(tmp_path, given={"processing_class": without_pad})

    class MeanOnly(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3))

        def forward(self, **kwargs):
            return self.weight.sum()

    with pytest.raises(ValueError, match="no logits.*losses="):
        trainer(tmp_path, model=MeanOnly()).train()
    with pytest.raises(ValueError, match=r"not per example.*losses="):
        trainer(tmp_path, given={"losses": lambda model, batch: model(batch["input_ids"]).logits.mean()}).train()
    package = logging.getLogger("scalemlo")
    package.propagate = True
    trainer(tmp_path, meta=rows(9))
    assert "9 of 9 rows of meta_dataset also stand in train_dataset" in caplog.text


def test_weights_that_do_not_vary_are_reported(tmp_path, caplog):
    trainer(tmp_path, meta_learning_rate=1e-9, max_steps=1).train()
    assert "hardly vary" in caplog.text and "meta_learning_rate (1e-09)" in caplog.text


def test_plain_modules_are_saved_and_a_run_resumes_bit_for_bit(tmp_path):
    """The weights alone, under their names in the module, and everything that a resumed run needs."""

    def made(folder, **options):
        torch.manual_seed(0)
        net, above = torch.nn.Linear(3, 1), torch.nn.Linear(3, 1)
        batches = [(torch.randn(4, 3), torch.randn(4, 1)) for _ in range(4)]

        def loss_of(model, batch):
            return (model(batch[0]) - batch[1]).square().squeeze(-1)

        def fit(batch, weights, model):
            return mlo.weighted_mean(loss_of(model, batch), weights(batch[0]).sigmoid().squeeze(-1))

        def validate(batch, model):
            return mlo.mean(loss_of(model, batch))

        adam = partial(torch.optim.Adam, lr=0.1)
        levels = [
            mlo.Level("weights", above, loss=validate, data=batches[2:], optimizer=adam),
            mlo.Level("model", net, loss=fit, data=batches[:2], optimizer=adam),
        ]
        args = MLOConfig(
            output_dir=str(folder), use_cpu=True, max_steps=4, save_steps=2, report_to=[], disable_tqdm=True, **options
        )
        return MLOTrainer(levels, args)

    whole = made(tmp_path / "a")
    whole.train()
    whole.save_model()
    saved = load_file(tmp_path / "a" / "model.safetensors")
    live = whole.program["model"].module
    assert saved.keys() == {"weight", "bias"} and all(torch.equal(t, live.get_parameter(n)) for n, t in saved.items())
    resumed = made(tmp_path / "a")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for name, state in whole.program.state_dict().items():
        assert all(torch.equal(t, resumed.program.state_dict(name)[n]) for n, t in state.items())
