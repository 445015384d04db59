"""How many bytes does a rank keep by engine and number of ranks, and are products on the shards exact?

    python benchmarks/shard_scaling.py [--quick] [--json PATH]

A language model in bf16 with AdamW and two micro-batches a step. Counted are the storages, padding included, of what
lies between two micro-batches and at the step: the weights that the module computes with, masters where they are apart
from them, gradients, and AdamW's moments; of the rank that has the most. Buffers of collectives are not among them.
Ideal is the W = 1 sum divided by W, which engines that keep something whole do not aim at. "on the host" is the part
of them that offloading takes off the device.

The product is ``H v`` in fp32 by rematerialised units on two ranks: its error, relative, against double backward in
fp64 in one process, and what lies gathered while anything computes, in units (see ``hvp.py``).
"""

import gc
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import hvp
import measure

QUICK = hvp.QUICK | dict(vocab_size=301)  # an odd number of rows, so that there is padding
FULL = hvp.QUICK | dict(vocab_size=2001, hidden_size=256, intermediate_size=704)
AIMS = "aims: ZeRO-3 and FSDP at most 1.05 of ideal, products at most 1e-5 off with at most 2.1 units held"

ENGINES = {
    "DDP": ("DDP", {}),
    "FSDP": ("FSDP", {}),
    "ZeRO-1": ("DeepSpeed", {"stage": 1}),
    "ZeRO-2": ("DeepSpeed", {"stage": 2}),
    "ZeRO-3": ("DeepSpeed", {"stage": 3}),
    "ZeRO-3 + offload": ("DeepSpeed", {"stage": 3, "offload_optimizer": True}),
}
EXACT = ["FSDP", "ZeRO-3"]


# ---- on the ranks ----------------------------------------------------------------------------------------------------
def program_of(setting: dict, engine: str, dtype: str) -> tuple[Any, Any]:
    """The program of one level, and the token ids of a batch."""
    import torch

    import scalemlo as mlo

    class Train(mlo.Level):
        def loss(self, batch):
            return hvp.mean_loss(self.module, batch)

    model, ids = hvp.problem(setting)
    adamw = partial(torch.optim.AdamW, lr=1e-3)
    level = Train("train", model, data=[ids, ids], optimizer=adamw, gradient_accumulation_steps=2)
    kind, options = ENGINES[engine]
    return mlo.Program([level], engine=getattr(mlo, kind)(dtype=dtype, **options)), model


