"""What does a Hessian-vector product of a sharded language model cost, in gradients of the same model?

    python benchmarks/hvp.py [--quick] [--json PATH] [--peers-python PATH]

``remat`` takes every product anew through rematerialised units; ``retain`` builds the graph of the gradient once and
takes each further product out of it. Time is CPU-seconds per rank, in units of one plain and of one checkpointed
gradient (``gradient_checkpointing_enable``) of the same model on the same engine by plain PyTorch or plain FSDP2: the
median over rounds of ratios measured side by side. Growth is the most resident bytes over those before the call, of the
first rank. The global batch is the same for every number of ranks.

Gathered bytes are those of storages made by a gather and still alive, in units: the weights and the direction of the
largest block. ``held`` is what lies gathered while anything computes; ``in flight`` adds the buffers of the collective
in hand. Errors are relative, against double backward over the whole batch in fp64 in one process.

The peers hold the whole model in one process; none of them has a product on shards.
"""

import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import measure

FULL = dict(vocab_size=4000, hidden_size=512, intermediate_size=1408, num_hidden_layers=5, length=256)
QUICK = dict(vocab_size=300, hidden_size=128, intermediate_size=352, num_hidden_layers=3, length=64)
BATCH = 4
AIMS = "aims: remat at most 3.3 checkpointed gradients and 2 units held, a further retained product 2.2 gradients"


# ---- the problem -----------------------------------------------------------------------------------------------------
def problem(setting: dict) -> tuple[Any, Any]:
    """The model in fp32, and token ids ``[B, T]``; the same on every call."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {k: v for k, v in setting.items() if k != "length"}
    config = LlamaConfig(
        **shape, num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=setting["length"],
        use_cache=False, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config), torch.randint(0, setting["vocab_size"], (BATCH, setting["length"]))


def direction(model) -> dict[str, Any]:
    """A random vector over the parameters, fp32."""
    import torch

    generator = torch.Generator().manual_seed(1)
    return {n: torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()}


def mean_loss(model, ids) -> Any:
    """Mean next-token cross entropy; every example has the same number of tokens."""
    import torch.nn.functional as F

    logits = model(input_ids=ids).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def write_reference(setting: dict, path: str) -> None:
    """``H v`` in fp64 by double backward."""
    import torch

    model, ids = problem(setting)
    v = direction(model)
    model.double()
    weights = dict(model.named_parameters())
    gradients = torch.autograd.grad(mean_loss(model, ids), list(weights.values()), create_graph=True)
    found = torch.autograd.grad(gradients, list(weights.values()), [v[n].double() for n in weights])
    torch.save(dict(zip(weights, found, strict=True)), path)


# ---- scalemlo --------------------------------------------------------------------------------------------------------
def sharded(setting: dict, engine: str, rounds: int, reference: str) -> dict:
    """One engine on the ranks of this process's group: errors, seconds and counts; or bytes, without any round."""
    import torch

    import scalemlo as mlo
    from scalemlo.derivatives.hessian import RetainedHessian, hessian
    from scalemlo.distributed.group import all_reduce_mean_

    class Train(mlo.Level):
        def loss(self, batch):
            return mean_loss(self.module, batch)

    model, ids = problem(setting)
    v = direction(model)
    level = Train("train", model, data=[ids], optimizer=partial(torch.optim.SGD, lr=0.0))
    program = mlo.Program([level], engine={"Single": mlo.Single, "FSDP": mlo.FSDP}[engine]())
    program.gradients()  # takes the batch
    trainer = program.trainers["train"]
    engine, block, loss = trainer.engine, trainer.block, trainer.loss_at()
    v = mlo.Shards(engine.shard(v), engine.group)

    def plain() -> None:
        with engine.live_pass(wanted=True, last=True):
            mean_loss(engine.module, trainer.batches[0]).backward()
        engine.clear_gradients()

    def checkpointed() -> None:
        engine.module.gradient_checkpointing_enable({"use_reentrant": False})
        plain()
        engine.module.gradient_checkpointing_disable()

    def remat() -> mlo.Shards:
        with hessian(loss, block, "remat") as operator:
            return operator(v)

    def retain() -> mlo.Shards:
        with hessian(loss, block, "retain") as operator:
            return operator(v)

    operations = {"plain": plain, "checkpointed": checkpointed, "remat": remat, "retain": retain}
    if not rounds:
        return {"growth": {name: measure.peak_growth_bytes(operation) for name, operation in operations.items()}}
    expected = torch.load(reference, mmap=True)
    expected = mlo.Shards(engine.shard(expected), engine.group)
    errors = {}
    for name in ("remat", "retain"):
        product = operations[name]().map(torch.Tensor.double)
        errors[name] = float((product - expected).norm() / expected.norm())
    del expected, product
    plain(), checkpointed()
    seconds: list[dict] = []
    for _ in range(rounds):
        found = {name: measure.cpu_seconds(operations[name]) for name in ("plain", "checkpointed", "remat")}
        retained: list[RetainedHessian] = []
        found["linearise"] = measure.cpu_seconds(lambda kept=retained: kept.append(RetainedHessian(loss, block)))
        found["further"] = measure.cpu_seconds(lambda kept=retained: kept[0](v))
        retained.pop().free()
        found["retain"] = found["linearise"] + found["further"]
        seconds.append({k: float(all_reduce_mean_(torch.tensor(s))) for k, s in found.items()})
    unit_bytes = 2 * 4 * max(sum(engine.parameters[n].numel() for n in u.names) for u in engine.skeleton.units)
    counts = {name: counted(operation, unit_bytes) for name, operation in operations.items()}
    return {"errors": errors, "seconds": seconds, "counts": counts}


