"""What does a memory budget cost, and does a run keep to it?

    python benchmarks/residency.py [--quick] [--json PATH]

A chain of levels, each with a module of its own (a frozen body, a trained head, AdamW), that needs more than twice the
budget when all of it is resident; on the CPU, where the device is RAM and states go to files in the temporary folder.
Growth is the most resident bytes of the process while it trains, over those before the program was built, when the data
was there (exact allocator): of outer iterations 2 to 6, in which the order of levels is chosen and tried. The first one
begins with all states where the building of the program left them; how much that is stands beside. Time is CPU-seconds
and wall seconds per outer iteration, medians; the file system's cache takes the files, so that a disk's own speed does
not show. Overhead is that of a budget in which everything fits: the CPU-seconds that it adds to an iteration on tiny
tensors, alternating with a run without one in one process, over those of an iteration of the table. Within the budget
the levels' order is chosen to move fewer bytes; the same budget with the levels in the given order stands beside.
"""

import json
import statistics
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest import mock

import measure

FULL = dict(size=768, levels=6, batch=256, iterations=8, rounds=200)
QUICK = dict(size=256, levels=6, batch=64, iterations=3, rounds=50)
AIMS = "aims: bits equal, growth within the budget, overhead at most 1 %"
FACTOR = 19.5  # the budget, in trained weights of one level


def data_of(setting: dict) -> list:
    """Two batches for each level."""
    import torch

    shape = setting["batch"], setting["size"]
    return [[torch.randn(shape) for _ in range(2)] for _ in range(setting["levels"])]


def chain(setting: dict, memory: Any = None, data: list | None = None) -> Any:
    """A level per name; each reads the one above it, and the first one the last."""
    import torch
    from torch import nn

    import scalemlo as mlo

    size, names = setting["size"], [f"level{i}" for i in range(setting["levels"])]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(size, 2 * size), nn.Tanh(), nn.Linear(2 * size, size))
            self.body.requires_grad_(False)
            self.head = nn.Linear(size, size)

        def forward(self, x):
            return self.head(self.body(x))

    def level_of(read: str) -> type[mlo.Level]:
        scope: dict[str, Any] = {"mlo": mlo}
        exec(
            f"def loss(self, batch, {read}):\n    return mlo.mean((({read}(batch) - self.target(batch)) ** 2).mean(1))",
            scope,
        )
        return type("Chained", (mlo.Level,), {"loss": scope["loss"]})

    torch.manual_seed(0)
    batches = data or data_of(setting)
    levels = []
    for i, name in enumerate(names):
        kind = level_of(names[i - 1])
        kind.target = (lambda self, batch: batch) if i == 0 else (lambda self, batch: self.module(batch))
        adamw = partial(torch.optim.AdamW, lr=1e-3)
        levels.append(kind(name, Net(), data=batches[i], optimizer=adamw))
    return mlo.Program(levels, memory=memory)


def budget(setting: dict, factor: float, folder: str) -> Any:
    """So many times the trained weights of one level."""
    import scalemlo as mlo

    return mlo.Memory(device=int(factor * 4 * setting["size"] ** 2), disk=folder)


def checksum(program: Any) -> str:
    """Of all weights."""
    import hashlib

    digest = hashlib.sha256()
    with program.resident():
        for trainer in program.trainers.values():
            for tensor in trainer.weights().values():
                digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def growth(setting: dict, tight: bool) -> dict:
    """Resident bytes of the building of a program, and of its training."""
    import torch

    def build(setting: dict, folder: str, data: list | None = None) -> Any:
        return chain(setting, budget(setting, FACTOR, folder) if tight else None, data)

    with tempfile.TemporaryDirectory() as folder:
        small = {**setting, "size": 64, "batch": 16}
        build(small, folder).run(6, progress=False)  # what libraries load is no part of the growth
        torch.manual_seed(1)
        data, program = data_of(setting), None

        def make() -> None:
            nonlocal program
            program = build(setting, folder, data)

        before = measure.resident_bytes()
        building = measure.peak_growth_bytes(make)
        program.step()
        training = measure.peak_growth_bytes(partial(program.run, 5, progress=False), over=before)
        return {"building_bytes": building, "growth_bytes": training, "checksum": checksum(program)}


def in_the_given_order(parts: Any, below: Any, sizes: Any) -> Any:
    """In the place of :func:`scalemlo.memory.interleaving.interleave`."""
    from scalemlo.memory.interleaving import Interleaving

    return Interleaving(tuple(tuple(part.work) for part in parts), (), 0)


