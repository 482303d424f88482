"""LightningDataModules that encode task-incremental personalisation benchmarks."""

from pl_personalize.datamodules.base import LabelledImages, TaskIncrementalDataModule
from pl_personalize.datamodules.digits import DigitsDataModule
from pl_personalize.datamodules.loader import TensorLoader, tensor_loader
from pl_personalize.datamodules.numbers import NumbersDataModule

__all__ = [
    "DigitsDataModule",
    "LabelledImages",
    "NumbersDataModule",
    "TaskIncrementalDataModule",
    "TensorLoader",
    "tensor_loader",
]
