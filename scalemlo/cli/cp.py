"""Copy a recipe's configuration here, to be changed.

`scalemlo ls` lists the names. Never writes over a file without --force.
"""

import difflib
import re
from argparse import ArgumentParser, Namespace
from pathlib import Path


def configure(parser: ArgumentParser) -> None:
    """What, and to where."""
    parser.add_argument("name", help="a configuration of `scalemlo ls`")
    parser.add_argument("target", nargs="?", default=".", help="file or folder (default: this folder)")
    parser.add_argument("--force", action="store_true", help="write over a file that is there")


def run(options: Namespace) -> int:
    """Copy.

    Raises:
        ValueError: If the name is unknown, or the target is there already.
    """
    from ..runs.packaged import packaged

    files = packaged("configs")
    source = files.get(options.name.removesuffix(".yaml"))
    if source is None:
        close = difflib.get_close_matches(options.name, files, n=3)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ValueError(f"no configuration is called {options.name!r}.{hint} There are {sorted(files)}.")
    target = Path(options.target)
    if target.is_dir():
        target /= source.name
    if target.exists() and not options.force:
        raise ValueError(f"{target} is there already: give another target, or --force to write over it.")
    text = source.read_text().replace(f"configs/{source.name}", str(target))
    # The schema stays where it is; editors find it by its whole path.
    schemas = (source.parent / "schemas").resolve()
    text = re.sub(r"(\$schema=)schemas/", lambda found: f"{found[1]}{schemas}/", text)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)
    print(f"wrote {target}")
    return 0
