"""Does everything work on this GPU, how fast, and in how much memory? One command, some minutes, no network.

    python benchmarks/gpu/run.py --out DIR [--minutes 9] [--device auto|cpu|cuda] [--packages FOLDER]
    make gpu [MINUTES=9] [DEVICE=cpu]

Stages, in order of priority, each in a process of its own with a time limit of its own: the checks of ``tests/gpu``
against fp64 on the CPU; speed and memory of Llamas with random weights (135M; 1B; 8B width with as many layers as fit);
what the planner says of the same; the demo recipe in ten steps, where its model and data are here.

``DIR/gpu.json`` (one flat object of figures), ``DIR/gpu.md`` (tables) and ``DIR/logs`` are written as results come, so
that a stop in the middle loses nothing. Exit status: 0 all checks passed; 1 one failed, or was not done, after all
stages have run; 2 nothing could be run, and why; 130 interrupted.

What is assumed: one device is used, the first; process groups have one rank (NCCL on NVIDIA and AMD, XCCL on Intel,
gloo on the CPU); MFU is given for devices named in ``device.py``. Without an accelerator ``--device cpu`` runs the same
script with tiny sizes. Packages that are missing are installed from ``--packages`` into DIR, not into the environment;
``pack.sh`` fills such a folder.
"""

import argparse
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NEEDED = (
    "torch",
    "transformers",
    "accelerate",
    "numpy",
    "psutil",
    "safetensors",
    "tqdm",
    "peft",
    "pytest",
    "cloudpickle",
)
REPORTED = ("torch", "transformers", "accelerate", "peft", "deepspeed")
LEAST_MINUTES = 0.5