def seconds(setting: dict, tight: bool, *, interleaved: bool = True) -> dict:
    """Per outer iteration, after four that are not counted: until the order is chosen, phases are measured."""
    from scalemlo.memory import scheduler as decisions

    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        if not interleaved:
            stack.enter_context(mock.patch.object(decisions, "interleave", in_the_given_order))
        program = chain(setting, budget(setting, FACTOR, folder) if tight else None)
        program.run(4, progress=False)
        before = sum(stats.moved_bytes for stats in program.history.phases.values())
        cpu, wall = [], []
        for _ in range(setting["iterations"]):
            start = time.perf_counter()
            cpu.append(measure.cpu_seconds(program.step))
            wall.append(time.perf_counter() - start)
        moved = sum(stats.moved_bytes for stats in program.history.phases.values()) - before
        scheduler = program.iteration.scheduler
        found = {
            "cpu_seconds": statistics.median(cpu),
            "wall_seconds": statistics.median(wall),
            "moved_bytes": moved / setting["iterations"],
        }
        if tight:
            residency = scheduler.residency
            found["budget_bytes"] = residency.memory.device_bytes
            found["states_bytes"] = residency.needed_bytes(residency.states)
            found["transient_bytes"] = max(scheduler.meter.taken.values())
        return found


def overhead(setting: dict) -> float:
    """CPU-seconds per iteration of a budget in which everything fits; they do not depend on the size of tensors."""
    small = {**setting, "size": 16, "batch": 4}
    with tempfile.TemporaryDirectory() as folder:
        free, ample = chain(small), chain(small, budget(setting, 1000, folder))
        for program in (free, ample):
            program.run(4, progress=False)
        more = []
        for i in range(setting["rounds"]):
            pair = (free, ample) if i % 2 else (ample, free)
            taken = {id(program): measure.cpu_seconds(program.step) for program in pair}
            more.append(taken[id(ample)] - taken[id(free)])
        return statistics.median(more)


def times(setting: dict) -> dict:
    """All that is timed."""
    found = {f"without/{k}": v for k, v in seconds(setting, tight=False).items()}
    found |= {f"within/{k}": v for k, v in seconds(setting, tight=True).items()}
    given = seconds(setting, tight=True, interleaved=False)
    found |= {f"within, levels in the given order/{k}": v for k, v in given.items()}
    return found | {"overhead": overhead(setting) / found["without/cpu_seconds"]}


def main() -> None:
    """Measure, print a table, write the figures."""
    args = measure.arguments(__doc__)
    if args.worker:
        options = json.loads(args.worker)
        print(json.dumps([growth(**options) if "tight" in options else times(**options)]))
        return
    setting = QUICK if args.quick else FULL
    run = partial(measure.in_fresh_process, __file__, setting=setting)
    (figures,) = run(measure.STEADY_TIME)
    checksums = set()
    for name, tight in (("without", False), ("within", True)):
        (found,) = run(measure.EXACT_MEMORY, tight=tight)
        checksums.add(found.pop("checksum"))
        figures |= {f"{name}/{k}": v for k, v in found.items()}
    figures["bits_equal"] = len(checksums) == 1
    figures["slowdown"] = figures["within/wall_seconds"] / figures["without/wall_seconds"]
    figures = {name: float(value) for name, value in figures.items()}
    report(figures)
    measure.write_figures(args.json, figures)


def report(figures: dict[str, float]) -> None:
    """Markdown."""
    mib = 2**20
    need = figures["within/states_bytes"] + figures["within/transient_bytes"]
    print(f"{measure.machine()}; {AIMS}\n")
    print(f"All resident: {need / mib:.0f} MiB, {need / figures['within/budget_bytes']:.1f} times the budget.\n")
    print("| | budget MiB | building MiB | growth MiB | moved MiB per iteration | CPU-s per iteration | wall s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in ("without", "within, levels in the given order", "within"):
        limit = "none" if name == "without" else f"{figures['within/budget_bytes'] / mib:.0f}"
        sizes = [figures.get(f"{name}/{kind}_bytes") for kind in ("building", "growth")]
        cells = " | ".join("" if size is None else f"{size / mib:.0f}" for size in sizes)
        print(
            f"| {name} | {limit} | {cells} "
            f"| {figures[f'{name}/moved_bytes'] / mib:.0f} | {figures[f'{name}/cpu_seconds']:.3f} "
            f"| {figures[f'{name}/wall_seconds']:.3f} |"
        )
    print(f"\nBits equal: {bool(figures['bits_equal'])}. Slowdown (wall): {figures['slowdown']:.2f}.")
    print(f"Overhead where nothing moves: {100 * figures['overhead']:+.2f} % CPU-seconds.")


if __name__ == "__main__":
    main()
