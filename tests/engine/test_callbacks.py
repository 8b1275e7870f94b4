"""Callbacks of a user: called, logged, resumed exactly, and named where they fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dn_detr.checkpoint import load_checkpoint
from dn_detr.config import LazyCall
from dn_detr.distributed import rank
from dn_detr.engine import Callback, NonFiniteError, launch, train
from dn_detr.engine.callbacks import Callbacks, ExponentialMovingAverage
from dn_detr.errors import UserError

from .reference import rows, untimed

CALLS: list[str] = []


class Recorder(Callback):
    """Notes its calls; adds a number to the log records; counts its steps, also over resumes."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale
        self.steps = 0

    def setup(self, state):
        CALLS.append(f"setup at {state.iteration}")

    def on_train_start(self, state):
        CALLS.append(f"start after {self.steps} steps, iteration {state.iteration}")

    def after_step(self, state, samples, result):
        self.steps += 1
        state.metrics.add("my/steps", self.scale * self.steps)
        state.metrics.count("my_images", len(samples))

    def on_log(self, state, record):
        CALLS.append(f"log {sorted(record)[-1]} of {record['iteration']}")

    def after_evaluation(self, state, results):
        CALLS.append(f"evaluated {state.iteration}: {results['AP'] == state.results['AP']}")

    def on_train_end(self, state, *, failed):
        CALLS.append(f"end, failed: {failed}")

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


class Failing(Callback):
    """Fails in one hook."""

    def __init__(self, hook: str = "") -> None:
        if hook:
            setattr(self, hook, self.fail)

    def fail(self, *_: Any, **__: Any) -> Any:
        raise KeyError("a bug")


class NoCallback:
    """Something else."""


@pytest.fixture
def run(tiny_config, tmp_path):
    """Train the tiny config with callbacks."""
    CALLS.clear()

    def start(*overrides: str, name: str = "run", resume: bool = False, **callbacks: Any) -> Path:
        cfg = tiny_config(f"train.output_dir={tmp_path}/{name}", "train.max_iter=4", *overrides)
        cfg.train.callbacks = callbacks
        train(cfg, resume=resume)
        return tmp_path / name

    return start


def test_every_hook_is_called_in_order(run):
    run("train.eval_period=3", mine=LazyCall(Recorder)())
    assert CALLS == [
        "setup at 0",
        "start after 0 steps, iteration 0",
        "log skipped_images of 2",
        "log iteration of 3",
        "evaluated 3: True",
        "log skipped_images of 4",
        "log iteration of 4",
        "evaluated 4: True",
        "end, failed: False",
    ]


def test_its_numbers_are_columns_of_the_log_records(run):
    folder = run(mine=LazyCall(Recorder)(scale=2.0))
    found = [row for row in rows(folder) if "loss" in row]
    assert [row["my/steps"] for row in found] == [3.0, 7.0]  # means of 2, 4 and of 6, 8
    assert [row["my_images"] for row in found] == [8, 8]


def test_an_interrupted_run_resumes_its_state_and_numbers_exactly(run):
    """The checkpoint lies between two log records."""
    options = ("train.checkpoint.period=1", "train.log_period=4")
    whole = run(*options, name="whole", mine=LazyCall(Recorder)())
    with pytest.raises(NonFiniteError):
        run(*options, "model.nan_at=4", mine=LazyCall(Recorder)())
    assert CALLS[-1] == "end, failed: True"
    parts = run(*options, mine=LazyCall(Recorder)(), resume=True)
    assert "start after 3 steps, iteration 3" in CALLS
    assert [untimed(row) for row in rows(parts)] == [untimed(row) for row in rows(whole)]


@pytest.mark.parametrize(
    "hook", ["setup", "on_train_start", "after_step", "on_log", "after_evaluation", "state_dict"]
)
def test_the_log_names_a_callback_that_fails(hook, run, tmp_path):
    with pytest.raises(KeyError, match="a bug"):
        run(broken=LazyCall(Failing)(hook=hook))
    assert "callback broken (Failing) failed" in (tmp_path / "run/log.txt").read_text()


def test_all_callbacks_end_though_one_fails_at_that():
    state: Any = None
    callbacks = Callbacks({"a": Recorder(), "b": Failing("on_train_end"), "c": Recorder()})
    for callback in callbacks._callbacks.values():
        callback.on_train_start = lambda state: None  # type: ignore[method-assign]
    CALLS.clear()
    callbacks.start(state)
    with pytest.raises(KeyError):
        callbacks.end(state, failed=False)
    assert CALLS == ["end, failed: False"] * 2


