"""Every command that README, docs, Makefile and help print is one that works as it stands."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from scalemlo.cli import COMMANDS
from scalemlo.cli import main as cli
from scalemlo.recipes import CONFIGS
from scalemlo.runs import config as cfg

ROOT = Path(__file__).parent.parent
PAGES = {path.name: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
PAGES |= {"Makefile": (ROOT / "Makefile").read_text(), "help": cli.DESCRIPTION}


def lines_of(text: str) -> list[str]:
    """Lines, those that end with a backslash joined."""
    return re.sub(r"\\\n\s*", "", text).splitlines()


def commands(starts_with: str) -> list[str]:
    """Without comments behind them, each once."""
    found = []
    for text in PAGES.values():
        for line in lines_of(text):
            match = re.search(rf"(?:^\s*|`|#.*  ){starts_with}[^`]*", line)
            if match:
                found.append(re.split(r"\s{2,}|`", match[0].strip("`# ").split("   #")[0])[-1].strip())
    return sorted(set(found))


def words_of(command: str) -> list[str]:
    return shlex.split(command, comments=True)


IS_COMMAND = re.compile(rf"\bscalemlo ({'|'.join(COMMANDS)}) \S")
SCALEMLO = [c for c in commands(r"(?:torchrun|accelerate launch|scalemlo) ") if IS_COMMAND.search(c)]
MAKE = commands("make ")


def test_there_are_commands():
    assert len(SCALEMLO) > 40 and len(MAKE) > 6


@pytest.mark.parametrize("command", SCALEMLO)
def test_a_command_is_understood(command):
    words = words_of(command)
    arguments = words[words.index("scalemlo") + 1 :]
    options = cli._parse(arguments)
    config = getattr(options, "config", None)
    if config is not None and (ROOT / str(config)).exists():
        cfg.load(ROOT / str(config), options.overrides, CONFIGS)
    launched = words[: words.index("scalemlo")]
    for word in launched:
        if word.endswith(".yaml"):
            assert (ROOT / word).exists(), word


@pytest.mark.parametrize("command", [c for c in SCALEMLO if c.startswith("scalemlo plan configs")])
def test_a_plan_is_made_as_printed(command, monkeypatch, tmp_path, capsys):
    words = [str(ROOT / word) if word.startswith("configs/") else word for word in words_of(command)]
    monkeypatch.chdir(tmp_path)
    assert cli.main(words[1:]) == 0
    assert "fits" in capsys.readouterr().out


@pytest.mark.parametrize("command", MAKE)
def test_make_knows_the_target(command):
    done = subprocess.run(["make", "-n", *words_of(command)[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for override in re.findall(r"\S+=\S+", " ".join(words_of(command))):
        if override.startswith("DEMO_FLAGS="):
            cfg.load(ROOT / "configs/reweight_smollm2.yaml", override.partition("=")[2].split(), CONFIGS)


@pytest.mark.parametrize("command", [c for c in commands("(?:python|bash) ") if c])
def test_a_script_is_there(command):
    script = words_of(command)[1]
    assert script.startswith("-") or (ROOT / script).exists(), command
