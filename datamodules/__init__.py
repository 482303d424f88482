"""LightningDataModules of task-incremental personalization benchmarks."""

from pl_personalize.datamodules.base import TaskIncrementalDataModule
from pl_personalize.datamodules.cameraprior import CameraPriorDataModule
from pl_personalize.datamodules.catprior import CatPriorDataModule
from pl_personalize.datamodules.digits import DigitsDataModule
from pl_personalize.datamodules.labelled_images import ImageRows, LabelledImages
from pl_personalize.datamodules.loader import TensorLoader, tensor_loader
from pl_personalize.datamodules.numbers import NumbersDataModule
from pl_personalize.datamodules.scenes import SceneDataModule
from pl_personalize.datamodules.show_users import show_users
from pl_personalize.datamodules.transprior import TransPriorDataModule

__all__ = [
    "CameraPriorDataModule",
    "CatPriorDataModule",
    "DigitsDataModule",
    "ImageRows",
    "LabelledImages",
    "NumbersDataModule",
    "SceneDataModule",
    "TaskIncrementalDataModule",
    "TensorLoader",
    "TransPriorDataModule",
    "show_users",
    "tensor_loader",
]
