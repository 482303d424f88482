"""Task by user by method: the stages of an experiment, resumable."""

from pl_personalize.runner.methods import MERGING_METHODS, METHODS, MethodName
from pl_personalize.runner.options import (
    ImportanceOptions,
    LoggerName,
    TrainerOptions,
    TrainingOptions,
    WandbOptions,
)
from pl_personalize.runner.paper import paper_results
from pl_personalize.runner.run import run_experiment

__all__ = [
    "MERGING_METHODS",
    "METHODS",
    "ImportanceOptions",
    "LoggerName",
    "MethodName",
    "TrainerOptions",
    "TrainingOptions",
    "WandbOptions",
    "paper_results",
    "run_experiment",
]
