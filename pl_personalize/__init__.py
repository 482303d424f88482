"""Dual User-Adaptation for PyTorch Lightning: importances, merging and adaptation that personalize a model per user."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("pl-personalize")
except PackageNotFoundError:  # a checkout that is on the path but not installed
    __version__ = "0.0.0"

from pl_personalize.adaptation import adapt_batchnorm
from pl_personalize.artifacts import ArtifactError
from pl_personalize.batchnorm import BatchNormStatistics
from pl_personalize.device_merging import merge_on_device
from pl_personalize.estimation import estimate_importance
from pl_personalize.heads import HeadAdaptation, HeadReference, adapt_head, refit_head
from pl_personalize.importance import Importance
from pl_personalize.learned_merging import learn_merge
from pl_personalize.merging import merge, merge_prefixes
from pl_personalize.modules import LwFLearner, MergeModule, TaskLearner

__all__ = [
    "ArtifactError",
    "BatchNormStatistics",
    "HeadAdaptation",
    "HeadReference",
    "Importance",
    "LwFLearner",
    "MergeModule",
    "TaskLearner",
    "adapt_batchnorm",
    "adapt_head",
    "estimate_importance",
    "learn_merge",
    "merge",
    "merge_on_device",
    "merge_prefixes",
    "refit_head",
]
