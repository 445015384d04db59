"""What the proof kit computes on: found, named, and how fast it could be.

    python benchmarks/gpu/device.py auto      # prints it as JSON

The kit asks in a process of its own: one that has looked holds a context on the device ever after.
Device-generic through ``torch.accelerator``. Names of vendors stand in one place, :data:`PEAK_TFLOPS`.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch

PEAK_TFLOPS = {
    "GB200": 2500, "B200": 2250, "H100 PCIe": 756, "H100 NVL": 835, "H200": 989, "H100": 989, "H800": 989, "H20": 148,
    "A100": 312, "A800": 312, "A10G": 70, "A10": 125, "A40": 150, "A6000": 155, "L40S": 362, "L40": 181, "L4": 121,
    "RTX 5090": 210, "RTX 4090": 165, "RTX 3090": 71, "MI325X": 1307, "MI300X": 1307, "MI250X": 383, "MI210": 181,
}  # fmt: skip
"""Dense bf16 matrix products, 1e12 operations per second, of the data sheets; the first name found in the device's."""


def accelerator() -> torch.device | None:
    """The first one, if any works."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return None if found is None else torch.device(found.type, 0)


def built_for() -> str:
    """What this torch can compute on beside the CPU."""
    cuda, rocm = torch.version.cuda, torch.version.hip
    return f"CUDA {cuda}" if cuda else f"ROCm {rocm}" if rocm else "no CUDA or ROCm"


def choose(wanted: str) -> torch.device | str:
    """The device to run on, or a sentence why there is none.

    Args:
        wanted: ``"auto"`` takes the accelerator; ``"cpu"``; or the type of an accelerator, such as ``"cuda"``.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    found = accelerator()
    if found is not None and wanted in ("auto", found.type):
        return found
    has = "the CPU alone" if found is None else f"an accelerator of type {found.type!r}"
    return (
        f"no {'GPU' if wanted == 'auto' else repr(wanted)} to run on: torch {torch.__version__} (built for "
        f"{built_for()}) finds {has} here. For the same checks on the CPU, with tiny sizes and in under four minutes: "
        "make gpu DEVICE=cpu, or python benchmarks/gpu/run.py --device cpu --out DIR."
    )


def name_of(device: torch.device) -> str:
    """As the driver calls it."""
    if device.type == "cpu":
        return "CPU"
    return torch.get_device_module(device).get_device_properties(device).name


def peak_flops(device: torch.device) -> float | None:
    """Of bf16 matrix products per second; None where it is not known."""
    if device.type == "cpu":
        return None
    name = name_of(device)
    return next((tflops * 1e12 for part, tflops in PEAK_TFLOPS.items() if part.lower() in name.lower()), None)


def memory_bytes(device: torch.device) -> int:
    """Free now: of the device, or of the machine."""
    if device.type == "cpu":
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return torch.get_device_module(device).mem_get_info(device)[0]


def seconds_of(function: Callable[[], object], device: torch.device, *, allowance_seconds: float) -> list[float]:
    """Seconds of one call after the other, by the device's own events; warm-up is the caller's.

    Args:
        function: To call.
        device: That computes.
        allowance_seconds: After these no further call is begun; five calls at most, one at least.
    """
    found: list[float] = []
    start = time.perf_counter()
    while not found or (len(found) < 5 and time.perf_counter() - start + statistics.median(found) < allowance_seconds):
        if device.type == "cpu":
            before = time.perf_counter()
            function()
            found.append(time.perf_counter() - before)
            continue
        first, last = (torch.Event(device, enable_timing=True) for _ in range(2))
        torch.accelerator.synchronize(device)
        first.record()
        function()
        last.record()
        torch.accelerator.synchronize(device)
        found.append(first.elapsed_time(last) / 1e3)
    return found


def main() -> None:
    """Print what was found, or why nothing was."""
    found = choose(sys.argv[1])
    if isinstance(found, str):
        print(json.dumps({"why": found}))
        return
    facts = {"type": found.type, "name": name_of(found), "free_bytes": memory_bytes(found), "built_for": built_for()}
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
