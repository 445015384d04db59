"""Foretell memory, communication and time of a run, without GPUs, weights or a launcher.

One outer iteration runs as one rank of many, on tensors without data. A language model is made from its configuration;
the tokenizer and the data are read, for the shapes of the batches. The small programs of comparisons are made as they
are, with data and weights. See docs/plan.md. Exit status 1 if it does not fit into
--device-memory; with --sweep the table says for every number of ranks whether it fits.
"""

from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from .on_recipe import configure_file, refuse_idle


def configure(parser: ArgumentParser) -> None:
    """Add the file, the overrides, the machine, and what to show."""
    configure_file(parser)
    parser.add_argument("--world-size", type=int, metavar="N", help="number of ranks (default 1)")
    parser.add_argument(
        "--device-memory", metavar="SIZE", help="memory of one rank's device, such as 80GiB; without it: what is needed"
    )
    parser.add_argument("--cpu", action="store_true", help="ranks compute on CPUs, not on accelerators")
    for option, what in {
        "--tflops": "assumed speed of a rank's matrix products, in 1e12 operations/s",
        "--link-gbps": "assumed speed at which a rank sends to others, in 1e9 bits/s",
        "--host-gbps": "assumed speed between a rank's device and its host, in 1e9 bits/s",
    }.items():
        parser.add_argument(option, type=float, default=400.0, metavar="X", help=f"{what} (default 400)")
    parser.add_argument("--exact", action="store_true", help="simulate all layers of a deep model (slow)")
    parser.add_argument("--no-advice", action="store_true", help="if it does not fit, do not look for what would")
    parser.add_argument(
        "--sweep",
        metavar="world-size=8,16",
        help="plan for each of these numbers of ranks instead; draws output_dir/plan_sweep.png",
    )
    parser.add_argument("--show", choices=["phases"], help="also draw the phases, as output_dir/plan_phases.png")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the plan to this file")


def run(options: Namespace) -> int:
    """Plan."""
    if options.sweep is not None:
        refuse_idle(options, ("world_size", "show", "json", "no_advice"), "with --sweep, which makes several plans")
    from ..memory.sizes import parse_bytes
    from ..planning import advice as advise
    from ..planning.pictures import plot_phases, plot_sweep
    from ..planning.plan import HEADER, MOVE_HEADER, Hardware, Plan
    from ..planning.planner import plan
    from ..planning.simulate import pretrained_depth
    from ..recipes import CONFIGS, RECIPES
    from ..recipes.study.study import ComparisonConfig
    from ..reporting.tables import print_table
    from ..runs import config as cfg

    if options.device_memory is not None:
        parse_bytes(options.device_memory, "--device-memory")
    hardware = Hardware(options.tflops, options.link_gbps, options.host_gbps)
    config = cfg.load(options.config, options.overrides, CONFIGS)
    build = RECIPES[config.recipe].build
    is_small = isinstance(config, ComparisonConfig)  # their data code looks at values, which a simulation has none of
    num_layers = None if options.exact or is_small else pretrained_depth(lambda: build(config))

    def simulate(change: advise.Change, world_size: int) -> Plan:
        changed = cfg.load(options.config, advise.overridden(options.overrides, change), CONFIGS)
        ranks = world_size * change.factor_of_ranks
        machine: dict[str, Any] = {"device_memory": options.device_memory, "hardware": hardware}
        machine["accelerator"] = not options.cpu
        if is_small:
            engine = changed.engine
            spec = engine.for_ranks(ranks) if isinstance(engine, cfg.AutoConfig) else engine.build()
            built = build(replace(changed, engine=cfg.AutoConfig()))
            return plan(built, world_size=ranks, engine=spec, **machine)
        return plan(lambda: build(changed), world_size=ranks, num_layers=num_layers, **machine)

    folder = Path(config.output_dir)
    if options.sweep is not None:
        plans = [simulate(advise.Change(), n) for n in _world_sizes(options.sweep)]
        rows = [[p.world_size, *p.summary] for p in plans]
        print_table("By number of ranks", ["ranks", "persistent", "peak", "seconds", "fits"], rows)
        folder.mkdir(parents=True, exist_ok=True)
        plot_sweep(folder / "plan_sweep.png", plans)
        print(f"wrote {folder}/plan_sweep.png")
        return 0

    world_size = 1 if options.world_size is None else options.world_size
    found = simulate(advise.Change(), world_size)
    print_table(f"One outer iteration, per rank of {world_size}", HEADER, found.rows)
    if found.memory is not None:
        print_table(f"Moved to keep within {found.memory}", MOVE_HEADER, found.move_rows)
        print("\n".join(found.interleaving) or "No other order of levels moves less.")
    if found.depths:
        print(f"{num_layers} layers, extrapolated from {', '.join(map(str, found.depths))}; --exact simulates all.")
    print(found.verdict)
    if options.show == "phases":
        folder.mkdir(parents=True, exist_ok=True)
        plot_phases(folder / "plan_phases.png", found)
        print(f"wrote {folder}/plan_phases.png")
    if options.json is not None:
        found.to_json(options.json)
    if found.fits is False and not options.no_advice:
        changes = advise.possible_changes(config, world_size)
        best, tried = advise.cheapest_fit(lambda change: simulate(change, world_size), changes)
        print(advise.say(best, tried, found))
    return 1 if found.fits is False else 0


def _world_sizes(text: str) -> list[int]:
    key, _, values = text.partition("=")
    sizes = values.split(",")
    if key != "world-size" or not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise ValueError(f"--sweep {text!r} must look like world-size=8,16,32.")
    return [int(size) for size in sizes]
