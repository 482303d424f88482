"""Evaluation of a sequence of models on all the tasks that each has seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from pl_personalize.functional.names import prefix_hint, some
from pl_personalize.metrics import TaskAccuracyMatrix, average_accuracy, forgetting
from pl_personalize.models import TaskNetwork
from pl_personalize.modules.batchnorm_policy import (
    OWN_POLICIES,
    BNPolicy,
    check_options,
    check_policy,
    data_for,
    re_estimate,
    resolve_policy,
    statistics_names,
)
from pl_personalize.per_sample.swapped_weights import call_with_weights

StateDict = Mapping[str, Tensor]
Models = Literal["all", "last", "own"]


class SequenceEvaluator(LightningModule):
    """Tests models 1..T, each on tasks 1..t, with the head of the task: the lower triangle of the accuracy matrix.

    One ``trainer.test(evaluator, datamodule=...)`` does it, with one test loader for each task, in order. It logs
    ``test/acc/t{t}/task{i}`` (model t on task i, from 1), ``test/avg_acc``, ``test/forgetting`` (divided by T, as in
    the tables of De Lange et al., CVPR 2020) and ``test/forgetting_cl`` (divided by T - 1), all in [0, 1]; ``matrix``
    has the whole. Models are state dicts that are swapped into one network.

    Args:
        network: The architecture; its own parameters are not used.
        bodies: The body of each model 1..T, with names relative to the body.
        heads: The head of each task 1..T, with names relative to the head.
        models: ``"all"``; ``"last"``: only the model after the last task; or ``"own"``: each model on its own task
            alone, whose mean is ``test/avg_acc`` then. Neither of the two has a forgetting.
        bn_policy: Where batch-norm statistics come from: ``"last"``, each model's own; or re-estimated for each model
            and task, on images of the Trainer's datamodule: ``"recalibrate"``, on the server's validation images
            (``server_dataloader(task, split="val")``), or ``"adapt"``, on the user's unlabelled images
            (``adapt_dataloader(task)``). Without batch norm it has no meaning.
        bn_options: For these, options of :func:`~pl_personalize.adapt_batchnorm`: ``exact``, ``prior_samples``,
            ``max_scratch_mb``.
        entries: Of model t on task i (both from 0), what replaces entries of its body, such as batch norm that was
            trained for the task; then no other pair is tested.
        own_heads: Of model t on task i (both from 0), a head that takes the place of the task's, for models that go on
            training the heads of earlier tasks.

    Attributes:
        matrix: After a test, the (T, T) accuracies, model by task, in [0, 1]; NaN where there is none.
        statistics: After a test, what the batch-norm policy put in place, by model and task, both from 0; names are
            relative to the body.

    Raises:
        MisconfigurationException: If the numbers of bodies, heads and test loaders differ, entries or shapes do not fit
            the network, or the policy is unknown or needs data that are not there.
    """

    def __init__(
        self,
        network: TaskNetwork,
        bodies: Sequence[StateDict],
        heads: Sequence[StateDict],
        *,
        models: Models = "all",
        bn_policy: BNPolicy | None = "last",
        bn_options: Mapping[str, Any] | None = None,
        entries: Mapping[tuple[int, int], StateDict] | None = None,
        own_heads: Mapping[tuple[int, int], StateDict] | None = None,
    ) -> None:
        super().__init__()
        check_policy(bn_policy, self.policies)
        check_options(bn_options or {})
        if models not in get_args(Models):
            raise MisconfigurationException(f"models must be one of {', '.join(get_args(Models))}; got {models!r}.")
        if len(bodies) != len(heads) or not heads:
            raise MisconfigurationException(
                f"There are {len(bodies)} bodies for {len(heads)} heads; give one each for a task."
            )
        self.network = network
        self.bodies, self.heads, self.models = list(bodies), list(heads), models
        for part, states in (("body", self.bodies), ("head", self.heads)):
            own = network.get_submodule(part).state_dict().keys()
            for t, state in enumerate(states):
                if different := sorted(own ^ set(state)):
                    raise MisconfigurationException(
                        f"The {part} of model {t + 1} does not fit the network: they differ in the entries "
                        f"{some(different)}.{prefix_hint([name for name in state if name not in own], own)}"
                    )
        self.bn_policy, self.bn_options, self.entries = bn_policy, dict(bn_options or {}), dict(entries or {})
        self.own_heads = dict(own_heads or {})
        self.statistics: dict[tuple[int, int], StateDict] = {}
        self.accuracy = TaskAccuracyMatrix(len(heads))
        self.matrix: Tensor | None = None
        self._states: dict[tuple[int, int], dict[str, Tensor]] = {}

    policies: ClassVar[Sequence[BNPolicy]] = OWN_POLICIES
    """What ``bn_policy`` may be."""

    @property
    def num_tasks(self) -> int:
        """T."""
        return len(self.heads)

    @property
    def cells(self) -> list[tuple[int, int]]:
        """What is tested: pairs of model and task, both from 0."""
        count = self.num_tasks
        if self.models == "own":
            return [(t, t) for t in range(count)]
        return [(t, i) for t in range(0 if self.models == "all" else count - 1, count) for i in range(t + 1)]

    def head_of(self, model: int, task: int) -> StateDict:
        """The head that a model is tested with on a task, both from 0."""
        return self.own_heads.get((model, task), self.heads[task])

    def load_bodies(self) -> Sequence[StateDict]:
        """The bodies to test; called when a test starts."""
        return self.bodies

    @override
    def on_test_start(self) -> None:
        """Bring the models to the device and check that there is a test loader for each task."""
        loaders = self.trainer.test_dataloaders
        count = len(loaders) if isinstance(loaders, list | tuple) else 1
        if count != self.num_tasks:
            raise MisconfigurationException(
                f"There are {count} test loaders for {self.num_tasks} tasks; give one for each task, in order."
            )
        bodies = self.load_bodies()
        cells = [cell for cell in self.cells if not self.entries or cell in self.entries]
        placed = {t: self._placed("body", self._once(bodies[t])) for t in dict.fromkeys(t for t, _ in cells)}
        own = self.network.state_dict()
        for t, state in placed.items():
            for name, value in state.items():
                if value.shape != own[name].shape:
                    raise MisconfigurationException(
                        f"{name.removeprefix('body.')!r} in the body of model {t + 1} is {tuple(value.shape)}; in the "
                        f"network it is {tuple(own[name].shape)}."
                    )
        states = {(t, i): placed[t] | self._placed("head", self.head_of(t, i)) for t, i in cells}
        if not self.entries and statistics_names(self.network.body):
            policy = resolve_policy(self.bn_policy, self)
            self.statistics = {cell: self.batchnorm_entries(policy, cell, states) for cell in states}
        for cell, state in states.items():
            own_entries = self.entries.get(cell) or self.statistics.get(cell, {})
            state.update(self._placed("body", own_entries))
        self._states = states
        self.accuracy.reset()

    def _placed(self, part: str, state: StateDict) -> dict[str, Tensor]:
        """The tensors of body or head by their names in the network, on its device and in its precision."""
        own = self.network.get_submodule(part).state_dict()
        return {f"{part}.{name}": value.to(own[name]) for name, value in state.items() if isinstance(value, Tensor)}

    def _once(self, body: StateDict) -> StateDict:
        """The entries of a body; those of a module with several names once, which functional_call cannot restore."""
        names = [
            f"{prefix}.{name}".removeprefix(".")
            for prefix, module in self.network.body.named_modules()
            for name in (*module._parameters, *module._buffers)
        ]
        return {name: body[name] for name in names if name in body}

    def batchnorm_entries(
        self, policy: BNPolicy, cell: tuple[int, int], states: Mapping[tuple[int, int], StateDict]
    ) -> StateDict:
        """The entries of batch-norm layers that a policy puts in place.

        Args:
            policy: The policy.
            cell: Model and task, both from 0.
            states: The state dicts (``body.…``, ``head.…``) of all models on all tasks.

        Returns:
            By names relative to the body.
        """
        if policy == "last":
            return {}
        try:
            convert = self.trainer.precision_plugin.convert_input
            return re_estimate(self.network, states[cell], data_for(policy, self, cell[1]), self.bn_options, convert)
        except ValueError as error:
            raise MisconfigurationException(f"bn_policy={policy!r} on task {cell[1] + 1}: {error}") from error

    @override
    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count what each model that has seen the loader's task predicts right."""
        x, y = batch
        for (t, i), state in self._states.items():
            if i == dataloader_idx:
                logits: Tensor = call_with_weights(self.network, state, x)
                self.accuracy.update(logits.argmax(1), y, model=t, task=i)

    @override
    def on_test_epoch_end(self) -> None:
        """Log the matrix and what is said of it."""
        matrix = self.accuracy.compute().cpu().view(self.num_tasks, self.num_tasks)  # torchmetrics squeezes a 1×1
        self.matrix = matrix
        results = {
            f"test/acc/t{t + 1}/task{i + 1}": matrix[t, i]
            for t in range(self.num_tasks)
            for i in range(t + 1)
            if not torch.isnan(matrix[t, i])
        }
        results["test/avg_acc"] = matrix.diagonal().mean() if self.models == "own" else average_accuracy(matrix)
        if self.models == "all":
            results["test/forgetting"] = forgetting(matrix)
            results["test/forgetting_cl"] = forgetting(matrix, "earlier")
        self.log_dict(results, add_dataloader_idx=False)

    @override
    def on_test_end(self) -> None:
        """Release the models."""
        self._states = {}
