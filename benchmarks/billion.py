"""One outer iteration of a 1.1-billion-parameter Llama on two ranks of a CPU: planned and measured bytes.

    python benchmarks/billion.py [--quick] [--json PATH]

Fine-tuning all parameters on weighted examples, FSDP: the gradient of the upper loss, one exact Hessian-vector product
(Neumann with one term), the exact mixed partial, and the steps of both levels. Weights are random, in bf16, as are
gradients and directions; SGD. The shapes are TinyLlama's; sequences are short, as CPUs without bf16 instructions take
seconds for one matrix product in it, and bytes are those of weights and directions. Measured is what resident bytes of
a rank grow by, with an allocator that returns memory at once, after a tiny program that loads what is loaded lazily.
Needs 24 GiB of RAM. `--quick` takes two of the 22 layers and a small vocabulary.
"""

import json
import time
from functools import partial
from typing import Any

import measure

SHAPE = dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
             num_key_value_heads=4, vocab_size=32000, tie_word_embeddings=False)  # fmt: skip
QUICK = SHAPE | dict(num_hidden_layers=2, vocab_size=2000)
TINY = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=64, tie_word_embeddings=False)  # fmt: skip
RANKS, BATCH, LENGTH = 2, 2, 8


def build(shape: dict) -> Any:
    """The program."""
    import torch
    from torch import nn
    from transformers import LlamaConfig, LlamaForCausalLM
    from weighing import Finetune, Weigh

    import scalemlo as mlo
    from scalemlo.planning.plan import simulated_layers

    torch.manual_seed(0)
    layers = simulated_layers(shape["num_hidden_layers"])
    config = LlamaConfig(**shape | {"num_hidden_layers": layers}, max_position_embeddings=LENGTH, use_cache=False)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    ids = torch.randint(0, shape["vocab_size"], (BATCH, LENGTH))
    data = [{"input_ids": ids, "labels": ids}]
    sgd = partial(torch.optim.SGD, lr=1e-2)
    net = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1), nn.Sigmoid())
    upper = Weigh("weights", net, data=data, optimizer=sgd, engine=mlo.FSDP())
    lower = Finetune(
        "finetune", model, normalize=False, data=data, optimizer=sgd, max_grad_norm=1.0,
        hypergradient=mlo.Neumann(num_terms=1),
    )  # fmt: skip
    return mlo.Program([upper, lower], engine=mlo.FSDP(dtype="bf16"))


def measured(shape: dict) -> dict[str, float]:
    """Bytes that a rank grows by in one outer iteration, its seconds, and what it computed."""
    build(TINY).step()
    found: dict[str, float] = {}

    def run() -> None:
        program = build(shape)
        start, cpu = time.perf_counter(), time.process_time()
        record = program.step()
        found.update(seconds=time.perf_counter() - start, cpu_seconds=time.process_time() - cpu)
        found.update({key: value for key, value in record.items() if key != "step"})

    found["bytes"] = measure.peak_growth_bytes(run)
    return found


def worker(what: str, shape: dict) -> list:
    """In a fresh process: the plan, or the measurement."""
    if what == "plan":
        from scalemlo.planning.planner import plan

        layers = shape["num_hidden_layers"]
        found = plan(lambda: build(shape), world_size=RANKS, accelerator=False, num_layers=layers)
        return [{"bytes": found.peak_bytes, "persistent": found.persistent_bytes, "phase": found.peak_phase.name}]
    import transformers.models.llama  # noqa: F401 (before the ranks are forked)

    import scalemlo  # noqa: F401

    return [measure.on_ranks(RANKS, measured, shape)]


def main() -> None:
    """Plan, measure, print and write."""
    options = measure.arguments(__doc__)
    if options.worker:
        print(json.dumps(worker(**json.loads(options.worker))))
        return
    shape = QUICK if options.quick else SHAPE
    (plan,) = measure.in_fresh_process(__file__, {}, what="plan", shape=shape)
    (run,) = measure.in_fresh_process(__file__, measure.EXACT_MEMORY, what="measure", shape=shape)
    parameters = number_of_parameters(shape)
    error = plan["bytes"] / run["bytes"] - 1
    print(f"{measure.machine()}; {RANKS} ranks, {BATCH} x {LENGTH} tokens, bf16, one thread each\n")
    print(
        "| parameters | persistent GiB | planned peak GiB | measured peak GiB | error | s | CPU-s per rank | peak in |"
    )
    print("|" + " --- |" * 8)
    sizes = [plan["persistent"], plan["bytes"], run["bytes"]]
    cells = [f"{parameters / 1e9:.2f} billion", *(f"{size / 2**30:.2f}" for size in sizes), f"{error:+.1%}"]
    print("| " + " | ".join([*cells, f"{run['seconds']:.0f}", f"{run['cpu_seconds']:.0f}", plan["phase"]]) + " |")
    norms = {key: value for key, value in run.items() if key.startswith(("loss", "gradient_norm"))}
    print("\n" + ", ".join(f"{key} {value:.4g}" for key, value in norms.items()))
    figures = {"parameters": float(parameters), "planned_bytes": float(plan["bytes"]), "relative_error": error}
    measure.write_figures(options.json, figures | {"measured_bytes": float(run["bytes"]), "seconds": run["seconds"]})


def number_of_parameters(shape: dict) -> int:
    """Of the language model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return sum(p.numel() for p in LlamaForCausalLM(LlamaConfig(**shape)).parameters())


if __name__ == "__main__":
    main()