def kept_bytes(setting: dict, engine: str) -> dict[str, int]:
    """Bytes by what they are for, of the rank that has the most."""
    import torch
    import torch.distributed as dist

    program, model = program_of(setting, engine, "bf16")
    trainer = program.trainers["train"]
    held = trainer.engine
    found: dict[str, int] = {"gradients": 0}
    between, put = held.live_pass, held.put_gradients

    def note_gradients(tensors) -> None:
        found["gradients"] = max(found["gradients"], _bytes([held.to_local(t) for t in tensors if t is not None])[0])

    class Pass:
        def __init__(self, **options):
            self._context = between(**options)

        def __enter__(self):
            return self._context.__enter__()

        def __exit__(self, *error):
            suppressed = self._context.__exit__(*error)
            note_gradients(getattr(p, kind, None) for p in model.parameters() for kind in ("grad", "grad_accum"))
            return suppressed

    def put_and_note(gradients) -> None:
        note_gradients(gradients.values())
        put(gradients)

    held.live_pass, held.put_gradients = Pass, put_and_note
    program.run(2, progress=False)
    weights = [held.to_local(getattr(p, "ds_tensor", p)) for p in model.parameters()]
    found["weights"], seen = _bytes(weights)
    found["masters"], seen = _bytes([held.to_local(p) for p in held.parameters.values()], seen)
    states = [held.to_local(t) for s in trainer.optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
    found["moments"], _ = _bytes([t for t in states if t.dim() > 0], seen)
    found["total"] = sum(found.values())
    offloaded = ["masters", "gradients", "moments"] if "offload_optimizer" in ENGINES[engine][1] else []
    found["on the host"] = sum(found[kind] for kind in offloaded)
    most = torch.tensor([found[kind] for kind in sorted(found)])
    if dist.is_initialized():
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return dict(zip(sorted(found), most.tolist(), strict=True))


def _bytes(tensors: list, seen: frozenset[int] = frozenset()) -> tuple[int, frozenset[int]]:
    """Bytes of the storages of tensors that are not among those seen, and all of them."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(size for key, size in storages.items() if key not in seen), seen | storages.keys()


def product(setting: dict, engine: str, reference: str) -> dict[str, float]:
    """The product's error, and the units held."""
    import torch

    import scalemlo as mlo
    from scalemlo.derivatives.hessian import hessian

    program, model = program_of(setting, engine, "fp32")
    v = hvp.direction(hvp.problem(setting)[0])
    program.gradients()  # takes the batch
    trainer = program.trainers["train"]
    held = trainer.engine
    v = mlo.Shards(held.shard(v), held.group)
    expected = mlo.Shards(held.shard(torch.load(reference, mmap=True)), held.group)
    found: list[mlo.Shards] = []

    def take() -> None:
        with hessian(trainer.loss_at(), trainer.block, "remat") as operator:
            found.append(operator(v))

    unit_bytes = 2 * 4 * max(sum(held.shape(n).numel() for n in unit.names) for unit in held.skeleton.units)
    counts = hvp.counted(take, unit_bytes)
    difference = found[0].map(torch.Tensor.double) - expected
    return {"error": float(difference.norm() / expected.norm()), "held_units": counts["held_units"]}


def worker(setting: dict, num_ranks: list[int], reference: str) -> list[dict]:
    """Bytes of every engine and number of ranks, then the products; each in processes of its own."""
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  what is imported late, once for all forks
    from transformers import LlamaForCausalLM  # noqa: F401

    import scalemlo  # noqa: F401

    gc.freeze()  # DeepSpeed collects garbage for every engine, and there is much that is imported
    measure.on_ranks(1, hvp.write_reference, setting, reference)
    found = []
    for engine in ENGINES:
        for ranks in num_ranks:
            kept = measure.on_ranks(ranks, kept_bytes, setting, engine)
            found.append({"engine": engine, "ranks": ranks} | kept)
    return found + [{"engine": e, "ranks": 2} | measure.on_ranks(2, product, setting, e, reference) for e in EXACT]


# ---- the tables ------------------------------------------------------------------------------------------------------
def main() -> None:
    """Run, print the tables, write the figures."""
    options = measure.arguments(__doc__)
    if options.worker:
        print(json.dumps(worker(**json.loads(options.worker))))
        return
    setting, num_ranks = (QUICK, [1, 2]) if options.quick else (FULL, [1, 2, 4])
    with tempfile.TemporaryDirectory() as folder:
        reference = str(Path(folder) / "reference.pt")
        found = measure.in_fresh_process(
            __file__, measure.STEADY_TIME, setting=setting, num_ranks=num_ranks, reference=reference
        )
    print(f"{measure.machine()}; one thread per rank; {setting}, batch {hvp.BATCH}\n{AIMS}\n")
    report(found, options.json)


def report(found: list[dict], path: Path | None) -> None:
    """Print what was found and write the figures."""
    from scalemlo.reporting.tables import markdown_table

    figures: dict[str, float] = {}
    kinds = ["weights", "masters", "gradients", "moments", "total", "on the host"]
    kept = [row for row in found if "total" in row]
    whole = {row["engine"]: row["total"] for row in kept if row["ranks"] == 1}
    rows = []
    for row in kept:
        ratio = row["total"] * row["ranks"] / whole[row["engine"]]
        figures[f"kept_mebibytes_{_place(row)}"], figures[f"over_ideal_{_place(row)}"] = row["total"] / 2**20, ratio
        rows.append([row["engine"], row["ranks"], *(f"{row[k] / 2**20:.2f}" for k in kinds), f"{ratio:.3f}"])
    print(markdown_table(["engine", "ranks", *(f"{k}, MiB" for k in kinds), "over ideal"], rows))
    rows = []
    for row in found[len(kept) :]:
        figures[f"error_{_place(row)}"], figures[f"held_units_{_place(row)}"] = row["error"], row["held_units"]
        rows.append([row["engine"], row["ranks"], f"{row['error']:.1e}", f"{row['held_units']:.2f}"])
    print()
    print(markdown_table(["engine", "ranks", "error of H v", "held units"], rows))
    measure.write_figures(path, {name: float(f"{value:.4g}") for name, value in figures.items()})


def _place(row: dict) -> str:
    return f"{row['engine'].lower().replace('-', '').replace(' + ', '_')}_w{row['ranks']}"


if __name__ == "__main__":
    main()