def test_a_callback_whose_start_was_not_reached_is_not_ended(run):
    with pytest.raises(KeyError):
        run(broken=LazyCall(Failing)(hook="on_train_start"), mine=LazyCall(Recorder)())
    assert CALLS == ["setup at 0"]


def test_a_checkpoint_of_a_run_without_the_callback_leaves_it_new(run, tmp_path):
    run("train.max_iter=2")
    run(mine=LazyCall(Recorder)(), resume=True)
    assert "start after 0 steps, iteration 2" in CALLS
    saved = load_checkpoint(tmp_path / "run/checkpoints/last").snapshot
    assert saved.training_state["callbacks"]["mine"] == {"steps": 2}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("after_stepp", r"Mine\.after_stepp is no hook of Callback \(did you mean after_step\?\)"),
        ("statedict", r"Mine\.statedict .* \(did you mean state_dict\?\)"),
        ("before_epoch", r"Mine\.before_epoch is no hook of Callback: setup, on_train_start, "),
    ],
)
def test_a_misspelt_hook_is_refused_when_the_class_is_made(name, message):
    with pytest.raises(ValueError, match=message):
        type("Mine", (Callback,), {name: lambda self, *_: None})
    type("Mine", (Callback,), {f"_{name}": None, "open_door": None, "models_seen": None})


@pytest.mark.parametrize(
    ("hook", "function", "message"),
    [
        (
            "after_step",
            lambda self, state: None,
            r"after_step must take \(self, state, samples, re",
        ),
        (
            "on_train_end",
            lambda self, state: None,
            r"on_train_end must take \(self, state, \*, fai",
        ),
        ("state_dict", lambda self, x: {}, r"state_dict must take \(self\): missing a required"),
    ],
)
def test_a_hook_that_does_not_take_its_arguments_is_refused_when_the_class_is_made(
    hook, function, message
):
    with pytest.raises(UserError, match=rf"Mine\.{message}"):
        type("Mine", (Callback,), {hook: function, "load_state_dict": lambda self, state: None})


def test_what_is_no_callback_and_a_name_of_the_library_are_refused(run):
    with pytest.raises(ValueError, match=r"train\.callbacks\.mine: expected a dn_detr\.engine\.Ca"):
        run(mine=LazyCall(NoCallback)())
    with pytest.raises(ValueError, match=r"train\.callbacks\.progress: the library has a callback"):
        run(progress=LazyCall(Recorder)())


def test_a_callback_can_be_changed_from_the_command_line(run, tiny_config, tmp_path):
    from dn_detr.config import LazyConfig

    cfg = tiny_config("train.max_iter=2")
    cfg.train.callbacks = {"mine": LazyCall(Recorder)(scale=2.0)}
    train(LazyConfig.apply_overrides(cfg, ["train.callbacks.mine.scale=4"]))
    assert rows(tmp_path / "run")[0]["my/steps"] == 6.0


def test_further_models_are_evaluated_and_resumed(run):
    options = ("train.checkpoint.period=1", "train.ema.enabled=true")
    slow = LazyCall(ExponentialMovingAverage)(decay=0.99, name="slow_ema")
    whole = rows(run(*options, name="whole", mine=slow))[-1]
    assert len({whole[f"eval/{name}AP"] for name in ("", "ema/", "slow_ema/")}) == 3
    run(*options, "train.max_iter=2", mine=slow)
    assert rows(run(*options, mine=slow, resume=True))[-1] == whole


def run_on_two_ranks(folder: str) -> None:
    from dn_detr.config import LazyConfig

    from .conftest import TINY_CONFIG

    cfg = LazyConfig.load(TINY_CONFIG)
    cfg.train.callbacks = {"mine": LazyCall(Recorder)(scale=1.0)}
    overrides = [f"train.output_dir={folder}/run", "train.max_iter=2"]
    train(LazyConfig.apply_overrides(cfg, overrides))
    Path(folder, f"calls_{rank()}").write_text("\n".join(CALLS))


@pytest.mark.slow
def test_every_rank_has_its_callback_and_the_main_process_alone_gets_log_records(tmp_path):
    launch(run_on_two_ranks, 2, str(tmp_path), device="cpu")
    assert rows(tmp_path / "run")[0]["my_images"] == 8  # summed over ranks
    assert rows(tmp_path / "run")[0]["my/steps"] == 1.5  # averaged
    calls = [(tmp_path / f"calls_{i}").read_text().splitlines() for i in range(2)]
    assert [call for call in calls[0] if not call.startswith("log")] == calls[1]
    assert calls[0] != calls[1]


def test_a_callback_that_saves_and_cannot_load_is_refused():
    with pytest.raises(UserError, match="Saving needs both state_dict and load_state_dict"):

        class Saving(Callback):
            def state_dict(self):
                return {}
