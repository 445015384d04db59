"""List the recipes and their configurations."""

from argparse import ArgumentParser, Namespace


def configure(parser: ArgumentParser) -> None:
    """There is nothing to choose."""


def run(options: Namespace) -> int:
    """Print every recipe: what it does, the paper, its YAML files by the names that `cp` takes."""
    from omegaconf import OmegaConf

    from ..recipes import RECIPES
    from ..runs.packaged import packaged

    files = packaged("configs")
    for name, recipe in RECIPES.items():
        own = [stem for stem, path in files.items() if OmegaConf.select(OmegaConf.load(path), "recipe") == name]
        print(f"{name}\n  {recipe.description}\n  paper    {recipe.paper}\n  configs  {', '.join(own) or 'none'}")
    print("\nscalemlo cp CONFIG copies one here; scalemlo train CONFIG.yaml runs it.")
    return 0