# ---- counting --------------------------------------------------------------------------------------------------------
def counted(operation: Callable[[], Any], unit_bytes: int) -> dict:
    """Collectives and gathered bytes of one call."""
    import torch.distributed as dist

    with gathered_storages() as storages, _collectives(dist) as collectives:
        operation()
    return {
        "held_units": storages.held_peak / unit_bytes,
        "in_flight_units": storages.in_flight_peak / unit_bytes,
        "num_collectives": len(collectives),
        "collective_bytes": sum(collectives),
    }


@contextmanager
def _collectives(dist) -> Iterator[list[int]]:
    """Bytes of the unsharded side of every all-gather and reduce-scatter, and of every all-reduce, one by one."""
    first = "all_gather_into_tensor", "all_gather_single", "all_reduce"
    second = "reduce_scatter_tensor", "reduce_scatter_single"
    whole = dict.fromkeys(first, 0) | dict.fromkeys(second, 1)  # position of that side among the tensors
    whole = {name: position for name, position in whole.items() if hasattr(dist, name)}  # by version
    originals = {name: getattr(dist, name) for name in whole}
    sizes: list[int] = []

    def counting(name: str, *args, **kwargs):
        tensors = [x for x in (*args, *kwargs.values()) if hasattr(x, "untyped_storage")]
        tensor = tensors[whole[name]]
        sizes.append(tensor.numel() * tensor.element_size())
        return originals[name](*args, **kwargs)

    for name in whole:
        setattr(dist, name, partial(counting, name))
    try:
        yield sizes
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


