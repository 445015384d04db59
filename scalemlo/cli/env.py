"""Describe this environment, to paste into an issue.

Versions, devices and backends, memory, the environment variables that change a run, and locks left by builds of
extensions that were killed. Values of variables that may hold a secret are not shown.
"""

import os
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping

PREFIXES = (
    "ACCELERATE_ CUDA_ DS_ FSDP_ GLOO_ HF_ HIP_ LD_LIBRARY_PATH LOCAL_ MASTER_ MKL_ NCCL_ OMP_ PYTORCH_ RANK "
    "ROCR_ SCALEMLO_ SLURM_ TOKENIZERS_ TORCH TRANSFORMERS_ TRITON_ WORLD_SIZE"
).split()
SECRET = re.compile("token|key|secret|password|credential", re.IGNORECASE)


def configure(parser: ArgumentParser) -> None:
    """There is nothing to choose."""


def run(options: Namespace) -> int:
    """Print it as Markdown."""
    for title, facts in _sections().items():
        print(f"### {title}\n")
        print("\n".join(f"- {name}: {value}" for name, value in facts.items()) or "- none")
        print()
    return 0


def relevant_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that change a run, sorted; secrets hidden."""
    names = sorted(name for name in environment if name.startswith(tuple(PREFIXES)))
    return {name: "(set, not shown)" if SECRET.search(name) else environment[name] for name in names}


def _sections() -> dict[str, dict[str, str]]:
    import platform

    import psutil

    from ..engines.deepspeed.jit_locks import extensions_folder, stale_locks
    from ..runs.provenance import PACKAGES, versions

    memory = psutil.virtual_memory()
    gib = 2**30
    machine = {
        "system": platform.platform(),
        "cpu": f"{_cpu_model()}, {psutil.cpu_count(logical=False)} cores, {psutil.cpu_count()} threads",
        "memory": f"{memory.total / gib:.1f} GiB, {memory.available / gib:.1f} GiB available",
    }
    locks = stale_locks(extensions_folder())
    return {
        "Versions": versions((*PACKAGES, "triton", "flash-attn", "bitsandbytes", "pydantic", "omegaconf")),
        "Machine": machine,
        "Devices": _devices(),
        "Environment": relevant_variables(os.environ),
        "Stale build locks": {str(lock): f"a build that needs it hangs; rm {lock}" for lock in locks},
    }


def _devices() -> dict[str, str]:
    import torch
    import torch.distributed as dist

    backends = [name for name in ("gloo", "nccl", "mpi", "xccl", "ucc") if dist.is_backend_available(name)]
    found = {"torch built for": _built_for(), "distributed backends": ", ".join(backends)}
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return found | {"accelerator": "none"}
    kind, module = accelerator.type, torch.get_device_module(accelerator)
    for index in range(torch.accelerator.device_count()):
        properties = module.get_device_properties(index)
        found[f"{kind}:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB"
    return found


def _built_for() -> str:
    import torch

    cuda, rocm = torch.version.cuda, torch.version.hip
    return f"CUDA {cuda}" if cuda else f"ROCm {rocm}" if rocm else "CPU"


def _cpu_model() -> str:
    import platform

    try:
        with open("/proc/cpuinfo") as f:
            return next(line.partition(":")[2].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
