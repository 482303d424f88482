"""Task by user by method: the stages of an experiment, resumable."""

from pl_personalize.runner.methods import (
    ADAPTATIONS,
    MERGES_AND_BOUNDS,
    MERGING_METHODS,
    METHODS,
    AdaptationName,
    MethodName,
)
from pl_personalize.runner.options import (
    AdaptationOptions,
    BaselineOptions,
    ImportanceOptions,
    LoggerName,
    TestedModels,
    TrainerOptions,
    TrainingOptions,
    WandbOptions,
)
from pl_personalize.runner.paper import paper_by_label, paper_results
from pl_personalize.runner.run import run_experiment

__all__ = [
    "ADAPTATIONS",
    "MERGES_AND_BOUNDS",
    "MERGING_METHODS",
    "METHODS",
    "AdaptationName",
    "AdaptationOptions",
    "BaselineOptions",
    "ImportanceOptions",
    "LoggerName",
    "MethodName",
    "TestedModels",
    "TrainerOptions",
    "TrainingOptions",
    "WandbOptions",
    "paper_by_label",
    "paper_results",
    "run_experiment",
]
