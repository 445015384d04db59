"""Every YAML and every example says its command and the result to expect, and some test runs it on a tiny setting."""

import ast
import re
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import pytest

from scalemlo.cli import main as cli
from tests.tiny_recipe import write_recipe

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SYNTAX = [ast.parse(path.read_text()) for path in sorted((ROOT / "tests").rglob("test_*.py"))]

ADAPTED = (
    "model={folder}/model", "lora.r=4", "lora.target_modules=[q_proj,v_proj]", "data.name={folder}/data.jsonl",
    "data.num_train=64", "data.num_heldout=16", "data.max_length=16", "train.steps=2", "train.longer_steps=3",
    "train.batch_size=8", "num_seeds=1",
)  # fmt: skip
FAST = {
    "reweight_smollm2": (
        "model.name={folder}/model", "model.lora.r=4", "data.name={folder}/data.jsonl", "data.num_train=32",
        "data.num_meta=16", "data.num_heldout=16", "data.max_length=16", "train.steps=2", "train.batch_size=8",
        "train.meta_batch_size=8", "train.eval_every=1", "plan=false",
    ),
    "autolora": (*ADAPTED, "train.retrain_steps=2"),
    "bidora": (*ADAPTED, "train.retrain_steps=2"),
    "bilora": ADAPTED,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("configs"))


@pytest.mark.parametrize("name", FAST)
def test_recipes_of_language_models_run_on_a_tiny_one(name, folder):
    overrides = [override.format(folder=folder) for override in FAST[name]]
    output = folder / name
    assert not cli.main(["train", str(ROOT / "configs" / f"{name}.yaml"), f"output_dir={output}", *overrides])
    report = (output / "report.md").read_text()
    assert len(re.findall(r"^\| .*\d.* \|$", report, re.M)) >= 3 and "nan" not in report


def found_ids(paths):
    return {"argvalues": paths, "ids": lambda path: path.stem}


@pytest.mark.parametrize("path", **found_ids(CONFIGS))
def test_a_configuration_begins_with_its_command_and_result(path):
    assert problems_of_configuration(path.name, path.read_text()) == []


@pytest.mark.parametrize("path", **found_ids(EXAMPLES))
def test_an_example_begins_with_its_command_and_result(path):
    assert problems_of_example(path.name, path.read_text()) == []


@pytest.mark.parametrize("path", **found_ids(CONFIGS))
def test_a_configuration_is_run_by_a_test(path):
    assert path.stem in set().union(*map(run_configurations, SYNTAX)), (
        f"no test runs {path.name}: give FAST an entry {path.stem!r} in a test module whose test trains each entry"
    )


@pytest.mark.parametrize("path", **found_ids(EXAMPLES))
def test_an_example_is_run_by_a_test(path):
    assert path.stem in set().union(*map(run_examples, SYNTAX)), (
        f"no test runs {path.name}: load({path.stem!r}) in tests/test_examples.py and call it on a tiny setting"
    )


def test_the_checks_find_what_is_missing():
    good = "# scalemlo train configs/a.yaml\n#\n# Trains. Expected, one seed:\n# 3 nats.\n# $schema=s.json\nrecipe: a\n"
    assert problems_of_configuration("a.yaml", good) == []
    assert problems_of_configuration("b.yaml", good) == ["its first line is not `# scalemlo train configs/b.yaml`"]
    assert len(problems_of_configuration("a.yaml", good.replace("Expected, one seed:", "It gives"))) == 1
    assert len(problems_of_configuration("a.yaml", good.replace("3 nats", "little"))) == 1
    assert len(problems_of_configuration("a.yaml", "recipe: a\n" + good)) == 2
    example = '"""A.\n\n    python examples/a.py --x\n\nExpected: 3 nats.\n"""\n'
    assert problems_of_example("a.py", example) == []
    assert len(problems_of_example("a.py", example.replace("examples/a.py", "a.py"))) == 1
    assert len(problems_of_example("a.py", example.replace("3", "some"))) == 1

    trained = ast.parse(
        "FAST = {'a': ()}\n@pytest.mark.parametrize('name', FAST)\ndef test_it(name):\n    run(name, *FAST[name])\n"
    )
    assert run_configurations(trained) == {"a"}
    assert run_configurations(ast.parse("FAST = {'a': ()}\ndef test_it(name):\n    run(name, *FAST[name])\n")) == set()
    assert run_configurations(ast.parse(ast.unparse(trained).replace("FAST[name]", "()"))) == set()
    assert run_configurations(ast.parse("def test_it():\n    run_fast('a', 'steps=1')\n")) == {"a"}
    called = ast.parse("def test_it(load):\n    load('a').main()\n    load('b')\n")
    assert run_examples(called) == {"a"}


