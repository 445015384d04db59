"""What is lost when a rank is killed in each phase, on each engine, and how soon does the run end and go on?

    python benchmarks/faults.py [--quick] [--json PATH]

The recipe on a tiny Llama, four outer steps of two lower steps each, a checkpoint after every step, on two gloo ranks
under torchrun. In outer step 3 one rank gets a SIGKILL where it enters the phase (rank 0 where it is about to rename
the checkpoint, rank 1 elsewhere); the same command with ``train.resume=true`` then goes on to the end. ``lost`` counts
outer steps that have to be done again although one rank had finished them; ``files that differ`` compares adapter,
example weights and history of the resumed run with those of one that was left alone, bit by bit. Seconds until the
launcher ended count from the signal, those to resume from the start of the launcher to the end of the first outer
step: mostly imports here. FSDP goes through all phases, the other engines through the Hessian-vector products. The
quick form kills one rank once, under FSDP, and goes on in forked processes: it does not time the resume.
"""

import importlib.util
import sys
import tempfile
from pathlib import Path

import measure
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # the tests launch in the same way

from scalemlo.reporting.tables import markdown_table
from tests.faults.launched import ENGINES, OPTIONS, PHASES, RESUME, Fault, checkpoints, finish, launch, learnt
from tests.tiny_recipe import write_recipe

STEP = 3
HEADER = ["engine", "killed in", "lost", "files that differ", "seconds to the end", "orphans", "seconds to resume"]


def row(recipe: Path, engine: str, phase: str, expected: dict[str, bytes], quick: bool) -> dict:
    """Kill, resume, compare."""
    out, options = recipe / f"{engine}-{phase}", [ENGINES[engine], *OPTIONS]
    rank = 0 if PHASES[phase] == "rename" else 1
    killed = launch(recipe, out, *options, fault=Fault("kill", PHASES[phase], STEP, rank))
    if killed.status == 0 or "fault" not in killed.events:
        raise RuntimeError(f"{engine}, {phase}: no fault came up:\n{killed.output[-3000:]}")
    saved = max(int(name[-6:]) for name in checkpoints(out) if name[-6:].isdigit())
    seconds, orphans = None, killed.orphans
    if quick:
        finish(recipe, out, *options, RESUME)
    else:
        resumed = launch(recipe, out, *options, RESUME)
        if resumed.status != 0:
            raise RuntimeError(f"{engine}, {phase}: not resumed:\n{resumed.output[-3000:]}")
        seconds, orphans = resumed.seconds_to_first_step, orphans + resumed.orphans
    found = learnt(out)
    return {
        "engine": engine,
        "phase": phase,
        "lost": sum(event.startswith("step ") and int(event[5:]) > saved for event in killed.events),
        "differ": sum(found[name] != content for name, content in expected.items()),
        "end": killed.seconds_to_end,
        "orphans": len(orphans),
        "resume": seconds,
    }


def main() -> None:
    """Kill in all phases and on all engines, or once where ``--quick``."""
    options = measure.arguments(__doc__)
    torch.set_num_threads(1)
    one, deepspeed = ["Hessian-vector products"], importlib.util.find_spec("deepspeed") is not None
    phases = {"ddp": one, "fsdp": list(PHASES)} | ({"zero3": one} if deepspeed else {})
    if options.quick:
        phases = {"fsdp": one}
    with tempfile.TemporaryDirectory() as folder:
        recipe, rows = write_recipe(Path(folder)), []
        for engine in phases:
            whole = recipe / f"{engine}-whole"
            finish(recipe, whole, ENGINES[engine], *OPTIONS)
            rows += [row(recipe, engine, phase, learnt(whole), options.quick) for phase in phases[engine]]
    print(f"{measure.machine()}; two gloo ranks under torchrun\n")
    seconds = [f"{r['resume']:.1f}" if r["resume"] else "" for r in rows]
    cells = [[r["engine"], r["phase"], r["lost"], r["differ"], f"{r['end']:.1f}", r["orphans"], s]
             for r, s in zip(rows, seconds, strict=True)]  # fmt: skip
    print(markdown_table(HEADER, cells))
    figures = {
        "num_kills": float(len(rows)),
        "most_lost_steps": float(max(r["lost"] for r in rows)),
        "files_that_differ": float(sum(r["differ"] for r in rows)),
        "orphans": float(sum(r["orphans"] for r in rows)),
        "longest_seconds_to_end": round(max(r["end"] for r in rows), 2),
    }
    if not options.quick:
        figures["longest_seconds_to_resume"] = round(max(r["resume"] for r in rows), 2)
    measure.write_figures(options.json, figures)


if __name__ == "__main__":
    main()