@contextmanager
def gathered_storages() -> Iterator[Any]:
    """Follow every storage that is made inside a gather for as long as it is alive, tangents and saved tensors too."""
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from scalemlo.engines import gather, sharded

    class Storages(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.held_peak = self.in_flight_peak = 0
            self._gathering = self._reducing = 0
            self._gathered: dict[int, tuple[Any, int]] = {}  # of weights, directions and adjoints: [whole]
            self._buffers: dict[int, tuple[Any, int]] = {}  # of a reduce-scatter

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if self._gathering or self._reducing:
                known = {x.untyped_storage()._cdata for x in _tensors((args, kwargs))}
                into = self._gathered if self._gathering else self._buffers
                for x in _tensors(out):
                    storage = x.untyped_storage()
                    if storage._cdata not in known:  # not a view of an argument
                        into[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
            self._measure()
            return out

        def _measure(self) -> None:
            for found in (self._gathered, self._buffers):
                for key in [key for key, (ref, _) in found.items() if ref.expired()]:
                    del found[key]
            held, buffers = (sum(size for _, size in found.values()) for found in (self._gathered, self._buffers))
            if self._gathering or self._reducing:
                self.in_flight_peak = max(self.in_flight_peak, held + buffers)
            else:
                self.held_peak = max(self.held_peak, held)

        def inside(self, function: Callable, kind: str) -> Callable:
            def run(*args, **kwargs):
                setattr(self, kind, getattr(self, kind) + 1)
                try:
                    return function(*args, **kwargs)
                finally:
                    setattr(self, kind, getattr(self, kind) - 1)
                    self._measure()

            return run

    def _tensors(tree: Any) -> list:
        return [x for x in tree_leaves(tree) if hasattr(x, "untyped_storage") and x.device.type != "meta"]

    storages = Storages()
    places = [(sharded, "gather_rows", "_gathering"), (gather.Packing, "gather", "_gathering")]
    places += [(gather.Packing, "reduce_scatter", "_reducing")]
    originals = [getattr(module, name) for module, name, _ in places]
    for (module, name, kind), original in zip(places, originals, strict=True):
        setattr(module, name, storages.inside(original, kind))
    try:
        with storages:
            yield storages
    finally:
        for (module, name, _), original in zip(places, originals, strict=True):
            setattr(module, name, original)


# ---- peers -----------------------------------------------------------------------------------------------------------
def peer(setting: dict, name: str, rounds: int, reference: str) -> dict:
    """One peer in one process: error and seconds; or bytes, without any round; or why not."""
    import peers
    import torch

    model, ids = problem(setting)
    v = direction(model)
    product = partial(peers.HVP_PEERS[name], model, partial(mean_loss, ids=ids), v)

    def plain() -> None:
        mean_loss(model, ids).backward()
        model.zero_grad(set_to_none=True)

    try:
        if not rounds:
            plain()
            return {"growth": measure.peak_growth_bytes(product)}
        found, expected = product(), torch.load(reference, mmap=True)
    except peers.Unsupported as reason:
        return {"unsupported": str(reason)}
    difference = sum(float((found[n] - expected[n]).norm() ** 2) for n in expected)
    error = (difference / sum(float(t.norm() ** 2) for t in expected.values())) ** 0.5
    del found
    plain()
    pairs = range(rounds)
    seconds = [{"plain": measure.cpu_seconds(plain), "product": measure.cpu_seconds(product)} for _ in pairs]
    return {"error": error, "seconds": seconds}


def worker(kind: str, setting: dict, rounds: int, reference: str, num_ranks: list[int]) -> list[dict]:
    """All engines, or all peers, one after the other, each in processes of its own."""
    from transformers import LlamaForCausalLM  # noqa: F401  before the forks, once for all

    if kind == "peers":
        import peers

        return [{"name": n} | measure.on_ranks(1, peer, setting, n, rounds, reference) for n in peers.HVP_PEERS]
    import scalemlo  # noqa: F401

    if rounds:
        measure.on_ranks(1, write_reference, setting, reference)
    cases = [("Single", 1), *(("FSDP", world_size) for world_size in num_ranks)]
    return [measure.on_ranks(ranks, sharded, setting, engine, rounds, reference) for engine, ranks in cases]


# ---- the table -------------------------------------------------------------------------------------------------------
def main() -> None:
    """Run, print the table, write the figures."""
    options = measure.arguments(__doc__)
    if options.worker:
        print(json.dumps(worker(**json.loads(options.worker))))
        return
    setting, rounds, num_ranks = (QUICK, 2, [1, 2]) if options.quick else (FULL, 3, [1, 2, 4])
    with tempfile.TemporaryDirectory() as folder:
        reference = str(Path(folder) / "reference.pt")
        run = partial(measure.in_fresh_process, __file__, setting=setting, reference=reference, num_ranks=num_ranks)

        def found(**what) -> list[dict]:
            timed = run(measure.STEADY_TIME, rounds=rounds, **what)
            weighed = [{}] * len(timed) if options.quick else run(measure.EXACT_MEMORY, rounds=0, **what)
            return [a | b for a, b in zip(timed, weighed, strict=True)]

        own = dict(zip(["single", *(f"fsdp{w}" for w in num_ranks)], found(kind="scalemlo"), strict=True))
        theirs = found(kind="peers", python=options.peers_python)
    print(f"{measure.machine()}; one thread per rank; {setting}, batch {BATCH}; {rounds} rounds\n{AIMS}\n")
    report(own, theirs, options.json)


def report(own: dict[str, dict], theirs: list[dict], path: Path | None) -> None:
    """Print what was found and write the figures."""
    from scalemlo.reporting.tables import markdown_table

    def ratio(seconds: list[dict], over: str, under: str) -> float:
        return statistics.median(s[over] / s[under] for s in seconds)

    figures: dict[str, float] = {}
    rows = []
    for place, found in own.items():
        for operation in ("plain", "checkpointed", "remat", "retain", "further"):
            weighed = operation if operation != "further" else None
            row = [place, LABELS[operation], f"{statistics.median(s[operation] for s in found['seconds']):.2f}"]
            row += [f"{ratio(found['seconds'], operation, under):.2f}" for under in ("plain", "checkpointed")]
            row += [f"{found['growth'][weighed] / 2**20:.0f}" if weighed and "growth" in found else ""]
            counts = found["counts"][weighed] if weighed and place != "single" else None
            gathers = counts is not None and operation in ("remat", "retain")  # FSDP2's own gathers are not followed
            row += [f"{counts['held_units']:.2f}", f"{counts['in_flight_units']:.2f}"] if gathers else ["", ""]
            row += [counts["num_collectives"], f"{counts['collective_bytes'] / 2**20:.0f}"] if counts else ["", ""]
            row += [f"{found['errors'][operation]:.1e}" if operation in found["errors"] else ""]
            rows.append(row)
        figures[f"remat_over_checkpointed_{place}"] = ratio(found["seconds"], "remat", "checkpointed")
        figures[f"remat_over_gradient_{place}"] = ratio(found["seconds"], "remat", "plain")
        figures[f"retain_further_over_gradient_{place}"] = ratio(found["seconds"], "further", "plain")
        if place != "single":
            counts = found["counts"]["remat"]
            figures[f"remat_held_units_{place}"] = counts["held_units"]
            figures[f"remat_in_flight_units_{place}"] = counts["in_flight_units"]
            figures[f"remat_num_collectives_{place}"] = counts["num_collectives"]
            figures[f"remat_collective_mebibytes_{place}"] = counts["collective_bytes"] / 2**20
    for found in theirs:
        row = ["one process", found["name"]]
        if "unsupported" in found:
            rows.append([*row, found["unsupported"]])
            continue
        row += [f"{statistics.median(s['product'] for s in found['seconds']):.2f}"]
        row += [f"{ratio(found['seconds'], 'product', 'plain'):.2f}", ""]
        row += [f"{found['growth'] / 2**20:.0f}" if "growth" in found else "", "", "", "", "", f"{found['error']:.1e}"]
        rows.append(row)
    figures["worst_relative_error"] = max(error for found in own.values() for error in found["errors"].values())
    print(markdown_table(HEADER, [[*row, *[""] * (len(HEADER) - len(row))] for row in rows]))
    measure.write_figures(path, {name: float(f"{value:.4g}") for name, value in figures.items()})


LABELS = {
    "plain": "gradient", "checkpointed": "checkpointed gradient", "remat": "remat product",
    "retain": "retain, first product", "further": "retain, a further product",
}  # fmt: skip
HEADER = [
    "where", "what", "CPU-s", "gradients", "checkpointed gradients", "growth MiB", "held units", "in flight units",
    "collectives", "collective MiB", "error",
]  # fmt: skip


if __name__ == "__main__":
    main()
