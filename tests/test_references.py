"""What docstrings refer to is there: modules, classes, functions and their attributes."""

import importlib
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
REFERENCE = re.compile(r":(?:mod|class|func|meth|data|attr):`~?(scalemlo\.|\.)([\w.]+)`")


def is_there(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[count:]:
            if not hasattr(found, attribute):
                return False
            found = getattr(found, attribute)
        return True
    return False


def test_references_lead_somewhere():
    checked, lost = 0, []
    for path in sorted((ROOT / "scalemlo").rglob("*.py")):
        package = path.relative_to(ROOT).parts[:-1]
        around = [".".join(package[:depth]) for depth in range(len(package), 0, -1)]
        for start, rest in REFERENCE.findall(path.read_text()):
            checked += 1
            if not any(is_there(f"{name}.{rest}") for name in (around if start == "." else ["scalemlo"])):
                lost.append(f"{path.relative_to(ROOT)}: {rest}")
    assert not lost
    assert checked > 100
