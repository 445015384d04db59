"""What does it save that weights stay gathered between passes, where a memory budget leaves room?

    python benchmarks/kept_weights.py [--quick] [--json PATH]

Weights of examples for a language model with LoRA adapters, fully sharded over two ranks, ``Neumann(num_terms=5)``:
every Hessian-vector product reads the frozen model as constants. Without a budget each pass gathers it block by block,
forward and backward; within one that leaves room it is gathered once while gradients are taken. Gathered are the bytes
of full tensors that the first rank receives in one outer iteration for derivatives; FSDP's own gathers, in the live
passes, are not among them. Time is CPU-seconds per rank (gloo copies on the CPU) and wall seconds per outer iteration,
medians, alternating in one process.
"""

import statistics
import tempfile
import time
from functools import partial
from typing import Any
from unittest import mock

import hvp
import measure

FULL = hvp.FULL | dict(rounds=5)
QUICK = hvp.QUICK | dict(rounds=2)
AIMS = "aims: bits equal, fewer bytes gathered"


def program_of(setting: dict, memory: Any) -> Any:
    """Two levels: one weight for each example, and the adapters."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch import nn

    import scalemlo as mlo

    class Weights(nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = nn.Parameter(torch.zeros(hvp.BATCH, 1))

        def forward(self):
            return self.logits[:, 0].sigmoid()

    class Weigh(mlo.Level):
        def loss(self, batch, finetune):
            return hvp.mean_loss(finetune, batch)

    class Finetune(mlo.Level):
        def loss(self, batch, weigh):
            losses = [hvp.mean_loss(self.module, row) for row in batch.split(1)]
            start = torch.distributed.get_rank() * len(losses)
            return mlo.weighted_mean(torch.stack(losses), weigh()[start : start + len(losses)], normalize=False)

    model, ids = hvp.problem({k: v for k, v in setting.items() if k != "rounds"})
    torch.manual_seed(1)
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, init_lora_weights=False)
    model = get_peft_model(model, config)
    adamw = partial(torch.optim.AdamW, lr=1e-3)
    estimator = mlo.Neumann(num_terms=5, step_size=0.1)
    mine = ids.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]
    return mlo.Program(
        [
            Weigh("weigh", Weights(), data=[mine], optimizer=adamw),
            Finetune("finetune", model, data=[mine], optimizer=adamw, hypergradient=estimator),
        ],
        engine=mlo.FSDP(),
        memory=memory,
    )


def gathered_bytes(step: Any) -> int:
    """Of full tensors, in one outer iteration."""
    import torch.distributed as dist

    real, found = dist.all_gather_into_tensor, 0

    def gather(out, *args, **options):
        nonlocal found
        found += out.numel() * out.element_size()
        return real(out, *args, **options)

    with mock.patch.object(dist, "all_gather_into_tensor", gather):
        step()
    return found


def measured(setting: dict) -> dict[str, float]:
    """Of the first rank."""
    import torch

    import scalemlo as mlo

    with tempfile.TemporaryDirectory() as folder:
        programs = {
            "without": program_of(setting, None),
            "within": program_of(setting, mlo.Memory(device="16GiB", disk=folder)),
        }
        for program in programs.values():
            program.run(4, progress=False)  # by then there is room
        figures = {f"{name}/gathered_bytes": gathered_bytes(p.step) for name, p in programs.items()}
        taken: dict[str, list] = {name: [] for name in programs}
        for i in range(setting["rounds"]):
            for name in list(programs)[:: 1 if i % 2 else -1]:
                start = time.perf_counter()
                cpu = measure.cpu_seconds(programs[name].step)
                taken[name].append((cpu, time.perf_counter() - start))
        for name, pairs in taken.items():
            for kind, values in zip(("cpu", "wall"), zip(*pairs, strict=True), strict=True):
                figures[f"{name}/{kind}_seconds"] = statistics.median(values)
        figures["kept_bytes"] = programs["within"]._scheduler._kept.most_bytes
        states = [program.state_dict("finetune") | program.state_dict("weigh") for program in programs.values()]
        figures["bits_equal"] = float(all(torch.equal(states[1][name], t) for name, t in states[0].items()))
    return figures


def main() -> None:
    """Measure, print a table, write the figures."""
    args = measure.arguments(__doc__)
    setting = QUICK if args.quick else FULL
    figures = {name: float(value) for name, value in measure.on_ranks(2, measured, setting).items()}
    for kind in ("gathered_bytes", "cpu_seconds", "wall_seconds"):
        figures[f"{kind}_ratio"] = figures[f"within/{kind}"] / figures[f"without/{kind}"]
    mib = 2**20
    print(f"{measure.machine()}; {AIMS}\n")
    print("| budget | kept MiB | gathered MiB per iteration | CPU-s per iteration | wall s |")
    print("| --- | --- | --- | --- | --- |")
    for name, kept in (("without", 0.0), ("within", figures["kept_bytes"])):
        cells = [f"{figures[f'{name}/{kind}_seconds']:.3f}" for kind in ("cpu", "wall")]
        print(f"| {name} | {kept / mib:.1f} | {figures[f'{name}/gathered_bytes'] / mib:.1f} | {' | '.join(cells)} |")
    print(f"\nBits equal: {bool(figures['bits_equal'])}.")
    measure.write_figures(args.json, figures)


if __name__ == "__main__":
    main()
