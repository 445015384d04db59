"""What do large models take per rank? Planned, not run: fine-tuning on weighted examples with every parameter trained.

    python benchmarks/simulated_models.py [--quick] [--json PATH]

bf16 compute, fp32 masters and AdamW moments, FSDP, gradient checkpointing of the live model, one sequence of 2048
tokens per rank and step of either level, as on accelerators. What unrolling keeps on the host stands apart. Models are
extrapolated from 4, 6 and 8 layers, see docs/plan.md. One row is planned within a memory budget, with all layers, as
what is evicted is not linear in their number: states move to the host.
"""

import time

import measure

LENGTH = 2048
BUDGET = "80GiB"
MODELS = {
    "Llama-3.1-8B": (8, dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                             num_key_value_heads=8, vocab_size=128256)),
    "Qwen2.5-32B": (8, dict(hidden_size=5120, intermediate_size=27648, num_hidden_layers=64, num_attention_heads=40,
                            num_key_value_heads=8, vocab_size=152064)),
    "Llama-3.1-70B": (64, dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
                               num_key_value_heads=8, vocab_size=128256)),
    "Llama-3.1-405B": (512, dict(hidden_size=16384, intermediate_size=53248, num_hidden_layers=126,
                                 num_attention_heads=128, num_key_value_heads=8, vocab_size=128256)),
}  # fmt: skip
ESTIMATORS = {"SAMA": ("SAMA()", 1), "Neumann-5": ("Neumann(num_terms=5)", 1), "unrolled-8": ("Unrolled()", 8)}
WITHIN = {("Qwen2.5-32B", "Identity"): ("Identity()", "78GiB")}
"""Rows once without and once within a budget, which leaves 2 GiB to the CUDA context and workspaces."""


def build(shape: dict, estimator: str, unroll_steps: int, world_size: int, device: str | None = None):
    """The program."""
    from functools import partial

    import torch
    from torch import nn
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
    from weighing import Finetune, Weigh

    import scalemlo as mlo
    from scalemlo.planning.plan import simulated_layers

    layers = simulated_layers(shape["num_hidden_layers"])
    kinds = (Qwen2Config, Qwen2ForCausalLM) if shape["vocab_size"] == 152064 else (LlamaConfig, LlamaForCausalLM)
    config = kinds[0](**{**shape, "num_hidden_layers": layers}, max_position_embeddings=LENGTH, use_cache=False)
    config.tie_word_embeddings = False
    model = kinds[1](config)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()  # a hook that only adapters on frozen weights need, and torch.func refuses
    ids = torch.zeros(world_size, LENGTH, dtype=torch.long)
    data = [{"input_ids": ids, "labels": ids}]
    adamw = partial(torch.optim.AdamW, lr=1e-5)
    upper = Weigh(
        "weights", nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 1), nn.Sigmoid()), data=data,
        optimizer=adamw, engine=mlo.FSDP(),
    )  # fmt: skip
    lower = Finetune(
        "finetune", model, normalize=True, data=data, optimizer=adamw, unroll_steps=unroll_steps, max_grad_norm=1.0,
        hypergradient=eval(f"mlo.{estimator}", {"mlo": mlo}),
    )  # fmt: skip
    memory = None if device is None else mlo.Memory(device=device)
    return mlo.Program([upper, lower], engine=mlo.FSDP(dtype="bf16"), memory=memory)


def main() -> None:
    """Plan, print and write."""
    options = measure.arguments(__doc__)
    from scalemlo.memory.sizes import format_bytes
    from scalemlo.planning.planner import plan

    models = dict(list(MODELS.items())[:1]) if options.quick else MODELS
    estimators = dict(list(ESTIMATORS.items())[:1]) if options.quick else ESTIMATORS
    figures: dict[str, float] = {}
    print(f"| model | ranks | estimator | persistent | peak | host | seconds (est.) | fits {BUDGET} | planned in |")
    print("|" + " --- |" * 9)

    def row(model: str, name: str, estimator: str, unroll_steps: int, device: str | None = None) -> None:
        world_size, shape = MODELS[model]
        start = time.perf_counter()
        found = plan(
            lambda: build(shape, estimator, unroll_steps, world_size, device),
            world_size=world_size, device_memory=BUDGET, num_layers=shape["num_hidden_layers"],
        )  # fmt: skip
        persistent, peak, seconds, fits = found.summary
        took = time.perf_counter() - start
        name += f" within {device}" if device else ""
        host = format_bytes(found.host_bytes + found.away_bytes)
        cells = [model, world_size, name, persistent, peak, host, seconds, fits]
        print("| " + " | ".join(map(str, [*cells, f"{took:.0f} s"])) + " |", flush=True)
        figures[f"peak_gib/{model}/{name}"] = found.peak_bytes / 2**30

    for model in models:
        for name, (estimator, unroll_steps) in estimators.items():
            row(model, name, estimator, unroll_steps)
    for (model, name), (estimator, device) in () if options.quick else WITHIN.items():
        row(model, name, estimator, 1)
        row(model, name, estimator, 1, device)
    measure.write_figures(options.json, figures)


if __name__ == "__main__":
    main()
