"""Check a configuration without running it.

Reads the file and the changes as `train` does, and prints the configuration in full, defaults and the launcher's engine
included; or every problem with its key, with exit status 2. Loads no model and no data. With --schema, writes the JSON
schema of the file's recipe instead, by which editors complete and check YAML.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from .on_recipe import configure_file


def configure(parser: ArgumentParser) -> None:
    """The file, the changes, and where the schema goes."""
    configure_file(parser)
    parser.add_argument("--schema", metavar="PATH", help="write the JSON schema of the file's recipe; - prints it")


def run(options: Namespace) -> int:
    """Check, or write the schema."""
    from ..recipes import CONFIGS
    from ..runs import config
    from ..runs.schema import as_text, schema_of

    if options.schema is None:
        print(config.to_yaml(config.load(options.config, options.overrides, CONFIGS)), end="")
        return 0
    name = config.recipe_of(options.config, options.overrides, CONFIGS)
    text = as_text(schema_of(CONFIGS[name], name))
    if options.schema == "-":
        print(text, end="")
    else:
        Path(options.schema).write_text(text)
        print(f"wrote {options.schema}")
    return 0
