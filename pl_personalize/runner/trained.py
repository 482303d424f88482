"""Trained models, and their files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from pl_personalize.artifacts import TensorFile
from pl_personalize.functional.state_dicts import PrefixView, module_versions, with_versions
from pl_personalize.modules.merge_module import EXPERT_KIND


def refuse_divergence(stage: str, network: nn.Module, what: str) -> None:
    """Refuse a model that training has broken.

    Raises:
        MisconfigurationException: If a parameter is NaN or infinite.
    """
    if not all(bool(torch.isfinite(p).all()) for p in network.parameters()):
        raise MisconfigurationException(
            f"{stage}: the training diverged (parameters are NaN or infinite). Try a smaller {what}."
        )


def part(state: Mapping[str, Tensor], module: str) -> dict[str, Tensor]:
    """The entries of a submodule, with names relative to it."""
    view = PrefixView(state, module)
    return with_versions(view, module_versions(view))


def open_expert(path: Path) -> TensorFile:
    """The file of a trained model."""
    return TensorFile(path, kind=EXPERT_KIND)
