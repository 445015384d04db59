"""What the benchmarks share: arguments, fresh processes for clean measurements, figures."""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
# An allocator that gives memory back at once, so that resident bytes are bytes in use; it costs time.
EXACT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
# An allocator that keeps freed memory, so that time is not spent in the kernel's page faults.
STEADY_TIME = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}


def arguments(description: str | None) -> argparse.Namespace:
    """``--quick``, ``--json PATH`` and, for processes the script starts itself, ``--worker JSON``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under 45 seconds on two cores, noisier")
    parser.add_argument("--json", type=Path, help="write the figures to this file, one flat object")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def in_fresh_process(script: str, environment: Mapping[str, str], **options) -> list[dict]:
    """Run ``script --worker <options>`` on one thread and return the JSON list on its last line."""
    command = [sys.executable, "-W", "ignore", script, "--worker", json.dumps(options)]
    result = subprocess.run(command, env={**os.environ, **ONE_THREAD, **environment}, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr[-3000:]}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def machine() -> str:
    """One line about the machine."""
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            model = next((line.split(":", 1)[1].strip() for line in f if line.startswith("model name")), model)
    return f"{model}, {os.cpu_count()} cores, Python {platform.python_version()}"


def write_figures(path: Path | None, figures: Mapping[str, float]) -> None:
    """Write one flat JSON object."""
    if path is not None:
        path.write_text(json.dumps(figures, indent=2) + "\n")
