"""Data, network and experts of a finished run, as its manifest records them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from pl_personalize.artifacts import read_json
from pl_personalize.datamodules import (
    CameraPriorDataModule,
    CatPriorDataModule,
    DigitsDataModule,
    NumbersDataModule,
    TaskIncrementalDataModule,
    TransPriorDataModule,
)
from pl_personalize.datamodules.scenes import SceneDataModule
from pl_personalize.models import TaskNetwork
from pl_personalize.runner import NetworkOptions
from pl_personalize.stages.workspace import load_expert

DATAMODULES: dict[str, type[DigitsDataModule | NumbersDataModule]] = {
    "Digits": DigitsDataModule,
    "Numbers": NumbersDataModule,
}


SCENES: dict[str, type[SceneDataModule]] = {
    "CatPrior": CatPriorDataModule,
    "TransPrior": TransPriorDataModule,
    "CameraPrior": CameraPriorDataModule,
}
D = TypeVar("D", bound=TaskIncrementalDataModule)


class FinishedRun(Generic[D]):
    """A run in a folder.

    Args:
        path: The folder.
        benchmarks: The data modules by the names of the benchmarks.

    Raises:
        MisconfigurationException: If it is of another benchmark.
    """

    def __init__(self, path: Path, benchmarks: Mapping[str, type[D]]) -> None:
        self.path, self._options = path, read_json(path / "manifest.json")["options"]
        benchmark = self._options.get("benchmark")
        if benchmark not in benchmarks:
            raise MisconfigurationException(f"{path} is a run of {benchmark}, not of {' or '.join(benchmarks)}.")
        options = {name: value for name, value in self._group("data").items() if name != "images"}  # a checksum
        self.data = benchmarks[benchmark](**options)
        self.network_options = NetworkOptions(**self._group("network"))

    def _group(self, name: str) -> dict[str, Any]:
        """The options ``name.…``, without that prefix."""
        prefix = f"{name}."
        return {key.removeprefix(prefix): value for key, value in self._options.items() if key.startswith(prefix)}

    def seeds(self, room: str) -> list[int]:
        """Seeds of the experts whose files are in a subfolder of the run, such as ``checkpoints`` or ``merged``."""
        return sorted(int(path.name.removeprefix("seed")) for path in self.path.glob(f"{room}/experts/seed*"))

    def network(self, task: int) -> TaskNetwork:
        """A new network for a task (from 0), with random parameters."""
        return replace(self.network_options, weights=None).make(self.data.image_shape, self.data.num_classes(task))

    def expert(self, seed: int, task: int) -> Mapping[str, Tensor]:
        """The state dict of the expert of a task (from 0)."""
        owner = "experts" if task else "first"  # methods share the expert of the first task
        path = self.path / "checkpoints" / owner / f"seed{seed}" / f"task{task + 1}.safetensors"
        if not path.is_file():
            raise MisconfigurationException(f"seed{seed} is not finished: there is no {path}.")
        return load_expert(path)
