"""``--launch NAME``: start one process per device by ``accelerate launch``, with a configuration of ``launch/``."""

import importlib.util
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from ..runs.launched import LAUNCHER_VARIABLES
from ..runs.packaged import packaged

TOKEN = "SCALEMLO_LAUNCH"
"""Environment variable that marks the processes of one launch."""


def configurations() -> dict[str, Path]:
    """The launch configurations by name: of the installed package, or of the checkout that it runs from."""
    return packaged("launch")


def launch(name: str, num_processes: int | None, arguments: Sequence[str]) -> int:
    """Run ``scalemlo`` in several processes on this machine, and wait for them.

    Ctrl-C and SIGTERM are passed on: ranks finish the step in hand and leave what they have. When the launcher ends,
    for whatever reason, no process of it is left.

    Args:
        name: A key of :func:`configurations`.
        num_processes: How many; by default one per accelerator, or two on a machine without.
        arguments: Of ``scalemlo``, without ``--launch``.

    Returns:
        The launcher's exit status; 128 + N where signal N was passed on or ended it.

    Raises:
        ValueError: If this process was started by a launcher, or the name or number makes no sense here.
    """
    found = configurations()
    if name not in found:
        raise ValueError(
            f"--launch {name}: there is no such configuration; known are {sorted(found)}. For one of your own: "
            "`accelerate launch --config_file FILE -m scalemlo ...`."
        )
    inside = [v for v in (*LAUNCHER_VARIABLES, TOKEN) if v in os.environ]
    if inside:
        raise ValueError(
            f"--launch {name}: a launcher started this process already ({', '.join(inside)} set). Leave out either "
            "--launch or torchrun, accelerate launch, deepspeed; unset the variables if they are left from elsewhere."
        )
    if name.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        raise ValueError(f"--launch {name}: needs the package deepspeed: `pip install 'scalemlo[deepspeed]'`.")
    number = default_num_processes() if num_processes is None else num_processes
    if number < 1:
        raise ValueError(f"--num-processes {number} must be at least 1.")
    options = ["--config_file", str(found[name]), "--num_processes", str(number)]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, "-m", "scalemlo", *arguments]
    return _run(command)


def default_num_processes() -> int:
    """One per accelerator, or two on a machine without."""
    import torch

    from ..distributed.group import default_device

    return 2 if default_device().type == "cpu" else torch.accelerator.device_count()


def _run(command: Sequence[str]) -> int:
    token = uuid.uuid4().hex
    passed_on: list[int] = []
    # A session of its own: a terminal's Ctrl-C reaches it once, through us.
    process = subprocess.Popen(command, env=os.environ | {TOKEN: token}, start_new_session=True)

    def pass_on(number: int, frame: object) -> None:
        passed_on.append(number)
        with suppress(ProcessLookupError):
            process.send_signal(number)

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        status = process.wait()
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
        _kill_marked(token)
    if passed_on or status < 0:
        return 128 + (passed_on[0] if passed_on else -status)
    return status


def _kill_marked(token: str) -> None:
    """Kill what is left of a launch. Its process group is not enough: torchrun gives every rank one of its own."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(TOKEN) == token:
                process.kill()
