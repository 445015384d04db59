"""The recipe on a tiny Llama and made data, and ways to launch it; for tests that run the command itself."""

import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "160"}

WORDS = ["<pad>", "<end>", "<unk>", "user", "assistant", *(f"q{i}" for i in range(20)), *(f"a{i}" for i in range(20))]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
CONFIG = """\
recipe: reweight_instructions
output_dir: {folder}/run
model: {{name: {folder}/model, lora: {{r: 4, alpha: 8}}}}
data: {{name: {folder}/data.jsonl, num_train: 48, num_meta: 16, num_heldout: 13, corrupt_fraction: 0.5, max_length: 16}}
train: {{steps: 4, unroll_steps: 2, batch_size: 8, meta_batch_size: 8, eval_every: 2, eval_batch_size: 4}}
finetune: {{learning_rate: 1.0e-2, lr_scheduler_type: linear, warmup_steps: 2}}
weights: {{learning_rate: 0.3}}
plan: false
"""


def write_recipe(folder: Path) -> Path:
    """A tiny Llama, a tokenizer of whole words, 100 questions and ``run.yaml``, which trains for four outer steps."""
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<end>", unk_token="<unk>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    rows = [{"prompt": f"q{i % 20} q{i // 20}", "completion": f"a{i % 20} a{(3 * i) % 20}"} for i in range(100)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "run.yaml").write_text(CONFIG.format(folder=folder))
    return folder
