"""Task by user by method: the stages of an experiment, resumable."""

from pl_personalize.runner.methods import BOUNDS, MERGE_METHODS, MethodName
from pl_personalize.runner.options import TrainerOptions, TrainingOptions, WandbOptions
from pl_personalize.runner.run import run_experiment

__all__ = [
    "BOUNDS",
    "MERGE_METHODS",
    "MethodName",
    "TrainerOptions",
    "TrainingOptions",
    "WandbOptions",
    "run_experiment",
]