def main() -> int:
    """Run the stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for what is found; made if needed")
    parser.add_argument("--minutes", type=float, default=9.0, help="in all (default 9)")
    parser.add_argument("--device", default="auto", help="auto (an accelerator), cpu, or the type of an accelerator")
    parser.add_argument("--quick", action="store_true", help="on the CPU, in less than a minute: a part of everything")
    parser.add_argument("--packages", type=Path, default=HERE / "packages", help="wheels to take missing packages from")
    parser.add_argument("--checks", nargs="+", default=[], metavar="PATH", help="for pytest, instead of tests/gpu")
    options = parser.parse_args()
    if not options.minutes >= LEAST_MINUTES:
        return refuse(
            f"--minutes {options.minutes:g} is too small: the checks alone take about three minutes on a GPU, and all "
            f"stages nine. Give {LEAST_MINUTES:g} at least; what there is no time for is named as skipped."
        )
    start = time.monotonic()
    out = options.out.absolute()
    (out / "logs").mkdir(parents=True, exist_ok=True)
    path = [str(ROOT), str(HERE), str(ROOT / "benchmarks")]
    trouble = add_packages(options.packages, out / "packages", path)
    if trouble:
        return refuse(trouble)

    command = [sys.executable, str(HERE / "device.py"), "cpu" if options.quick else options.device]
    looked = subprocess.run(command, capture_output=True, text=True, env=environment_of(options.device, path))
    if looked.returncode:
        return refuse(f"torch does not start: {looked.stderr.strip()[-600:]}")
    device = json.loads(looked.stdout.strip().splitlines()[-1])
    if "why" in device:
        return refuse(device["why"])
    kind, free_bytes = device["type"], device["free_bytes"]
    form = "quick" if options.quick else "cpu" if kind == "cpu" else "full"
    header = [
        f"{device['name']} ({kind}), {free_bytes / 2**30:.1f} GiB free of memory",
        f"{os.cpu_count()} cores, {platform.platform()}, Python {platform.python_version()}",
        ", ".join(f"{name} {version_of(name)}" for name in REPORTED) + f"; torch built for {device['built_for']}",
        f"form: {form}, {options.minutes:g} minutes at most",
    ]
    print("\n".join(header), flush=True)
    from results import Results
    from stages import stages_of

    deepspeed = None if form == "quick" else add_deepspeed(options.packages / "deepspeed", out / "packages-deepspeed")
    stages = stages_of(form, kind, free_bytes, options.checks, out, deepspeed)
    return run(Results(out, header), stages, environment_of(kind, path), start + 60.0 * options.minutes)


def run(results, stages, environment: dict[str, str], end: float) -> int:
    """All stages, whatever becomes of each."""
    from stages import Running

    results.write()
    beside: list[Running] = []
    running: Running | None = None
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for stage in stages:
            if stage.beside:
                beside.append(Running(stage, results, environment))
        for stage in [s for s in stages if not s.beside]:
            left = end - time.monotonic()
            if stage.obstacle or left < stage.least_seconds:
                why = (
                    stage.obstacle or f"{max(left, 0):.0f} s are left, and it takes {stage.least_seconds:.0f} at least"
                )
                kind = results.failed if stage.is_check and not stage.obstacle else results.skipped
                kind.append((stage.name, why))
                results.write()
                continue
            running = Running(stage, results, environment)
            running.wait(end)
            print(f"{stage.name}: {results.seconds[stage.name]:.0f} s, log {running.log}", flush=True)
            running = None
        for running in beside:
            running.wait(end)
    except KeyboardInterrupt:
        for started in [*beside, *([running] if running else [])]:
            started.stop()
            results.read(started.lines)
        results.skipped.append(("what follows", "the kit was interrupted"))
        results.write()
        print(f"interrupted; what was found until then is in {results.folder}", flush=True)
        return 130
    return close(results)


def close(results) -> int:
    """Say how it went."""
    out = results.folder
    for what, why in results.skipped:
        print(f"skipped {what}: {why}")
    for what, why in results.failed:
        print(f"FAILED {what}: {why}")
    checks = [value for name, value in results.figures.items() if name.startswith("check/")]
    print(
        f"{sum(value == 1.0 for value in checks)} of {len(checks)} checks passed; {out / 'gpu.md'}, {out / 'gpu.json'}"
    )
    return 1 if results.failed or not checks else 0


def environment_of(device: str, path: list[str]) -> dict[str, str]:
    """Of every stage."""
    changes = {
        "PYTHONPATH": os.pathsep.join([*path, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONUNBUFFERED": "1",
        "SCALEMLO_GPU_KIT": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "MPLBACKEND": "Agg",
    }
    if device == "cpu":
        changes |= {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {k: v for k, v in os.environ.items() if k not in launcher} | changes


def add_packages(folder: Path, target: Path, path: list[str]) -> str | None:
    """Install what is missing from a folder of wheels, and put it on the path; a sentence where that is not enough."""
    if missing() and folder.is_dir():
        trouble = install(folder, target)
        if trouble:
            return trouble
    if target.is_dir():
        path.append(str(target))
        sys.path.append(str(target))
        importlib.invalidate_caches()
    absent = missing()
    if not absent:
        return None
    return (
        f"not installed: {', '.join(absent)}. Install them (pip install -e '.[dev]'), or, for a machine without a "
        f"network, fill a folder with wheels where there is one (bash benchmarks/gpu/pack.sh "
        f"{'.'.join(platform.python_version_tuple()[:2])} FOLDER) and give --packages FOLDER."
    )


def add_deepspeed(folder: Path, target: Path) -> str | None:
    """Where DeepSpeed is for its own checks alone, as others must not fail by it; None if installed, or nowhere."""
    if importlib.util.find_spec("deepspeed") is not None or not folder.is_dir():
        return None
    trouble = install(folder, target)
    if trouble:
        print(trouble, flush=True)
    return None if trouble else str(target)


def install(folder: Path, target: Path) -> str | None:
    """By ``install.sh``; a sentence where it fails."""
    command = ["bash", str(HERE / "install.sh"), str(folder), str(target), sys.executable]
    result = subprocess.run(command, capture_output=True, text=True)
    print(result.stdout, end="", flush=True)
    return f"{' '.join(command)} failed: {result.stderr.strip()[-600:]}" if result.returncode else None


def missing() -> list[str]:
    """Packages without which nothing runs."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def version_of(package: str) -> str:
    """As installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def refuse(why: str) -> int:
    """Say why nothing runs."""
    print(f"run.py: {why}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