def problems_of_configuration(name: str, text: str) -> list[str]:
    """What the comments on top of a YAML lack."""
    comments = takewhile(lambda line: line.startswith("#"), text.splitlines())
    header = [line.removeprefix("#").strip() for line in comments]
    command = f"scalemlo train configs/{name}"
    first = [] if header[:1] == [command] else [f"its first line is not `# {command}`"]
    return first + _problems_of_result(" ".join(line for line in header if "$schema=" not in line))


def problems_of_example(name: str, text: str) -> list[str]:
    """What the docstring on top of an example lacks."""
    docstring = ast.get_docstring(ast.parse(text)) or ""
    _, _, after_summary = docstring.partition("\n\n")
    command = f"    python examples/{name}"
    first = [] if re.match(re.escape(command) + r"( |$)", after_summary, re.M) else [
        f"its docstring's first line after the summary is not `{command}`"
    ]  # fmt: skip
    return first + _problems_of_result(docstring)


def _problems_of_result(text: str) -> list[str]:
    """A result is numbers, or says that there are none yet."""
    _, expected, result = text.partition("Expected")
    if not expected:
        return ["no `Expected` with the result of the command"]
    is_said = re.search(r"\d", result) or "Not measured yet" in result
    return [] if is_said else ["no number after `Expected`, nor `Not measured yet`"]


def run_configurations(module: ast.Module) -> set[str]:
    """Configurations that a test module trains: by ``run_fast`` under their name, or each entry of its ``FAST``."""
    tests = list(_tests(module))
    calls = [n for test in tests for n in ast.walk(test) if isinstance(n, ast.Call) and _name(n.func) == "run_fast"]
    found = {call.args[0].value for call in calls if call.args and isinstance(call.args[0], ast.Constant)}
    for node in module.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        is_table = _name(target) == "FAST" and isinstance(node.value, ast.Dict)
        if is_table and any(_trains_each(test) for test in tests):
            found |= {key.value for key in node.value.keys if isinstance(key, ast.Constant)}
    return found


def _trains_each(test: ast.FunctionDef) -> bool:
    is_parametrized = any(
        isinstance(mark, ast.Call) and "FAST" in map(_name, mark.args) and "parametrize" in ast.unparse(mark.func)
        for mark in test.decorator_list
    )
    body = [node for statement in test.body for node in ast.walk(statement)]
    return is_parametrized and any(isinstance(n, ast.Subscript) and _name(n.value) == "FAST" for n in body)


def run_examples(module: ast.Module) -> set[str]:
    """Names of the examples of which a test of a module loads the file and calls a function."""
    found = set()
    for test in _tests(module):
        nodes = list(ast.walk(test))
        bound = {_name(n.targets[0]): n.value for n in nodes if isinstance(n, ast.Assign)}
        for node in nodes:
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                loaded = bound.get(_name(node.func.value), node.func.value)
                if isinstance(loaded, ast.Call) and _name(loaded.func) == "load" and loaded.args:
                    found |= {loaded.args[0].value} if isinstance(loaded.args[0], ast.Constant) else set()
    return found


def _tests(module: ast.Module) -> Iterator[ast.FunctionDef]:
    return (n for n in module.body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_"))


def _name(node: ast.AST | None) -> str | None:
    return node.id if isinstance(node, ast.Name) else None
