"""Base class for callbacks on the last layer of a network."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from pl_personalize.callbacks.estimation_callback import EstimationCallback
from pl_personalize.callbacks.module_contexts import gather_rows
from pl_personalize.callbacks.requirements import naming_errors
from pl_personalize.heads.features import HeadOf


class HeadCallback(EstimationCallback):
    """Base class for callbacks that change the last layer, of the name ``head`` or found by a forward pass."""

    folder = "heads"

    def __init__(self, dataloader: Any = None, *, head: str | None = None, **options: Any) -> None:
        super().__init__(dataloader, weights="last", **options)
        self._head = head

    @override
    def check_module(self, pl_module: LightningModule) -> bool:
        """Refuse the name of a layer that cannot be a head."""
        if self._head is not None:
            with naming_errors(self, pl_module):
                HeadOf(pl_module, self._head)
        return True

    def head_options(self, trainer: Trainer) -> dict[str, Any]:
        """Options of a pass over a Trainer's data that refits or adapts the head."""
        shown = trainer.progress_bar_callback is not None and trainer.is_global_zero
        return {"head": self._head, "forward": self.forward, "gather": gather_rows(trainer), "progress": shown}
