"""Learned merging: experts merged on a device by coefficients that are fitted to the user's unlabelled images."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor, nn
from torch.func import functional_call
from typing_extensions import override

from pl_personalize.batchnorm import BatchNormStatistics
from pl_personalize.checks import check_choice, check_option
from pl_personalize.functional.batch_fields import map_tensors
from pl_personalize.functional.batches import as_logits, batch_size, call_model, copy_batch
from pl_personalize.functional.names import some
from pl_personalize.functional.seeding import derive_seed
from pl_personalize.functional.state_dicts import StateDict, shared_entries
from pl_personalize.merging import merge
from pl_personalize.models import MultiHeadNetwork, TaskNetwork
from pl_personalize.per_sample.module_state import isolated

Parameters = Literal["coefficients", "heads", "all"]
Loss = Literal["kl", "mse"]
Per = Literal["tensor", "channel"]
_COEFFICIENT_LR = 0.01
_HALF = (torch.float16, torch.bfloat16)


def learn_merge(
    network: TaskNetwork,
    experts: Sequence[StateDict],
    images: Sequence[Iterable[Any]],
    start: StateDict | None = None,
    *,
    parameters: Parameters = "coefficients",
    per: Per = "channel",
    loss: Loss = "kl",
    epochs: int = 20,
    lr: float = 3e-4,
    seed: int = 0,
) -> dict[str, Tensor]:
    r"""Merge the experts of several tasks by coefficients that are learned on a user's unlabelled images.

    For each parameter tensor :math:`l` of the body, or each of its output channels, one coefficient is learned for each
    expert :math:`k`:

    .. math::
        \theta_l = \sum_k \lambda_{lk} \theta_{lk}

    Learning starts from any merge, by default the mean: :math:`\lambda_{lk}` is the share that an entry of expert
    :math:`k` has there, plus a learned number that starts from zero. The merged body with the head of each task is
    fitted to the logits that the task's own expert has for the user's images, which are computed once. Nothing leaves
    the device, so this is an alternative to uploading importances to a server that merges by them.

    Networks and images in half precision are computed with in float32. Everything runs in eval mode (no dropout), with
    the batch-norm statistics of the start; γ and β are learned like other parameters. A step of Adam takes a batch of
    each task. The network, the experts and the global random number generators do not change.

    Args:
        network: The architecture, on the device to learn on; its own parameters are not used.
        experts: For each task, a state dict of a :class:`~pl_personalize.models.TaskNetwork`. All are held in memory.
        images: For each task, an iterable of batches, which is read once and held in memory. Labels are ignored.
        start: The merge to start from, with entries ``body.…``, such as :meth:`MergeModule.export` returns; by default
            the mean of the experts, with their average batch-norm statistics.
        parameters: What is learned: ``"coefficients"``; these and then the ``"heads"``; or these and then ``"all"``
            weights of body and heads.
        per: One coefficient for each expert and ``"tensor"`` or ``"channel"`` (entry of its first dimension).
        loss: Difference from an expert's answers: ``"kl"``, the divergence of its predictions, or ``"mse"``, the
            squared error of its logits, summed over classes.
        epochs: Number of epochs, for each of the two steps. An epoch reads each batch of the task with the most
            batches once, those of others in turn.
        lr: Learning rate of heads and weights.
        seed: Seed for the order of the batches.

    Returns:
        A state dict of :class:`~pl_personalize.models.MultiHeadNetwork`: ``body.…`` and ``heads.{task}.…``.

    Raises:
        MisconfigurationException: If an option is out of range.
        ValueError: If there is not one expert and one iterable of batches for each task, an expert does not fit the
            network, ``start`` lacks entries, a task has no images, logits are not finite, or the loss diverges.

    Example:
        >>> from pl_personalize.models import mlp
        >>> experts = [mlp((4,), classes).state_dict() for classes in (2, 3)]
        >>> state = learn_merge(mlp((4,), 2), experts, [[torch.rand(8, 4)], [torch.rand(8, 4)]], epochs=1)
        >>> [tuple(state[f"heads.{task}.weight"].shape) for task in range(2)]
        [(2, 100), (3, 100)]
    """
    check_choice("parameters", parameters, ("coefficients", "heads", "all"))
    check_choice("per", per, ("tensor", "channel"))
    check_choice("loss", loss, ("kl", "mse"))
    check_option("epochs", epochs, least=1)
    check_option("lr", lr, exclusive=True)
    _check_tasks(experts, images)
    device = next(network.parameters()).device
    with isolated(device), torch.enable_grad():
        networks = [_load(network, expert, task) for task, expert in enumerate(experts)]
        tasks = [
            _Task(one, _answers(one, batches, device, task))
            for task, (one, batches) in enumerate(zip(networks, images, strict=True))
        ]
        fit = _Fit(tasks, loss, epochs, torch.Generator().manual_seed(derive_seed(seed, "learn_merge")))
        bodies = [one.body for one in networks]
        coefficients = _Coefficients(bodies, _mean(bodies) if start is None else _body(start, bodies[0]), per)
        fit(coefficients.values, coefficients.body, _COEFFICIENT_LR)
        body = {name: value.detach().clone() for name, value in coefficients.body().items()}
        trained = [p.requires_grad_() for one in networks for p in one.head.parameters()]
        if parameters == "all":
            trained += [body[name].requires_grad_() for name in coefficients.names]
        if parameters != "coefficients":
            fit(trained, lambda: coefficients.tied(body), lr)
        merged = _merged(networks, coefficients.tied(body))
    own = network.state_dict()
    return {name: value.to(own[_single_task_name(name)].dtype) for name, value in merged.items()}


def _check_tasks(experts: Sequence[StateDict], images: Sequence[Iterable[Any]]) -> None:
    for name, value in (("experts", experts), ("images", images)):
        if not isinstance(value, Sequence):
            raise ValueError(f"{name} must be a sequence with an item for each task; got a {type(value).__name__}.")
    if len(experts) != len(images) or not experts:
        raise ValueError(
            f"There are {len(experts)} experts and the images of {len(images)} tasks: pass one of each for each task."
        )
    for task, batches in enumerate(images):
        if isinstance(batches, Tensor):
            raise ValueError(f"The images of task {task + 1} are one tensor: pass an iterable of batches, such as [x].")


def _load(network: TaskNetwork, expert: StateDict, task: int) -> TaskNetwork:
    """A copy of the network with the parameters of an expert, in eval mode."""
    if not isinstance(expert, Mapping) or "head.weight" not in expert:
        found = f"it has {some(expert)}" if isinstance(expert, Mapping) else f"it is a {type(expert).__name__}"
        raise ValueError(f"Expert {task + 1} is no state dict of a TaskNetwork, with head.weight: {found}.")
    loaded = copy.deepcopy(network)
    loaded.new_head(len(expert["head.weight"]))
    if any(p.dtype in _HALF for p in loaded.parameters()):
        loaded.float()
    try:
        loaded.load_state_dict(dict(expert))
    except RuntimeError as error:
        raise ValueError(f"Expert {task + 1} does not fit the network: {error}") from error
    return loaded.eval().requires_grad_(False)


def _answers(expert: TaskNetwork, batches: Iterable[Any], device: torch.device, task: int) -> list[tuple[Any, Tensor]]:
    """The batches of a task, each with the logits (n, K) of its expert."""
    found = []
    for batch in batches:
        if batch_size(batch):
            kept = map_tensors(move_data_to_device(batch, device), _in_full_precision)
            with torch.no_grad():
                found.append((kept, as_logits(call_model(expert, copy_batch(kept)))))
    if not found:
        raise ValueError(f"There are no images of task {task + 1}: pass at least one batch for each task.")
    if not all(torch.isfinite(logits).all() for _, logits in found):
        raise ValueError(f"The logits of expert {task + 1} are NaN or infinite for some images of its task.")
    return found


def _in_full_precision(tensor: Tensor) -> Tensor:
    """A copy, in float32 if it was in half precision."""
    return tensor.float() if tensor.dtype in _HALF else tensor.clone()


class _Task(nn.Module):
    """Logits of a task's network for one of its batches, to be called with another body."""

    def __init__(self, network: TaskNetwork, data: list[tuple[Any, Tensor]]) -> None:
        super().__init__()
        self.network, self.data = network, data

    @override
    def forward(self, batch: Any) -> Tensor:
        return as_logits(call_model(self.network, copy_batch(batch)))


