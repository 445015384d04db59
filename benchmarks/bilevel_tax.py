"""What does a bilevel step cost over the plain steps it contains?

    python benchmarks/bilevel_tax.py [--quick] [--json PATH]

Variants: ``plain``; ``exact``, the forward derivative of the losses; ``fd``, central differences of them; ``ghost``,
products out of the lower step's own backward pass, which share its forward. The language model trains whole (``full``)
or through LoRA of rank 8 in all its linear layers but the head (``lora``), its base frozen.

One outer iteration of example reweighting (weight net above, language model below) is K lower steps and one upper step.
The upper step needs the gradient of the upper loss by the language model (a plain backward) and the mixed partial. The
tax is the whole iteration over K plain lower steps plus one plain backward of the upper loss, written in plain PyTorch
with the same model, kernels, tokens and optimizer: CPU-seconds of the process, one thread, and peak resident bytes
grown since before the model was built. Each figure is the median over rounds in which all variants ran side by side.
"""

import json
import statistics
import time
from functools import partial

import measure

from scalemlo.reporting.tables import markdown_table

UNROLL_STEPS = (1, 4)
MODEL = dict(
    vocab_size=2000, hidden_size=512, intermediate_size=1408, num_attention_heads=8,
    num_key_value_heads=8, max_position_embeddings=128, use_cache=False, attn_implementation="eager",
)  # fmt: skip
BATCH, LENGTH = 4, 128


def worker(cases: list, num_iterations: int, num_layers: int) -> list[dict]:
    """Median CPU-seconds of one outer iteration and peak bytes, of one case after the other."""
    return [measured(*case, num_iterations, num_layers) for case in cases]


def measured(trained: str, variant: str, unroll_steps: int, num_iterations: int, num_layers: int) -> dict:
    """One case."""
    import torch
    import torch.nn.functional as F
    from peft import LoraConfig, get_peft_model
    from torch import nn
    from transformers import LlamaConfig, LlamaForCausalLM

    import scalemlo as mlo
    from scalemlo.history import peak_bytes, reset_peak_bytes

    torch.set_num_threads(1)
    torch.manual_seed(0)
    cpu = torch.device("cpu")
    reset_peak_bytes(cpu)
    before = peak_bytes(cpu)
    model = LlamaForCausalLM(LlamaConfig(**MODEL, num_hidden_layers=num_layers))
    if trained == "lora":
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    net = nn.Sequential(nn.Linear(1, 16), nn.ReLU(), nn.Linear(16, 1), nn.Sigmoid())
    train, meta = ([torch.randint(0, 2000, (BATCH, LENGTH)) for _ in range(4)] for _ in range(2))

    def losses(lm, ids):
        logits = lm(input_ids=ids).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(BATCH, -1).mean(1)

    class Finetune(mlo.Level):
        def loss(self, batch, rater):
            per_example = losses(self.module, batch)
            return mlo.weighted_mean(per_example, rater(per_example.detach()[:, None])[:, 0])

    class Rate(mlo.Level):
        def loss(self, batch, finetune):
            return losses(finetune, batch).mean()

    adamw = partial(torch.optim.AdamW, lr=1e-5)
    if variant == "plain":
        optimizers = adamw([p for p in model.parameters() if p.requires_grad]), adamw(net.parameters())

        def iteration():
            for k in range(unroll_steps):
                per_example = losses(model, train[k % 4])
                weights = net(per_example.detach()[:, None])[:, 0]
                ((weights * per_example).sum() / weights.sum()).backward()
                optimizers[0].step()
                for optimizer in optimizers:
                    optimizer.zero_grad()
            losses(model, meta[0]).mean().backward()
            for optimizer in optimizers:
                optimizer.zero_grad()
    else:
        mixed = {"exact": "forward", "fd": "finite_difference", "ghost": "ghost"}[variant]
        levels = [
            Rate("rater", net, data=meta, optimizer=adamw),
            Finetune("finetune", model, data=train, optimizer=adamw, unroll_steps=unroll_steps,
                     hypergradient=mlo.Identity(mixed=mixed)),
        ]  # fmt: skip
        program = mlo.Program(levels)
        iteration = program.step

    iteration()
    seconds, peak = [], 0
    for _ in range(num_iterations):
        reset_peak_bytes(cpu)
        start = time.process_time()
        iteration()
        seconds.append(time.process_time() - start)
        peak = max(peak, peak_bytes(cpu))
    if variant != "plain":  # a program measures its phases, and each measurement starts the system's counter anew
        peak = max(stats.peak_bytes for stats in program.history.phases.values())
    return {"cpu_seconds": statistics.median(seconds), "peak_bytes": peak - before}


def main() -> None:
    """Run the rounds, print the table, write the figures."""
    options = measure.arguments(__doc__)
    if options.worker:
        print(json.dumps(worker(**json.loads(options.worker))))
        return
    variants = ("plain", "exact", "fd", "ghost")
    cases = [("full", v, k) for k in UNROLL_STEPS for v in variants if k == 1 or v != "fd"]
    cases += [("lora", v, 1) for v in variants if v != "fd"]
    num_layers, rounds, num_iterations = (3, 1, 1) if options.quick else (8, 3, 2)
    run = partial(measure.in_fresh_process, __file__, num_iterations=num_iterations, num_layers=num_layers)
    found: dict[tuple[str, str, int], list[dict]] = {case: [] for case in cases}
    for i_round in range(rounds):
        # quick: all cases in one process; memory hardly varies: measured in the first round, of one unroll step
        timed = run(measure.STEADY_TIME, cases=cases) if options.quick else None
        for i, case in enumerate(cases):
            seconds = (timed or run(measure.STEADY_TIME, cases=[case]) * len(cases))[i]["cpu_seconds"]
            is_weighed = i_round == 0 and case[::2] == ("full", 1)
            weighed = run(measure.EXACT_MEMORY, cases=[case])[0] if is_weighed else None
            found[case].append({"cpu_seconds": seconds} | ({"peak_bytes": weighed["peak_bytes"]} if weighed else {}))
    figures, rows = {}, []
    for case in cases:
        trained, variant, k = case
        pairs = list(zip(found[case], found[trained, "plain", k], strict=True))
        time_ratio = statistics.median(a["cpu_seconds"] / b["cpu_seconds"] for a, b in pairs)
        row = [
            trained,
            variant,
            k,
            f"{statistics.median(a['cpu_seconds'] for a, _ in pairs):.2f}",
            f"{time_ratio:.2f}",
            "",
            "",
        ]
        if "peak_bytes" in pairs[0][0]:
            a, b = (result["peak_bytes"] for result in pairs[0])
            row[5:] = [f"{a / 2**20:.0f}", f"{a / b:.2f}"]
            figures["peak_over_plain"] = max(figures.get("peak_over_plain", 0.0), round(a / b, 3))
        rows.append(row)
        if variant != "plain":
            figures[f"tax_{variant}_unroll{k}" + ("_lora" if trained == "lora" else "")] = round(time_ratio, 3)
    print(
        f"{measure.machine()}; one thread; Llama of {num_layers} layers, width 512, batch {BATCH} x {LENGTH}; "
        f"{rounds} round(s)\n"
    )
    print(
        markdown_table(
            ["trained", "variant", "unroll steps", "CPU-s", "time / plain", "peak MiB", "peak / plain"], rows
        )
    )
    measure.write_figures(options.json, figures)


if __name__ == "__main__":
    main()
