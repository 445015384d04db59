"""No import runs up a layer, and none closes a circle: annotations and imports inside functions included."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "scalemlo"
LAYERS = [  # ground first; a file or folder of the package may import from its own layer and those before it
    ("versions",),
    ("distributed", "autodiff"),
    ("ops", "history"),
    ("engines",),
    ("derivatives",),
    ("hypergradients",),
    ("level", "graph"),
    ("memory",),
    ("checkpoint",),
    ("loop",),
    ("planning", "runs"),
    ("reporting", "hf"),
    ("",),  # scalemlo itself: what `import scalemlo as mlo` gives, which recipes are written with
    ("recipes",),
    ("cli",),
    ("__main__",),
]
LEVEL_OF = {name: level for level, names in enumerate(LAYERS) for name in names}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path, modules: set[str]) -> set[str]:
    """Modules of the package that a file imports from, wherever in it."""
    module, found = module_of(path), set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            found |= {name if (name := f"{source}.{alias.name}") in modules else source for alias in node.names}
    return found & modules


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    paths = {module_of(path): path for path in PACKAGE.rglob("*.py")}
    return {module: imports_of(path, set(paths)) for module, path in paths.items()}


def layer(module: str) -> int:
    return LEVEL_OF[module.partition(".")[2].partition(".")[0]]


def test_no_import_runs_up(imports):
    up = [f"{m} imports {t}" for m, targets in imports.items() for t in targets if layer(t) > layer(m)]
    assert not up


def test_no_circle(imports):
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' imports '.join(reversed(error.args[1]))}")


def test_the_reader_sees_late_and_relative_imports(tmp_path):
    package = tmp_path / "scalemlo"
    (package / "engines").mkdir(parents=True)
    file = package / "engines" / "new.py"
    file.write_text(
        "from .. import level\ndef f():\n    from ..loop.program import Program\n    import scalemlo.cli.main\n"
    )
    modules = {"scalemlo.level", "scalemlo.loop.program", "scalemlo.cli.main", "scalemlo"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{__name__}.PACKAGE", package)
        assert imports_of(file, modules) == modules - {"scalemlo"}
