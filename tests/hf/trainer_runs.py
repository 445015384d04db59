"""A tiny reweighting run that the trainers' tests share."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from scalemlo.hf import ReweightingConfig, ReweightingTrainer
from tests.hf.words import word_tokenizer


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=2, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def rows(count: int, word: str = "ask", start: int = 0) -> list[dict]:
    numbers = range(start, start + count)
    return [
        {
            "prompt": f"a{i % 40} {word}",
            "completion": f" a{(i + 1) % 40} a{i * 7 % 40}" + (" a3 a4" if i % 3 == 0 else ""),
            "source": "xyz"[i % 2],
        }
        for i in numbers
    ]


def arguments(folder, **options) -> ReweightingConfig:
    given = dict(
        output_dir=str(folder), use_cpu=True, per_device_train_batch_size=8, max_steps=6, logging_steps=1,
        learning_rate=1e-2, meta_learning_rate=0.1, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    return ReweightingConfig(**(given | options))


def trainer(folder, *, model=None, train=None, meta=None, evaluated=None, given=None, **options) -> ReweightingTrainer:
    return ReweightingTrainer(
        model if model is not None else tiny_llama(),
        arguments(folder, **options),
        train if train is not None else rows(26),
        meta if meta is not None else rows(9, "more", 50),
        evaluated if evaluated is not None else rows(7, "be", 90),
        **({"processing_class": word_tokenizer()} | (given or {})),
    )


def weights_of(trained: ReweightingTrainer) -> dict[str, torch.Tensor]:
    """All weights of both levels, on rank 0."""
    return {
        f"{level}.{name}": t.clone()
        for level in ("rater", "finetune")
        for name, t in trained.program.state_dict(level).items()
    }


def losses_of(trained: ReweightingTrainer) -> list[tuple]:
    """What was logged of the levels and of evaluations, without times."""
    names = ("step", "epoch", "loss", "grad_norm", "learning_rate", "meta_loss", "rater/grad_norm", "eval_loss")
    return [tuple(log.get(name) for name in names) for log in trained.state.log_history]
