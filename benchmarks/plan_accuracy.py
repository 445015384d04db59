"""How far is the peak that `scalemlo plan` foretells from the one that is measured?

    python benchmarks/plan_accuracy.py [--quick] [--json PATH]

Small Llamas are fine-tuned on weighted examples, two outer iterations, on one and two ranks of the CPU, and planned for
the same. Measured is the most resident bytes of the first rank over those before the program was built, with an
allocator that returns memory at once, after a run of a tiny program that loads what is loaded lazily: the kernel's
account, which knows nothing of tensors. Planned is the tracker's count of a run on fake tensors.
"""

import json
import statistics
from typing import Any

import measure

FULL = dict(vocab_size=4000, hidden_size=512, num_hidden_layers=2, length=192)
TINY = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, length=16)
BATCH = 8
AIMS = "aims: median relative error at most 5 %, worst at most 10 %"

ESTIMATORS: dict[str, dict[str, Any]] = {
    "Identity()": {},
    "SAMA()": {},
    "Neumann(num_terms=2)": {},
    "Unrolled()": {"unroll_steps": 4},
}
CASES: list[dict[str, Any]] = [
    dict(engine=engine, world_size=world_size, estimator=estimator, **extra)
    for engine, world_size in (("Single", 1), ("DDP", 2), ("FSDP", 2))
    for estimator, extra in ESTIMATORS.items()
]
CASES += [
    dict(engine="FSDP", world_size=1, estimator="Neumann(num_terms=2)"),
    dict(engine="Single", world_size=1, estimator="Identity()", lora=True),
    dict(engine="FSDP", world_size=2, estimator="Identity()", dtype="bf16"),
]
QUICK = [CASES[0], CASES[8]]


def build(setting: dict, case: dict) -> Any:
    """The program of a case."""
    from functools import partial

    import torch
    from torch import nn
    from transformers import LlamaConfig, LlamaForCausalLM
    from weighing import Finetune, Weigh

    import scalemlo as mlo

    torch.manual_seed(0)
    width, length = setting["hidden_size"], setting["length"]
    model: nn.Module = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=setting["vocab_size"], hidden_size=width, intermediate_size=3 * width, use_cache=False,
            num_hidden_layers=setting["num_hidden_layers"], num_attention_heads=8, num_key_value_heads=4,
            max_position_embeddings=length,
        )
    )  # fmt: skip
    if case.get("lora"):
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    ids = torch.randint(0, setting["vocab_size"], (BATCH, length))
    data = [{"input_ids": ids, "labels": ids}]
    upper = Weigh(
        "weights",
        nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1), nn.Sigmoid()),
        data=data,
        optimizer=partial(torch.optim.Adam, lr=1e-3),
    )
    lower = Finetune(
        "finetune",
        model,
        # Of equal losses the derivative by normalised weights is zero, and the check of ghost products against it
        # would end as rounding has it.
        normalize=False,
        data=data,
        optimizer=partial(torch.optim.AdamW, lr=1e-4),
        hypergradient=eval(f"mlo.{case['estimator']}", {"mlo": mlo}),
        unroll_steps=case.get("unroll_steps", 1),
        max_grad_norm=1.0,
    )
    return mlo.Program([upper, lower], engine=getattr(mlo, case["engine"])(dtype=case.get("dtype", "fp32")))


def measured(setting: dict, case: dict) -> int:
    """Bytes that two iterations grow the process by, on a rank."""

    def run(setting: dict) -> None:
        program = build(setting, case)
        program.step()
        program.step()

    run(TINY)
    return measure.peak_growth_bytes(lambda: run(setting))


def planned(setting: dict, case: dict) -> dict:
    """The plan of a case, and bytes at the peak by kind."""
    import scalemlo as mlo

    plan = mlo.plan(lambda: build(setting, case), world_size=case["world_size"], accelerator=False)
    phase = plan.peak_phase
    return {"bytes": plan.peak_bytes, "phase": phase.name, "kinds": {k: round(v) for k, v in phase.peak.items()}}


def worker(what: str, cases: list[dict]) -> list:
    """In a fresh process: all plans, or one measurement."""
    if what == "plan":
        return [planned(FULL, case) for case in cases]
    import peft  # noqa: F401 (before the ranks are forked)
    import torch  # noqa: F401
    import transformers.models.llama  # noqa: F401

    import scalemlo  # noqa: F401

    return [measure.on_ranks(cases[0]["world_size"], measured, FULL, cases[0])]


def main() -> None:
    """Measure, print and write."""
    options = measure.arguments(__doc__)
    if options.worker:
        print(json.dumps(worker(**json.loads(options.worker))))
        return
    cases = QUICK if options.quick else CASES
    plans = measure.in_fresh_process(__file__, {}, what="plan", cases=cases)
    errors = []
    print(f"{measure.machine()}\n")
    print("| engine | ranks | estimator | planned MiB | measured MiB | error | peak in |\n|" + " --- |" * 7)
    for case, plan in zip(cases, plans, strict=True):
        (truth,) = measure.in_fresh_process(__file__, measure.EXACT_MEMORY, what="measure", cases=[case])
        errors.append(plan["bytes"] / truth - 1)
        name = " ".join([case["estimator"], *(["LoRA"] if case.get("lora") else []), case.get("dtype", "")]).strip()
        cells = [case["engine"], case["world_size"], name, f"{plan['bytes'] / 2**20:.1f}", f"{truth / 2**20:.1f}"]
        print("| " + " | ".join(map(str, [*cells, f"{errors[-1]:+.1%}", plan["phase"]])) + " |", flush=True)
    absolute = [abs(error) for error in errors]
    median, worst = statistics.median(absolute), max(absolute)
    print(f"\nmedian error {median:.1%}, worst {worst:.1%} ({AIMS})")
    measure.write_figures(options.json, {"median_relative_error": median, "worst_relative_error": worst})


if __name__ == "__main__":
    main()
