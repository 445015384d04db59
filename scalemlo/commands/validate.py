"""Check a configuration without running it.

Reads the file and the changes as `train` does, and prints the configuration in full, defaults and the launcher's engine
included; or every problem with its key, with exit status 2. Loads no model and no data. With --schema, writes the JSON
schema of the file's recipe instead, by which editors complete and check YAML.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path


def configure(parser: ArgumentParser) -> None:
    """The file, the changes, and where the schema goes."""
    parser.add_argument("config", help="YAML file; its key `recipe` names the recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the file, such as engine=zero3")
    parser.add_argument("--schema", metavar="PATH", help="write the JSON schema of the file's recipe; - prints it")


def run(options: Namespace) -> int:
    """Check, or write the schema."""
    from .. import config
    from ..recipes import RECIPES
    from ..schema import as_text, schema_of

    configs = {name: recipe.config for name, recipe in RECIPES.items()}
    if options.schema is None:
        print(config.to_yaml(config.load(options.config, options.overrides, configs)), end="")
        return 0
    name = config.recipe_of(options.config, options.overrides, configs)
    text = as_text(schema_of(configs[name], name))
    if options.schema == "-":
        print(text, end="")
    else:
        Path(options.schema).write_text(text)
        print(f"wrote {options.schema}")
    return 0
