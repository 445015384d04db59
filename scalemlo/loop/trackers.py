"""TensorBoard, Weights & Biases, Trackio, MLflow and others: accelerate's tracker classes as a callback of a program.

scalemlo owns the process group, so there is no ``Accelerator`` here: creating its state would set environment
variables and thread counts, and start DeepSpeed's communication where a launcher asks for it. Only rank 0 has trackers,
and only their own methods run.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from accelerate import tracking as accelerate_tracking
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType

from ..distributed.group import any_rank, is_main_process
from ..engines.dotted import flattened

if TYPE_CHECKING:
    from .program import Program

RUN_NAME = {"wandb": "name", "trackio": "name", "mlflow": "run_name", "swanlab": "experiment_name"}
"""What trackers that have projects call the name of a run in one."""


def tracker_names(report_to: str | Sequence[str]) -> list[str]:
    """Trackers by name, checked.

    Args:
        report_to: A name, several, or ``"none"``.

    Returns:
        The names, each once.

    Raises:
        ValueError: If one is unknown, or its package is not installed.
    """
    names = list(dict.fromkeys([report_to] if isinstance(report_to, str) else report_to))
    if names == ["none"]:
        return []
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(f"{name!r} is no tracker; choose of {sorted(LOGGER_TYPE_TO_CLASS)}, or 'none' alone.")
        is_installed = name in [str(known) for known in get_available_trackers()]
        if name in LoggerType.list() and not is_installed:  # registered ones bring their class along
            raise ValueError(f"{name!r} needs its package: `pip install {name.replace('_', '-')}`.")
    return names


class TrackWith(AbstractContextManager):
    """Sends every outer iteration to trackers; pass it to ``Program.run(callbacks=[...])``.

    ``run`` enters and leaves it, so trackers are finished when the run ends, is interrupted or fails. Sent are, with
    the outer step: ``<level>/loss``, ``<level>/gradient_norm`` (``hypergradient_norm`` for a level whose gradient goes
    through others' best responses), ``<level>/lr`` and what else the record has; of every phase of the iteration
    ``phase/<level>/<phase>/seconds`` and ``moved_bytes``, and its highest ``peak_bytes`` so far.

    A tracker that cannot be started is an error on all ranks; one that fails later is dropped with a warning, and
    training goes on.

    Args:
        trackers: A name, or several: those of :data:`accelerate.tracking.LOGGER_TYPE_TO_CLASS`, in which
            ``accelerate.tracking.register_tracker_class`` enters your own.
        folder: For trackers that write files (TensorBoard).
        run_name: Of this run; a folder under ``folder`` there.
        project: For trackers that have projects or experiments.
        config: Nested values, logged once as the run's hyperparameters.
        options: More keyword arguments for trackers, by name, such as ``{"wandb": {"entity": "me"}}``.

    Raises:
        ValueError: If a tracker is unknown or not installed, or options are for one that is not used.
    """

    def __init__(
        self,
        trackers: str | Sequence[str],
        folder: str | Path = "runs",
        *,
        run_name: str = "run",
        project: str = "scalemlo",
        config: Mapping[str, Any] | None = None,
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        self.names = tracker_names(trackers)
        self._options = dict(options or {})
        unused = sorted(self._options.keys() - set(self.names))
        if unused:
            raise ValueError(f"options={unused} are for trackers that are not used; trackers are {self.names}.")
        self._folder, self._run_name, self._project = str(folder), run_name, project
        self._config = flat(config or {})
        self._running: dict[str, GeneralTracker] = {}
        self._before: dict[str, tuple[float, int]] = {}  # seconds and moved bytes of each phase up to the last step

    def __enter__(self) -> "TrackWith":
        """Start the trackers on rank 0. Collective."""
        problem: Exception | None = None
        if is_main_process():
            try:
                with _plain_logger():
                    for name in self.names:
                        self._running[name] = self._start(name)
            except Exception as error:  # of any library: the other ranks must hear of it
                problem = error
        if any_rank(problem is not None):
            self._finish()
            raise problem or RuntimeError("rank 0 could not start its trackers; its message says why.")
        return self

    def __call__(self, program: "Program", record: Mapping[str, float]) -> None:
        """Send one outer iteration."""
        if not self._running:
            return
        values = level_values(program, record) | self._phase_values(program)
        with _plain_logger():
            for name, tracker in list(self._running.items()):
                try:
                    tracker.log(values, step=program.num_steps)
                except Exception as error:  # a service that is down must not end a training run
                    warnings.warn(
                        f"tracker {name!r} failed and gets nothing more: {error}", RuntimeWarning, stacklevel=2
                    )
                    del self._running[name]

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Finish the trackers."""
        self._finish()

    def _start(self, name: str) -> GeneralTracker:
        cls: Any = LOGGER_TYPE_TO_CLASS[name]  # each takes options of its own
        options = dict(self._options.get(name, {}))
        if cls.requires_logging_directory:
            tracker = cls(self._run_name, self._folder, **options)
        else:
            named = {RUN_NAME[name]: self._run_name} if name in RUN_NAME else {}
            tracker = cls(self._project, **(named | options))
        tracker.main_process_only = False  # we are on rank 0; True would create accelerate's state to find out
        tracker.start()
        tracker.store_init_configuration(self._config)
        return tracker

    def _finish(self) -> None:
        with _plain_logger():
            for name, tracker in self._running.items():
                try:
                    tracker.finish()
                except Exception as error:
                    warnings.warn(f"tracker {name!r} could not be finished: {error}", RuntimeWarning, stacklevel=3)
        self._running = {}

    def _phase_values(self, program: "Program") -> dict[str, float]:
        values: dict[str, float] = {}
        is_known = bool(self._before) or program.num_steps == 1  # not so at once after a resume
        for phase, stats in program.history.phases.items():
            seconds, moved_bytes = self._before.get(phase, (0.0, 0))
            key = f"phase/{phase.replace(' ', '_')}"
            values[f"{key}/peak_bytes"] = stats.peak_bytes
            if is_known:
                values[f"{key}/seconds"] = stats.wall_seconds - seconds
                values[f"{key}/moved_bytes"] = stats.moved_bytes - moved_bytes
            self._before[phase] = stats.wall_seconds, stats.moved_bytes
        return values


def level_values(program: "Program", record: Mapping[str, float]) -> dict[str, float]:
    """A record of :class:`History` with the level first: ``loss/rater`` becomes ``rater/loss``."""
    values = {}
    for key, value in record.items():
        what, _, level = key.partition("/")
        if not level:
            continue  # the step
        if what == "gradient_norm" and program.graph.depends_on_best_responses(level):
            what = "hypergradient_norm"
        values[f"{level}/{what}"] = value
    return values


def flat(config: Mapping[str, Any]) -> dict[str, bool | int | float | str | None]:
    """Nested values by dotted key, lists as text: what every tracker takes."""
    plain = bool | int | float | str | None
    return {key: value if isinstance(value, plain) else str(value) for key, value in flattened(config).items()}


@contextmanager
def _plain_logger() -> Iterator[None]:
    """Trackers log through an adapter that refuses to work without accelerate's state; give them what it wraps."""
    adapter = accelerate_tracking.logger
    accelerate_tracking.logger = getattr(adapter, "logger", adapter)
    try:
        yield
    finally:
        accelerate_tracking.logger = adapter
