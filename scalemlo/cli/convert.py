"""Write the weights of a checkpoint as files that others read.

`full`: whole tensors of every level, as safetensors. `hf`: one level for from_pretrained of transformers (needs --base)
or PEFT. Needs one process and the memory of one output file, however many ranks wrote the checkpoint.
"""

from argparse import ArgumentParser, Namespace

from .on_recipe import refuse_idle


def configure(parser: ArgumentParser) -> None:
    """From where, to where, and how."""
    parser.add_argument("source", help="a checkpoint, or a folder of them: then the latest complete one")
    parser.add_argument("target", help="folder to write to")
    parser.add_argument("--to", choices=("full", "hf"), default="full", help="format (default full)")
    parser.add_argument("--level", metavar="NAME", help="for hf: which level, where there are several")
    parser.add_argument("--base", metavar="NAME", help="for hf: folder or name of the model that training began with")
    parser.add_argument(
        "--max-shard-bytes", type=int, default=5 * 10**9, metavar="N", help="largest size of a file (default 5e9)"
    )


def run(options: Namespace) -> int:
    """Convert."""
    if options.to == "full":
        refuse_idle(options, ("level", "base"), "with --to full, which writes all levels")
    from ..checkpoint.export import to_full
    from ..hf.models.export import to_hf

    if options.to == "full":
        to_full(options.source, options.target, max_shard_bytes=options.max_shard_bytes)
    else:
        to_hf(
            options.source,
            options.target,
            base=options.base,
            level=options.level,
            max_shard_bytes=options.max_shard_bytes,
        )
    print(f"wrote {options.target}")
    return 0
