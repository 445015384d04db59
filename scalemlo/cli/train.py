"""Run a recipe from a YAML file.

`scalemlo ls` lists the recipes. The file's output_dir gets the results and the run.yaml that replays the run;
docs/cli.md lists what is written. Exit status 0 done, 1 the run failed, 2 the command or configuration is wrong,
130 interrupted.
"""

from argparse import Namespace
from functools import partial
from typing import TYPE_CHECKING

from . import on_recipe

if TYPE_CHECKING:
    from ..recipes import Recipe
    from ..runs.config import RunConfig

configure = on_recipe.configure


def run(options: Namespace) -> int:
    """Train."""
    return on_recipe.run(options, _train)


def _train(recipe: "Recipe", run_config: "RunConfig") -> int:
    from ..checkpoint.writable import check_writable
    from ..distributed.ranks import Ranks

    Ranks().together(partial(check_writable, run_config.output_dir, "output_dir"))
    return 130 if recipe.run(run_config) else 0
