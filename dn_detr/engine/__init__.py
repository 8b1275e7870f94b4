"""Training and evaluation of a config: the loop, its processes, schedules, groups and logs."""

from .errors import LaunchError, NonFiniteError, ProcessFailure, is_user_error, user_message
from .evaluation import evaluate, evaluate_model
from .launch import launch
from .memory import OutOfMemory
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
    "is_user_error",
    "launch",
    "multi_step",
    "parameter_groups",
    "train",
    "user_message",
]
