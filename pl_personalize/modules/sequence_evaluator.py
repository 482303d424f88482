"""Evaluation of a sequence of models on all the tasks that each has seen."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NoReturn, get_args

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from pl_personalize.adaptations import (
    AdaptationSequence,
    Case,
    Device,
    Entries,
    Received,
    default_adaptation,
    find_adaptation,
)
from pl_personalize.adaptations.adaptation import SENT, load_entries
from pl_personalize.checks import check_choice
from pl_personalize.functional.batches import as_input
from pl_personalize.functional.names import prefix_hint, some
from pl_personalize.functional.state_dicts import StateDict
from pl_personalize.metrics import TaskAccuracyMatrix, average_accuracy, forgetting
from pl_personalize.models import TaskNetwork
from pl_personalize.per_sample.module_state import call_with_weights, computing_anew

Cell = tuple[int, int]
"""A model and a task, both from 0."""
Models = Literal["all", "last", "own"]


class SequenceEvaluator(LightningModule):
    """Tests models 1..T, each on tasks 1..t, with the head of the task: the lower triangle of the accuracy matrix.

    ``trainer.test(evaluator, datamodule=...)`` runs all tests at once, with one test loader for each task, in order. It
    logs ``test/acc/t{t}/task{i}`` (model t on task i, from 1), ``test/avg_acc``, ``test/forgetting`` (divided by T, as
    in the tables of De Lange et al., CVPR 2020) and ``test/forgetting_cl`` (divided by T - 1), all in [0, 1];
    ``matrix`` holds all accuracies. Models are state dicts that are swapped into one network.

    Args:
        network: The architecture; its own parameters are not used.
        bodies: The body of each model 1..T, with names relative to the body.
        heads: The head of each task 1..T, with names relative to the head.
        models: ``"all"``; ``"last"``: only the model after the last task; or ``"own"``: each model on its own task
            only, in which case ``test/avg_acc`` is the mean of these. The latter two have no forgetting.
        bn_policy: Adaptation of each model to each task before it is tested, by name or as an object, see
            :data:`~pl_personalize.adaptations.ADAPTATIONS`: such as ``"last"``, each model's own batch-norm statistics;
            ``"recalibrate"``, re-estimated on the server's validation images (the datamodule's
            ``server_dataloader(task, split="val")``); ``"AdaBN"``, re-estimated on the user's unlabelled images
            (``adapt_dataloader(task)``). Steps that do not apply to the network are skipped, such as those that need
            batch norm. Adaptations that train cannot run inside a test.
        bn_options: Options of the adaptation, such as ``{"exact": True}``.
        entries: Of model t on task i (both from 0), entries that replace those of the network (``body.…``,
            ``head.…``), such as those that an adaptation found earlier; then only these pairs are tested.
        own_heads: Of model t on task i (both from 0), a head that replaces the task's, for models that continue to
            train the heads of earlier tasks.

    Attributes:
        matrix: After a test, the (T, T) accuracies, model by task, in [0, 1]; NaN where there is none.
        adapted: After a test, the entries that the adaptation replaced, by model and task, both from 0; names are those
            of the network (``body.…``, ``head.…``).

    Raises:
        MisconfigurationException: If the numbers of bodies, heads and test loaders differ, entries or shapes do not fit
            the network, or the adaptation is unknown or lacks its data.
    """

    def __init__(
        self,
        network: TaskNetwork,
        bodies: Sequence[StateDict],
        heads: Sequence[StateDict],
        *,
        models: Models = "all",
        bn_policy: str | AdaptationSequence | None = "none",
        bn_options: Mapping[str, Any] | None = None,
        entries: Mapping[Cell, StateDict] | None = None,
        own_heads: Mapping[Cell, StateDict] | None = None,
    ) -> None:
        super().__init__()
        check_choice("models", models, get_args(Models))
        if len(bodies) != len(heads) or not heads:
            raise MisconfigurationException(f"Give one body and one head per task; got {len(bodies)} and {len(heads)}.")
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
        self.adaptation = self._checked(bn_policy, bn_options)
        self.entries: dict[Cell, StateDict] = dict(entries or {})
        self.own_heads = dict(own_heads or {})
        self.adapted: dict[Cell, Entries] = {}
        self.accuracy = TaskAccuracyMatrix(len(heads))
        self.matrix: Tensor | None = None
        self._states: dict[Cell, dict[str, Tensor]] = {}

    merges = False
    """Whether the models are merges, which know their experts."""

    def _checked(
        self, policy: str | AdaptationSequence | None, options: Mapping[str, Any] | None
    ) -> AdaptationSequence | None:
        """The adaptation of that name, if it can run inside a test of these models."""
        if policy is None:
            return None
        chosen = find_adaptation(policy, options) if isinstance(policy, str) else policy
        if chosen.merges_only and not self.merges:
            raise MisconfigurationException(f"bn_policy={chosen.name!r} is for merges only; use it with MergeModule.")
        if chosen.trains:
            raise MisconfigurationException(
                f"bn_policy={chosen.name!r} trains, which a test cannot do: train first, and pass entries."
            )
        if chosen.needs_earlier_models and self.models == "last":
            raise MisconfigurationException(
                f"bn_policy={chosen.name!r} reads earlier models, which models='last' does not make: use models='all'."
            )
        return chosen

    @property
    def num_tasks(self) -> int:
        """T."""
        return len(self.heads)

    @property
    def cells(self) -> list[Cell]:
        """The tested pairs of model and task, both from 0."""
        count = self.num_tasks
        if self.models == "own":
            cells = [(t, t) for t in range(count)]
        else:
            cells = [(t, i) for t in range(0 if self.models == "all" else count - 1, count) for i in range(t + 1)]
        return [cell for cell in cells if not self.entries or cell in self.entries]

    def load_bodies(self) -> Sequence[StateDict]:
        """The bodies to test; called when a test starts."""
        return self.bodies

    def received(self, cell: Cell, bodies: Sequence[StateDict], seed: int = 0) -> Received:
        """The server's part of an adaptation of a model to a task."""
        return Received(*cell, seed=seed, bodies=bodies, sent=self._sent(cell))

    def _sent(self, cell: Cell) -> dict[str, Tensor]:
        """The tensors that an earlier adaptation sent along with its entries."""
        entries = self.entries.get(cell, {})
        return {name.removeprefix(SENT): value for name, value in entries.items() if name.startswith(SENT)}

    def adapt(
        self, adaptation: AdaptationSequence, device: Callable[[int], Device], *, seed: int = 0
    ) -> dict[Cell, Entries]:
        """The entries that an adaptation replaces, for each model and task that is to be tested.

        Args:
            adaptation: The adaptation. It starts from the models with :attr:`entries` in place. If it trains, only each
                model on its own task and the last model on all tasks are adapted.
            device: Gives the user's device for a task, from 0.
            seed: Seed of the run.

        Returns:
            By model and task, both from 0.
        """
        bodies = self.load_bodies()
        return self._adapt(adaptation, device, bodies, self._assembled(bodies), seed)

    def _adapt(
        self,
        adaptation: AdaptationSequence,
        device: Callable[[int], Device],
        bodies: Sequence[StateDict],
        states: Mapping[Cell, StateDict],
        seed: int = 0,
    ) -> dict[Cell, Entries]:
        steps = tuple(one for one in adaptation.steps if one.name != "none" and one.why_not(self.network) is None)
        if not steps:
            return {}
        adaptation = AdaptationSequence(steps)
        cells = [(t, i) for t, i in states if not adaptation.trains or t in (i, self.num_tasks - 1)]
        groups: dict[Any, list[Cell]] = {}
        for cell in cells:  # one network is in memory at a time, unless an adaptation compares the tasks of a model
            groups.setdefault(cell[0] if adaptation.pools_tasks else cell, []).append(cell)
        found: dict[Cell, Entries] = {}
        for group in groups.values():
            cases = [
                Case(self._copy(states[cell]), device(cell[1]), self.received(cell, bodies, seed)) for cell in group
            ]
            found |= zip(group, adaptation.adapt_tasks(cases), strict=True)
        return found

    def _copy(self, state: StateDict) -> TaskNetwork:
        """The network with another state, for an adaptation."""
        with torch.inference_mode(False):
            with computing_anew(self.network):  # cached values cannot be copied, and belong to other weights
                network = copy.deepcopy(self.network).train()
            if (classes := len(state["head.weight"])) != network.num_classes:
                with torch.random.fork_rng(devices=[]):
                    network.new_head(classes)
            load_entries(network, state)
        return network

    @override
    def on_test_start(self) -> None:
        """Bring the models to the device, adapt them, and check that there is a test loader for each task."""
        loaders = self.trainer.test_dataloaders
        count = len(loaders) if isinstance(loaders, list | tuple) else 1
        if count != self.num_tasks:
            raise MisconfigurationException(
                f"There are {count} test loaders for {self.num_tasks} tasks; give one for each task, in order."
            )
        bodies = self.load_bodies()
        states = self._assembled(bodies)
        adaptation = self.default_adaptation() if self.adaptation is None else self.adaptation
        self.adapted = self._adapt(adaptation, lambda task: _TrainersDevice(self, adaptation, task), bodies, states)
        for cell, entries in self.adapted.items():
            states[cell] |= self._placed("", entries)
        self._states = states
        self.accuracy.reset()

    def default_adaptation(self) -> AdaptationSequence:
        """The adaptation if none was chosen: the network's default if the Trainer's datamodule has a user's data."""
        datamodule = getattr(self._trainer, "datamodule", None)
        return find_adaptation(default_adaptation(self.network) if hasattr(datamodule, "adapt_dataloader") else "none")

    def _assembled(self, bodies: Sequence[StateDict]) -> dict[Cell, dict[str, Tensor]]:
        """For each model and task, the entries of the whole network."""
        cells = self.cells
        placed = {t: self._placed("body.", bodies[t]) for t in dict.fromkeys(t for t, _ in cells)}
        own = self.network.state_dict()
        for t, state in placed.items():
            for name, value in state.items():
                if value.shape != own[name].shape:
                    raise MisconfigurationException(
                        f"{name.removeprefix('body.')!r} in the body of model {t + 1} is {tuple(value.shape)}; in the "
                        f"network it is {tuple(own[name].shape)}."
                    )
        return {
            (t, i): placed[t]
            | self._placed("head.", self.own_heads.get((t, i), self.heads[i]))
            | self._placed("", self.entries.get((t, i), {}))
            for t, i in cells
        }

    def _placed(self, prefix: str, state: StateDict) -> dict[str, Tensor]:
        """Tensors by their names in the network, on its device and in its precision.

        A module with several names is there once, as ``functional_call`` cannot restore it otherwise.
        """
        own = {
            f"{path}.{name}".removeprefix("."): value
            for path, module in self.network.named_modules()
            for name, value in (*module._parameters.items(), *module._buffers.items())
            if value is not None
        }
        return {
            name: state[name.removeprefix(prefix)].to(value)
            for name, value in own.items()
            if name.startswith(prefix) and isinstance(state.get(name.removeprefix(prefix)), Tensor)
        }

    @override
    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count the correct predictions of each model that has seen the loader's task."""
        x, y = batch
        for (t, i), state in self._states.items():
            if i == dataloader_idx:
                logits: Tensor = call_with_weights(self.network, state, x)
                self.accuracy.update(logits.argmax(1), y, model=t, task=i)

    @override
    def on_test_epoch_end(self) -> None:
        """Log the matrix, the average accuracy and the forgetting."""
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


