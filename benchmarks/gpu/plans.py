"""What the planner says the programs of one size take: a stage of the kit, on the CPU, beside the others.

python benchmarks/gpu/plans.py --size 135M --accelerator --free-bytes 150000000000
"""

import argparse

import torch
from models import PROGRAMS, SIZES, program_of
from results import say

import scalemlo as mlo


def main() -> None:
    """Plan one program after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", required=True, choices=SIZES)
    parser.add_argument("--accelerator", action="store_true", help="for one; else for the CPU")
    parser.add_argument("--free-bytes", type=int, required=True, help="of the device, which says how many layers fit")
    parser.add_argument("--variants", default=",".join(PROGRAMS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    size = SIZES[options.size].fitted(options.free_bytes)
    if isinstance(size, str):
        return  # the stage that measures says so
    for name in [n for n in options.variants.split(",") if n in PROGRAMS]:
        plan = mlo.plan(
            lambda name=name: program_of(size, PROGRAMS[name], size.batch),
            world_size=1,
            accelerator=options.accelerator,
            num_layers=size.shape["num_hidden_layers"],
        )
        peak = plan.peak_phase.peak_bytes  # of iterations after the first, as is measured
        key = f"plan/{options.size}/{name}"
        say(figures={f"{key}/peak_gib": peak / 2**30, f"{key}/batch": size.batch})
        print(f"{options.size}, {name}: {plan.verdict}", flush=True)


if __name__ == "__main__":
    main()
