"""LightningModules: training an expert, merging experts, evaluating a sequence of models."""

from pl_personalize.modules.lwf_learner import LwFLearner
from pl_personalize.modules.merge_module import MergeModule
from pl_personalize.modules.sequence_evaluator import SequenceEvaluator
from pl_personalize.modules.task_learner import TaskLearner

__all__ = ["LwFLearner", "MergeModule", "SequenceEvaluator", "TaskLearner"]
