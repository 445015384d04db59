"""Trackers as callbacks: what is sent, by whom, and that they are finished however a run ends."""

import importlib.util

import accelerate.tracking
import pytest
import torch
from accelerate.state import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

import scalemlo as mlo
from scalemlo.loop.trackers import flat, tracker_names
from tests.ranks import run_ranks
from tests.test_closed_form import Vector

MEMORY = []


class Memory(GeneralTracker):
    """Keeps what it is sent, and fails when it is told to."""

    name, requires_logging_directory, tracker = "memory", False, None

    def __init__(self, project, fails_in=None):
        super().__init__()
        self.calls, self.project, self.fails_in = [], project, fails_in
        MEMORY.append(self)

    def note(self, what, *values):
        accelerate.tracking.logger.debug("trackers of accelerate log")
        self.calls.append((what, *values))
        if self.fails_in == what:
            raise OSError(f"{what} failed")

    def start(self):
        self.note("start")

    def store_init_configuration(self, values):
        self.note("config", values)

    def log(self, values, step=None):
        self.note("log", step, values)

    def finish(self):
        self.note("finish")


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "memory", Memory)
    MEMORY.clear()


class Lower(mlo.Level):
    def loss(self, upper):
        return (self.module() - upper()).square().sum()


class Upper(mlo.Level):
    def loss(self, lower):
        return (lower() - 1.0).square().sum()


def program():
    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=0.1)

    return mlo.Program(
        [Upper("upper", Vector(torch.zeros(3)), optimizer=sgd), Lower("lower", Vector(torch.ones(3)), optimizer=sgd)]
    )


def whats():
    return [call[0] for call in MEMORY[-1].calls]


def test_every_step_is_sent_by_level_and_phase():
    track = mlo.TrackWith("memory", config={"train": {"steps": 2}, "names": [1, 2]}, project="mine")
    history = program().run(2, callbacks=[track], progress=False)
    tracker = MEMORY[0]
    assert whats() == ["start", "config", "log", "log", "finish"] and tracker.project == "mine"
    assert tracker.calls[1][1] == {"train.steps": 2, "names": "[1, 2]"}
    _, step, values = tracker.calls[3]
    assert step == 2 and values["lower/loss"] == history.steps[1]["loss/lower"]
    assert values["upper/hypergradient_norm"] == history.steps[1]["gradient_norm/upper"]
    assert "lower/gradient_norm" in values and "upper/gradient_norm" not in values
    seconds = [call[2]["phase/lower/step/seconds"] for call in tracker.calls[2:4]]
    assert sum(seconds) == pytest.approx(history.phases["lower/step"].wall_seconds)
    phase = "phase/upper/direct_gradient/"
    assert values[f"{phase}peak_bytes"] > 0 and values[f"{phase}moved_bytes"] == 0
    assert PartialState._shared_state == {}  # accelerate's state was never made


def test_finished_however_a_run_ends(tmp_path):
    def broken(program, record):
        raise ArithmeticError("broken")

    def interrupted(program, record):
        raise KeyboardInterrupt

    for callback, error in ((broken, ArithmeticError), (interrupted, KeyboardInterrupt)):
        with pytest.raises(error):
            program().run(3, callbacks=[mlo.TrackWith("memory"), callback], progress=False)
        assert whats() == ["start", "config", "log", "finish"]


def test_a_tracker_that_fails_at_the_start_ends_the_run_and_later_does_not():
    with pytest.raises(OSError, match="start failed"):
        track = mlo.TrackWith("memory", options={"memory": {"fails_in": "start"}})
        program().run(1, callbacks=[track], progress=False)
    track = mlo.TrackWith("memory", options={"memory": {"fails_in": "log"}})
    with pytest.warns(RuntimeWarning, match="'memory' failed and gets nothing more: log failed"):
        assert len(program().run(2, callbacks=[track], progress=False).steps) == 2
    assert whats() == ["start", "config", "log"]


def test_names_are_checked_before_training(monkeypatch):
    assert tracker_names("none") == [] and tracker_names(["memory", "memory"]) == ["memory"]
    with pytest.raises(ValueError, match="'tensorbored' is no tracker; choose of .*'tensorboard'"):
        mlo.TrackWith("tensorbored")
    with pytest.raises(ValueError, match="'none' is no tracker"):
        tracker_names(["none", "memory"])
    monkeypatch.setattr("scalemlo.loop.trackers.get_available_trackers", lambda: [])
    with pytest.raises(ValueError, match="`pip install comet-ml`"):
        tracker_names("comet_ml")
    with pytest.raises(ValueError, match="not used"):
        mlo.TrackWith("memory", options={"wandb": {}})
    assert flat({"a": {"b": None, "c": True}}) == {"a.b": None, "a.c": True}


def on_two_ranks(rank, world_size, fails_in):
    MEMORY.clear()
    LOGGER_TYPE_TO_CLASS["memory"] = Memory
    track = mlo.TrackWith("memory", options={"memory": {"fails_in": fails_in}})
    try:
        program().run(1, callbacks=[track], progress=False)
    except (OSError, RuntimeError) as error:
        return str(error)
    return whats() if MEMORY else []


def test_only_the_first_rank_has_trackers_and_all_hear_of_a_failed_start():
    assert run_ranks(on_two_ranks, 2, None) == [["start", "config", "log", "finish"], []]
    first, second = run_ranks(on_two_ranks, 2, "start")
    assert first == "start failed" and "rank 0 could not start" in second


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_has_the_losses(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    track = mlo.TrackWith("tensorboard", tmp_path, run_name="first", config={"seed": 0, "engine": None})
    history = program().run(3, callbacks=[track], progress=False)
    events = EventAccumulator(str(tmp_path / "first"))
    events.Reload()
    found = [event.value for event in events.Scalars("lower/loss")]
    assert found == pytest.approx(history.column("loss/lower"))
    assert "phase/lower/step/seconds" in events.Tags()["scalars"]
    assert PartialState._shared_state == {}
