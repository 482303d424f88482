"""LwF: one model through all tasks, which keeps the answers of its earlier heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from torch import Tensor, nn
from typing_extensions import override

from pl_personalize.checks import check_option
from pl_personalize.functional.state_dicts import PrefixView
from pl_personalize.methods.method import Method
from pl_personalize.methods.sequence import SequenceFamily
from pl_personalize.models import TaskNetwork
from pl_personalize.modules import LwFLearner, TaskLearner


@dataclass(frozen=True)
class LwFOptions:
    """Learning without Forgetting.

    Attributes:
        strength: λ of the distillation.
        temperature: T of the distillation.
    """

    strength: float = 1.0
    temperature: float = 2.0

    def __post_init__(self) -> None:
        check_option("method.lwf.strength", self.strength)
        check_option("method.lwf.temperature", self.temperature, exclusive=True)


class LwFFamily(SequenceFamily):
    """Learning without Forgetting (Li and Hoiem, ECCV 2016): all heads so far are trained with each task."""

    name, Options = "LwF", LwFOptions
    shares_first = True

    @override
    def learner(self, task: int, network: TaskNetwork, before: Mapping[str, Tensor] | None) -> TaskLearner:
        heads: list[nn.Module] = []
        for earlier in range(task):
            assert before is not None
            head = self.workspace.network(self.data.num_classes(earlier), earlier).head
            head.load_state_dict(self._head(before, earlier, task - 1))
            heads.append(head)
        return LwFLearner(network, heads, **asdict(self.options), **self.workspace.learner_options(task))

    @override
    def own_heads(self, models: Sequence[Mapping[str, Tensor]]) -> dict[tuple[int, int], Mapping[str, Tensor]]:
        return {(t, i): self._head(model, i, t) for t, model in enumerate(models) for i in range(t)}

    @staticmethod
    def _head(model: Mapping[str, Tensor], task: int, last: int) -> Mapping[str, Tensor]:
        """The head of a task in the model after task ``last``, both from 0."""
        return PrefixView(model, "head" if task == last else f"old_heads.{task}")


LWF = Method(
    "LwF",
    LwFFamily,
    "one model through all tasks, distilled from its earlier heads",
    "Li and Hoiem, ECCV 2016",
)
