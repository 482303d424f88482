"""Experiments: seeds × methods × adaptations × users, in resumable stages."""

from pl_personalize.models.network_options import NetworkOptions
from pl_personalize.runner.experiment import DEFAULT_METHODS, AdaptationOptions, Experiment, MethodOptions
from pl_personalize.runner.options import LoggerName, TestedModels, WandbOptions
from pl_personalize.runner.paper import paper_by_label, paper_results
from pl_personalize.runner.run import run_experiment
from pl_personalize.stages.options import ImportanceOptions, TrainerOptions, TrainingOptions

__all__ = [
    "DEFAULT_METHODS",
    "AdaptationOptions",
    "Experiment",
    "ImportanceOptions",
    "LoggerName",
    "MethodOptions",
    "NetworkOptions",
    "TestedModels",
    "TrainerOptions",
    "TrainingOptions",
    "WandbOptions",
    "paper_by_label",
    "paper_results",
    "run_experiment",
]
