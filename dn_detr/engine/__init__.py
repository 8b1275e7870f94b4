"""Training and evaluation of a config: the loop, its processes, schedules, groups and logs."""

from .evaluation import evaluate, evaluate_model
from .launch import LaunchError, ProcessFailure, launch
from .memory import OutOfMemory
from .nonfinite import NonFiniteError
from .optimizer import describe_groups, parameter_groups
from .schedule import LearningRateRule, Timetable, cosine, multi_step
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
from .training import train

__all__ = [
    "EXIT_DONE",
    "EXIT_ERROR",
    "EXIT_SIGNAL",
    "EXIT_STOPPED",
    "KilledError",
    "LaunchError",
    "LearningRateRule",
    "NonFiniteError",
    "OutOfMemory",
    "Outcome",
    "ProcessFailure",
    "StepResult",
    "StopRequest",
    "Stopped",
    "Timetable",
    "TrainSettings",
    "Trainer",
    "TrainingStep",
    "cosine",
    "describe_groups",
    "evaluate",
    "evaluate_model",
    "launch",
    "multi_step",
    "parameter_groups",
    "train",
]
