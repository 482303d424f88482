"""Training of a network that keeps the answers of its earlier heads."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from typing_extensions import override

from pl_personalize.checks import check_option
from pl_personalize.functional.distillation import distillation_loss
from pl_personalize.functional.state_dicts import module_versions, with_versions
from pl_personalize.models import TaskNetwork
from pl_personalize.modules.task_learner import TaskLearner


class LwFLearner(TaskLearner):
    r"""Learning without Forgetting: trains one task, and keeps what the heads of earlier tasks answer.

    The loss is the cross-entropy of the new head plus λ times, for each earlier head, the
    :func:`~pl_personalize.functional.distillation.distillation_loss` to what the network answered before this task, on
    the new task's images (Li and Hoiem, ECCV 2016). Body and all heads are trained. The protocol is otherwise
    :class:`~pl_personalize.TaskLearner`'s, without L2-transfer.

    Args:
        network: The body after the task before, and a new head. It is trained in place.
        old_heads: The heads of the earlier tasks, in order; trained in place.
        strength: λ.
        temperature: T.
        options: Of :class:`~pl_personalize.TaskLearner`, without ``l2_transfer`` and ``anchor``.

    Attributes:
        old_heads: The heads of the earlier tasks.

    Raises:
        MisconfigurationException: If a number is out of range.
    """

    def __init__(
        self,
        network: TaskNetwork,
        old_heads: Sequence[nn.Module] | nn.ModuleList = (),
        *,
        strength: float = 1.0,
        temperature: float = 2.0,
        **options: Any,
    ) -> None:
        if own := {"l2_transfer", "anchor"} & options.keys():
            raise MisconfigurationException(
                f"LwFLearner takes no {' and no '.join(sorted(own))}: it has no L2-transfer."
            )
        if not isinstance(old_heads, list | tuple | nn.ModuleList):
            raise MisconfigurationException(
                f"old_heads must be a sequence of heads, one for each earlier task; got a {type(old_heads).__name__}."
            )
        if any(head is network.head for head in old_heads):
            raise MisconfigurationException(
                "One of old_heads is the network's present head. Keep it, and call network.new_head(num_classes) first."
            )
        super().__init__(network, l2_transfer=0.0, **options)
        check_option("strength", strength)
        check_option("temperature", temperature, exclusive=True)
        self.strength, self.temperature = strength, temperature
        self.old_heads = nn.ModuleList(old_heads)
        # In a list, so that it is no part of the module: not trained, not in checkpoints, always in eval mode.
        teacher = copy.deepcopy(nn.ModuleList([network.body, *old_heads])).eval().requires_grad_(False)
        self._teacher = [teacher]

    @override
    def model_state(self) -> dict[str, Tensor]:
        """The entries ``body.…``, ``head.…``, and of each earlier head ``old_heads.{i}.…``."""
        state, old_heads = super().model_state(), self.old_heads.state_dict()
        entries = state | {f"old_heads.{name}": value for name, value in old_heads.items()}
        return with_versions(entries, module_versions(state))

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = super().configure_optimizers()
        optimizer.param_groups[0]["params"].extend(p for p in self.old_heads.parameters() if p.requires_grad)
        return optimizer

    @override
    def on_fit_start(self) -> None:
        """Bring the teacher to the device, and to the precision of the Trainer."""
        self._teacher[0].to(tensor=self.network.head.weight)

    @override
    def training_loss(self, x: Tensor, y: Tensor) -> Tensor:
        features = self.network.body(x)
        loss = F.cross_entropy(self.network.head(features), y)
        if len(self.old_heads) == 0:
            return loss
        body, *heads = self._teacher[0]
        with torch.no_grad():
            before = body(x)
            targets = [head(before) for head in heads]
        answers = [head(features) for head in self.old_heads]
        kept = [distillation_loss(z, target, self.temperature) for z, target in zip(answers, targets, strict=True)]
        return loss + self.strength * torch.stack(kept).sum()
