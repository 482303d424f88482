"""Merging experts into one model for a user, and testing it."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from typing_extensions import override

from pl_personalize.adaptations import AdaptationSequence, Received
from pl_personalize.adaptations.expert_statistics import average_statistics, statistics_names
from pl_personalize.artifacts import TensorFile, open_state_dict
from pl_personalize.functional.names import some
from pl_personalize.functional.state_dicts import (
    PrefixView,
    StateDict,
    module_versions,
    versions_above,
    with_versions,
)
from pl_personalize.importance import ARTIFACT_KIND as IMPORTANCE_KIND
from pl_personalize.merging import MERGE_RULES, Normalize, merge, merge_prefixes
from pl_personalize.models import TaskNetwork
from pl_personalize.modules.sequence_evaluator import Cell, Models, SequenceEvaluator

EXPERT_KIND = "expert"
Expert = StateDict | str | os.PathLike[str]
Importances = Sequence[StateDict | str | os.PathLike[str]]


class MergeModule(SequenceEvaluator):
    """Merges the experts of tasks 1..t, for each t, and tests the merges on all tasks so far.

    Importance-weighted IMM and RACL of De Lange et al., CVPR 2020: with importances from the server's data one model
    serves everybody (IMM); with importances that each user computed on unlabelled images, each gets a model (RACL);
    without importances it is the plain mean. Bodies are merged; heads are kept per task. The model after task 1 is
    expert 1 itself. Where batch-norm statistics come from is a choice of its own, ``bn_policy``.

    Args:
        network: The architecture; its own parameters are not used.
        experts: One for each task: a state dict of a :class:`~pl_personalize.models.TaskNetwork` or of a
            :class:`~pl_personalize.TaskLearner`, or a file with one, which is read when needed: one that
            :func:`~pl_personalize.artifacts.save_tensors` wrote with kind ``"expert"``, a checkpoint of Lightning, a
            state dict saved with ``torch.save``, or any safetensors file.
        importances: One mapping or importance file for each expert, with names relative to the body, to the network
            (``body.…``) or to a :class:`~pl_personalize.TaskLearner` (``network.body.…``); or for each user's name such
            a sequence; or ``None`` for the plain mean.
        rule: The merge rule, see :func:`~pl_personalize.merge`.
        base: For rules that need one: the model that the experts started from, given like an expert.
        user: Whose importances to use, where there are several users; by default the datamodule's user.
        normalize: See :func:`~pl_personalize.merge`.
        weights: See :func:`~pl_personalize.merge`.
        models: ``"all"``; ``"last"``: only the merge of all experts; or ``"own"``: each merge on its newest task alone.
        bn_policy: Adaptation of the merge of experts 1..t to task i, see :class:`SequenceEvaluator`. Besides those that
            any model may have:

            * ``"average"``: statistics of the mixture of experts 1..t (means and second moments averaged with
              ``weights``), which every other adaptation starts from;
            * ``"expert"``: those of expert i;
            * ``"last"``: those of expert t;
            * ``"reference"``: as the published code: γ and β of the merge of 1..i, statistics of expert t.

            By default AdaBN where the Trainer's datamodule has a user's images (``adapt_dataloader(task)``), else none,
            which leaves the average. Only the replaced entries are kept per model and task, not a copy of the model.
        bn_options: See :class:`SequenceEvaluator`. With ``prior_samples``, the prior is the average of the experts.
        rule_options: Options of the merge rule, such as ``zero`` of ``"weighted"``.

    Raises:
        MisconfigurationException: If experts and importances do not fit each other, a user is not known, or the policy
            is unknown or needs data that are not there.

    Example:
        >>> from pl_personalize.models import mlp
        >>> experts = [mlp((4,), 2).state_dict() for _ in range(2)]
        >>> sorted(MergeModule(mlp((4,), 2), experts).export())[-2:]
        ['heads.1.bias', 'heads.1.weight']
    """

    def __init__(
        self,
        network: TaskNetwork,
        experts: Sequence[Expert],
        importances: Importances | Mapping[str, Importances] | None = None,
        *,
        rule: str = "weighted",
        base: Expert | None = None,
        user: str | None = None,
        normalize: Normalize | None = None,
        weights: Sequence[float] | None = None,
        models: Models = "all",
        bn_policy: str | AdaptationSequence | None = None,
        bn_options: Mapping[str, Any] | None = None,
        **rule_options: Any,
    ) -> None:
        if isinstance(experts, str | os.PathLike):
            raise MisconfigurationException(f"experts must be a sequence, one for each task; got {str(experts)!r}.")
        states = [_open_expert(expert) for expert in experts]
        heads, bodies = ([_part(state, module) for state in states] for module in ("head", "body"))
        super().__init__(network, bodies, heads, models=models, bn_policy=bn_policy, bn_options=bn_options)
        if isinstance(importances, Mapping):
            for name, one in importances.items():
                self._check_count(one, f" of user {name!r}")
        elif importances is not None:
            self._check_count(importances, "")
        self.importances, self.user = importances, user
        self._weights = weights
        try:
            MERGE_RULES.find(rule).make_options(rule_options)
        except ValueError as error:
            raise MisconfigurationException(f"MergeModule: {error}") from error
        self._options = {"rule": rule, "normalize": normalize, "weights": weights, **rule_options}
        if base is not None:
            self._options["base"] = _part(_open_expert(base), "body")

    def _check_count(self, importances: Importances, of_whom: str) -> None:
        if len(importances) != self.num_tasks:
            raise MisconfigurationException(
                f"There are {self.num_tasks} experts but {len(importances)} importances{of_whom}; give one for each."
            )

    def importances_of(self, user: str | None = None) -> list[StateDict] | None:
        """The importances that a merge for ``user`` takes, with names relative to the body."""
        chosen = self.importances
        if isinstance(chosen, Mapping):
            name = user or self.user or self._user_of_the_datamodule()
            if name is None or name not in chosen:
                raise MisconfigurationException(
                    f"There are importances for the users {', '.join(map(repr, chosen))}, and the user is {name!r}. "
                    "Set user=, or give the Trainer a datamodule whose user is one of them."
                )
            chosen = chosen[name]
        return None if chosen is None else [_open_importance(one, set(self.bodies[0])) for one in chosen]

    def _user_of_the_datamodule(self) -> str | None:
        datamodule = getattr(self._trainer, "datamodule", None)
        name: str | None = getattr(datamodule, "user", None)
        return name

    merges = True

    @override
    def load_bodies(self) -> Sequence[StateDict]:
        """The merges of experts 1, 1..2, …, 1..T, with the average batch-norm statistics of their experts."""
        importances = self.importances_of()
        merges: list[StateDict]
        if self.models == "last":
            merges = [*self.bodies[:-1], merge(self.bodies, importances, **self._options)]
        else:
            merges = [*merge_prefixes(self.bodies, importances, **self._options)]
        if statistics_names(self.network.body):
            merges = [{**body, **self._average(t + 1)} for t, body in enumerate(merges)]
        return merges

    @override
    def received(self, cell: Cell, bodies: Sequence[StateDict], seed: int = 0) -> Received:
        count = cell[0] + 1
        weights = None if self._weights is None else self._weights[:count]
        return Received(
            *cell, seed=seed, experts=self.bodies[:count], weights=weights, bodies=bodies, sent=self._sent(cell)
        )

    def _average(self, count: int) -> StateDict:
        """Statistics of the mixture of the first experts, weighted as in the merge."""
        weights = None if self._weights is None else self._weights[:count]
        return average_statistics(self.network.body, self.bodies[:count], weights)

    def export(self, user: str | None = None) -> dict[str, Tensor]:
        """The merge of all experts with the heads of all tasks.

        A state dict has one set of batch-norm statistics: those of the last expert if ``bn_policy`` is ``"last"`` or
        ``"reference"``, else the average of the experts. After a test, ``adapted[T - 1, i]`` has the entries that the
        adaptation found for task i; load them before the model is used on it.

        Args:
            user: Whose, where there are several users.

        Returns:
            A state dict of :class:`~pl_personalize.models.MultiHeadNetwork`: ``body.…`` and ``heads.{task}.…``.
        """
        body = merge(self.bodies, self.importances_of(user), **self._options)
        keeps_last = self.adaptation is not None and self.adaptation.name in ("last", "reference")
        if statistics_names(self.network.body) and not keeps_last:
            body.update(self._average(self.num_tasks))
        state = {f"body.{name}": value for name, value in body.items()}
        versions = versions_above(module_versions(body), "body")
        for i, head in enumerate(self.heads):
            copies = {n: v.clone() if isinstance(v, Tensor) else copy.deepcopy(v) for n, v in head.items()}
            state.update({f"heads.{i}.{name}": value for name, value in copies.items()})
            versions.update(versions_above(module_versions(head), f"heads.{i}"))
        return with_versions(state, versions or None)


def _part(state: StateDict, module: str) -> StateDict:
    """The entries of a submodule.

    Raises:
        MisconfigurationException: If there are none.
    """
    part = PrefixView(state, module)
    if not part:
        raise MisconfigurationException(
            f"An expert must be a state dict of a TaskNetwork; it has no entries below {module!r}: {some(state)}."
        )
    return part


def _open_expert(expert: Expert) -> StateDict:
    """The entries ``body.…`` and ``head.…`` of an expert; those of a TaskLearner are below ``network``."""
    if isinstance(expert, nn.Module):
        raise MisconfigurationException(f"An expert must be a state dict or a file; got a {type(expert).__name__}.")
    state = expert if isinstance(expert, Mapping) else open_state_dict(expert, kind=EXPERT_KIND)
    return PrefixView(state, "network") if any(name.startswith("network.body.") for name in state) else state


def _open_importance(importance: StateDict | str | os.PathLike[str], body: set[str]) -> StateDict:
    """The importances with names relative to the body; those of the head have no part in a merge."""
    opened = importance if isinstance(importance, Mapping) else TensorFile(importance, kind=IMPORTANCE_KIND)
    if not set(opened) <= body:
        for module in ("network.body", "body"):
            if any(name.startswith(f"{module}.") for name in opened):
                return PrefixView(opened, module)
    return opened