def _mean(bodies: Sequence[nn.Module]) -> StateDict:
    """The mean of the experts' bodies, with their average batch-norm statistics."""
    statistics = BatchNormStatistics.average([BatchNormStatistics.of(body) for body in bodies])
    return {**merge([body.state_dict() for body in bodies]), **statistics}


def _body(start: StateDict, body: nn.Module) -> dict[str, Tensor]:
    """The entries of a body in a state dict of the whole network."""
    own = {name: value for name, value in body.state_dict().items() if isinstance(value, Tensor)}
    wrong = [n for n, v in own.items() if f"body.{n}" not in start or start[f"body.{n}"].shape != v.shape]
    if wrong:
        raise ValueError(f"start has no entries of the right shape for {some(f'body.{n}' for n in wrong)}.")
    return {name: start[f"body.{name}"].detach().to(value, copy=True) for name, value in own.items()}


class _Coefficients:
    """The merged body as a function of the coefficients, given as differences from those of the start.

    Args:
        bodies: The body of each expert.
        start: The entries of the merged body to start from.
        per: See :func:`learn_merge`.
    """

    def __init__(self, bodies: Sequence[nn.Module], start: StateDict, per: Per) -> None:
        self._start = {name: value for name, value in start.items() if isinstance(value, Tensor)}
        self._first = shared_entries(bodies[0].state_dict())
        self._experts = [dict(body.named_parameters()) for body in bodies]
        self.names = [name for name, parameter in self._experts[0].items() if parameter.is_floating_point()]
        self._values = {}
        for name in self.names:
            parameter = self._experts[0][name]
            shape = parameter.shape[:1] + (1,) * (parameter.dim() - 1) if per == "channel" else ()
            self._values[name] = torch.zeros(len(bodies), *shape, dtype=parameter.dtype, device=parameter.device)
        self.values = [value.requires_grad_() for value in self._values.values()]

    def body(self) -> dict[str, Tensor]:
        """The entries of the merged body."""
        learned = {
            name: self._start[name] + sum(c * expert[name] for c, expert in zip(value, self._experts, strict=True))
            for name, value in self._values.items()
        }
        return self.tied({**self._start, **learned})

    def tied(self, body: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The entries of a body, with one tensor for those that are tied."""
        return {name: body[self._first.get(name, name)] for name in body}


class _Fit:
    """Fits a body and the heads to the experts' answers, with Adam."""

    def __init__(self, tasks: Sequence[_Task], loss: Loss, epochs: int, generator: torch.Generator) -> None:
        self._tasks, self._loss, self._epochs, self._generator = tasks, loss, epochs, generator

    def __call__(self, trained: list[Tensor], body: Callable[[], Mapping[str, Tensor]], lr: float) -> None:
        optimizer = torch.optim.Adam(trained, lr)
        for epoch in range(self._epochs):
            orders = [torch.randperm(len(task.data), generator=self._generator).tolist() for task in self._tasks]
            for step in range(max(map(len, orders))):
                entries = {f"network.body.{name}": value for name, value in body().items()}
                losses = []
                for task, order in zip(self._tasks, orders, strict=True):
                    batch, target = task.data[order[step % len(order)]]
                    losses.append(self._difference(functional_call(task, entries, (batch,)), target))
                loss = torch.stack(losses).mean()
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            if not torch.isfinite(loss):
                raise ValueError(
                    f"The loss is {loss.item()} in epoch {epoch + 1} at a learning rate of {lr}. Look for experts or a "
                    "start that are not finite; for parameters='heads' and 'all', try a smaller lr."
                )

    def _difference(self, logits: Tensor, target: Tensor) -> Tensor:
        if self._loss == "mse":
            return (logits - target).square().sum(1).mean()
        return F.kl_div(logits.log_softmax(1), target.log_softmax(1), reduction="batchmean", log_target=True)


def _merged(networks: Sequence[TaskNetwork], body: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the network of all tasks."""
    merged = networks[-1].body
    merged.load_state_dict(body, strict=False)
    return MultiHeadNetwork(merged, [network.head for network in networks]).state_dict()


def _single_task_name(name: str) -> str:
    """The name in a TaskNetwork of an entry of the network of all tasks."""
    return "head." + name.split(".", 2)[2] if name.startswith("heads.") else name
