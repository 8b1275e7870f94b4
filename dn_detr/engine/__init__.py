"""Training and evaluation of a config: the loop, its parts, its ranks, callbacks and logs."""

from .build import (
    build_callbacks,
    build_checkpoint_writer,
    build_evaluator,
    build_loaders,
    build_model,
    build_optimizer,
    build_schedule,
    build_step,
)
from .callbacks import Callback
from .devices import choose_device
from .evaluation import evaluate, evaluate_model
from .launch import LaunchError, ProcessFailure, launch
from .memory import OutOfMemory
from .nonfinite import NonFiniteError
from .optimizer import describe_groups, parameter_groups
from .random_state import seed_everything
from .run_state import RunState
from .schedule import LearningRateRule, Timetable, cosine, multi_step, set_learning_rates
from .settings import TrainSettings
from .step import Outcome, StepResult, TrainingStep
from .stopping import (
    EXIT_DONE,
    EXIT_ERROR,
    EXIT_SIGNAL,
    EXIT_STOPPED,
    KilledError,
    Stopped,
    StopRequest,
)
from .trainer import Trainer
from .training import build_trainer, train
from .writers import RecordWriter

__all__ = [
    "EXIT_DONE",
    "EXIT_ERROR",
    "EXIT_SIGNAL",
    "EXIT_STOPPED",
    "Callback",
    "KilledError",
    "LaunchError",
    "LearningRateRule",
    "NonFiniteError",
    "OutOfMemory",
    "Outcome",
    "ProcessFailure",
    "RecordWriter",
    "RunState",
    "StepResult",
    "StopRequest",
    "Stopped",
    "Timetable",
    "TrainSettings",
    "Trainer",
    "TrainingStep",
    "build_callbacks",
    "build_checkpoint_writer",
    "build_evaluator",
    "build_loaders",
    "build_model",
    "build_optimizer",
    "build_schedule",
    "build_step",
    "build_trainer",
    "choose_device",
    "cosine",
    "describe_groups",
    "evaluate",
    "evaluate_model",
    "launch",
    "multi_step",
    "parameter_groups",
    "seed_everything",
    "set_learning_rates",
    "train",
]
