"""Training and evaluation of a config: the loop, its processes, schedules, groups and logs."""

from .distributed import LaunchError, ProcessFailure, launch
from .errors import NonFiniteError, is_user_error, user_message
from .evaluation import evaluate, evaluate_model
from .optimizer import describe_groups, parameter_groups
from .schedule import LearningRateRule, Timetable, cosine, multi_step
from .settings import TrainSettings
from .step import StepResult, TrainingStep
from .trainer import Trainer
from .training import train

__all__ = [
    "LaunchError",
    "LearningRateRule",
    "NonFiniteError",
    "ProcessFailure",
    "StepResult",
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