class _TrainersDevice:
    """The data of the Trainer's datamodule, for adaptations during a test."""

    def __init__(self, module: LightningModule, adaptation: AdaptationSequence, task: int) -> None:
        self._trainer, self._name, self._task = module.trainer, adaptation.name, task
        self._datamodule: Any = getattr(module.trainer, "datamodule", None)

    @property
    def user(self) -> str | None:
        user: str | None = getattr(self._datamodule, "user", None)
        return user

    def images(self) -> Iterable[Any]:
        return self._loader("adapt_dataloader")

    def server_images(self, split: str = "val") -> Iterable[Any]:
        return self._loader("server_dataloader", split=split)

    def _loader(self, hook: str, **options: str) -> Iterable[Any]:
        if not hasattr(self._datamodule, hook):
            raise MisconfigurationException(
                f"bn_policy={self._name!r} needs a datamodule with {hook}(task), such as a TaskIncrementalDataModule; "
                f"the Trainer has {type(self._datamodule).__name__}. 'average' and 'last' need no data."
            )
        loader: Iterable[Any] = getattr(self._datamodule, hook)(self._task, **options)
        return loader

    def as_input(self, batch: Any) -> Any:
        return self._trainer.precision_plugin.convert_input(as_input(batch))

    def labelled_images(self, seed: int) -> NoReturn:
        raise MisconfigurationException(f"bn_policy={self._name!r} trains, which a test cannot do.")

    def train(self, network: TaskNetwork, **options: Any) -> NoReturn:
        self.labelled_images(0)
