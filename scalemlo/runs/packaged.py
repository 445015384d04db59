"""Files that lie beside the package in a checkout and inside it when installed (``launch/``, ``configs/``)."""

from pathlib import Path


def packaged(folder: str) -> dict[str, Path]:
    """The YAML files of a folder by name: of the installed package, or of the checkout that it runs from."""
    package = Path(__file__).parents[1]
    folders = [f for f in (package / folder, package.parent / folder) if f.is_dir()]
    return {path.stem: path for found in folders[:1] for path in sorted(found.glob("*.yaml"))}
