"""Quadratic penalty on parameters: L2-transfer, EWC and MAS."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from pl_personalize.callbacks.penalty_sources import (
    SHARED_PARAMETERS,
    Anchor,
    TaskImportance,
    anchor_of,
    copied,
    read_anchor,
    sum_of_importances,
)
from pl_personalize.callbacks.requirements import check_trainer, is_resumed, naming_errors
from pl_personalize.estimation import below, named_parameters
from pl_personalize.functional.names import prefix_hint, some
from pl_personalize.functional.penalties import add_penalty_gradient_, quadratic_penalty


class ParameterPenalty(Callback):
    r"""Adds the penalty :math:`\lambda \sum_p \Omega_p (\theta_p - \theta^\mathrm{ref}_p)^2` to any training.

    Without importances Ω is 1: L2-transfer. With Fisher importances it is EWC (Kirkpatrick et al., PNAS 2017), with MAS
    importances it is MAS (Aljundi et al., ECCV 2018). There is no factor 1/2: ``strength`` is half the λ of papers that
    write λ/2.

    By default parameters are pulled to their values when ``fit`` starts. So a sequence of tasks, with a new Trainer
    for each, takes two lines::

        importances = []  # none yet: nothing is pulled
        for k, data in enumerate(tasks):
            mas = MASImportance(module="body", weights="last", filename=f"task-{k}")
            Trainer(callbacks=[ParameterPenalty(1.0, importances, module="body"), mas]).fit(model, data)
            importances.append(mas.importance)  # or mas.path

    The gradient of the penalty is added before each optimizer step, to those of the optimizer's parameters that need a
    gradient: after gradients are accumulated, reduced over processes and unscaled, and before they are clipped. The
    step equals that of a loss that includes the penalty; the logged loss excludes it. A step without any gradient, as
    when ``training_step`` skips the batch, gets no penalty.

    Args:
        strength: λ. It may be changed during training.
        importances: Ω of the earlier tasks: an :class:`~pl_personalize.Importance`, the path of its file, or a mapping
            of names to tensors; or a sequence of these, which is summed. Read when ``fit`` starts. Parameters without
            an entry are not pulled. ``None``: Ω is 1 for all parameters.
        anchor: θ_ref: a state dict, or the path of a Lightning checkpoint, a saved state dict or a safetensors file,
            with names of the whole module or relative to ``module``. ``None``: the parameters when ``fit`` starts,
            which are saved in checkpoints, so that a resumed run is pulled to the start of the first run. An ``anchor``
            is not saved: pass it again to resume.
        module: Submodule whose parameters are pulled; names are relative to it, as in
            :class:`~pl_personalize.callbacks.MASImportance`.
        exclude: Names of parameters or modules that are not pulled, such as the head of a new task.
        log_name: Name of the logged penalty, every ``log_every_n_steps`` of the Trainer; ``None``: not logged. Two of
            these callbacks in one Trainer need different names.

    Raises:
        MisconfigurationException: If ``strength`` is negative or not finite; before training, for importances or an
            anchor that cannot be read, are not finite, or do not fit the parameters, for importances of different
            kinds, and for a strategy that shards parameters (FSDP, DeepSpeed).

    Example:
        >>> penalty = ParameterPenalty(0.001, exclude=["head"])  # L2-transfer for all but the head
        >>> penalty.strength, penalty.importances, penalty.anchor
        (0.001, None, None)
    """

    add_gradient_: ClassVar[Callable[..., None]] = staticmethod(add_penalty_gradient_)
    """Adds the penalty's gradient to ``.grad``; arguments as of ``add_penalty_gradient_``."""

    def __init__(
        self,
        strength: float,
        importances: Sequence[TaskImportance] | TaskImportance | None = None,
        anchor: Anchor | None = None,
        *,
        module: str | None = None,
        exclude: Sequence[str] = (),
        log_name: str | None = "penalty",
    ) -> None:
        super().__init__()
        if not 0 <= strength < inf:
            raise MisconfigurationException(f"strength must be finite and not negative; got {strength}.")
        # A module's own state dict would change with its parameters.
        self.anchor = copied(anchor) if isinstance(anchor, Mapping) else anchor
        self.strength, self.importances, self.log_name = strength, importances, log_name
        self.module = None if module is None else module.removesuffix(".")
        self.exclude = exclude if isinstance(exclude, str) else tuple(exclude)
        self._total: dict[str, Tensor] | None = None  # sum of the importances
        self._given: dict[str, Tensor] = {}  # the anchor's entries
        self._start: dict[str, Tensor] | None = None  # parameters at the start of fit
        self._begins_here = False  # whether the anchor is the start of this very fit
        self._pulled: list[nn.Parameter] = []
        self._anchors: list[Tensor] = []
        self._importances: list[Tensor] | None = None

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(module=self.module, exclude=self.exclude, log_name=self.log_name)

    def should_pull(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> bool:
        """Whether to add the penalty to this step. Override to decide otherwise."""
        return True

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the files, and refuse invalid options before any training."""
        check_trainer(self, trainer, pl_module)
        if stage != "fit":
            return
        self._start = None  # of an earlier run
        with naming_errors(self):
            try:
                self._total = sum_of_importances(self.importances, self._is_excluded)
                self._given = read_anchor(self.anchor)
            except OSError as error:
                raise ValueError(error) from error
        if not is_overridden("configure_model", pl_module):  # else the parameters may not exist yet
            self._choose_parameters(pl_module)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the start of the resumed run."""
        self._start = state_dict["anchor"]

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the parameters at the start of ``fit``, if they are the anchor."""
        return {"anchor": self._start} if self.anchor is None and self._start else {}

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move anchor and importances to the parameters' devices and types."""
        chosen = self._choose_parameters(pl_module)
        self._begins_here = self.anchor is None and self._start is None and bool(chosen)
        anchors = self._anchor_of(chosen) or {name: p.detach() for name, p in chosen.items()}
        placed = {name: torch.empty_like(p).copy_(anchors[name]) for name, p in chosen.items()}
        self._pulled, self._anchors = list(chosen.values()), list(placed.values())
        if self.anchor is None:
            self._start = placed
        if self._total is not None:
            # In half precision, small importances would be zero.
            self._importances = [
                torch.empty_like(p, dtype=torch.promote_types(p.dtype, torch.float32)).copy_(self._total[name])
                for name, p in chosen.items()
            ]
        self._total, self._given = None, {}
        optimised = {id(p) for optimizer in trainer.optimizers for p in _parameters(optimizer)}
        if self._pulled and not any(id(p) in optimised for p in self._pulled):
            rank_zero_warn("No optimizer has any of the parameters that the penalty pulls.")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if a resumed run does not know its start."""
        if self._begins_here and is_resumed(trainer):
            rank_zero_warn(
                f"The checkpoint to resume from has no {type(self).__name__} anchor, so parameters are pulled to their "
                "values in the checkpoint. Pass anchor= to pull them elsewhere."
            )

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Add the penalty's gradient, and log its value on logged steps."""
        if not self._pulled or not self.should_pull(trainer, pl_module, optimizer):
            return
        stepped = _parameters(optimizer)
        if all(p.grad is None for p in stepped):  # the batch was skipped
            return
        if self.log_name is not None and trainer._logger_connector.should_update_logs:  # as in Lightning's monitors
            with torch.no_grad():
                value = quadratic_penalty(self._pulled, self._anchors, self._importances, self.strength)
            pl_module.log(self.log_name, value, on_step=True, on_epoch=False)
        if self.strength == 0:
            return
        ids = set(map(id, stepped))
        own = [k for k, p in enumerate(self._pulled) if id(p) in ids]
        self.add_gradient_(
            [self._pulled[k] for k in own],
            [self._anchors[k] for k in own],
            None if self._importances is None else [self._importances[k] for k in own],
            self.strength * _scale_of_gradients(trainer, optimizer),
        )

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Release parameters and copies, except for the start of ``fit``, which later checkpoints need."""
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Release them when training is interrupted."""
        self._release()

    def _release(self) -> None:
        self._total, self._given = None, {}
        self._pulled, self._anchors, self._importances = [], [], None
        if self._start is not None:
            self._start = {name: value.cpu() for name, value in self._start.items()}

    def _choose_parameters(self, pl_module: LightningModule) -> dict[str, nn.Parameter]:
        """The parameters that are pulled, by name."""
        with naming_errors(self, pl_module):
            every = named_parameters(pl_module, self.module, ())
            free = every.keys() - named_parameters(pl_module, self.module, self.exclude).keys()
            names = [name for name in every if name not in free and (self._total is None or name in self._total)]
            if free == every.keys():
                raise ValueError("there is no parameter to pull" + (f" below {self.module!r}." if self.module else "."))
            if unknown := [name for name in self._total or {} if name not in every]:
                raise ValueError(
                    f"there is no parameter {unknown[0]!r}, only {some(every)}.{prefix_hint(unknown, every)} "
                    f"{SHARED_PARAMETERS}"
                )
            for name, value in (self._total or {}).items():
                if name not in free and value.shape != every[name].shape:
                    raise ValueError(
                        f"the importance of {name!r} is {tuple(value.shape)}, and the parameter "
                        f"{tuple(every[name].shape)}. {SHARED_PARAMETERS}"
                    )
            chosen = {name: every[name] for name in names}
            self._anchor_of(chosen)
        return chosen

    def _anchor_of(self, chosen: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """The anchor's entry for each parameter; empty if the run starts here."""
        anchor = self._given if self.anchor is not None else self._start
        return {} if anchor is None else anchor_of(chosen, anchor, self.module)

    def _is_excluded(self, name: str) -> bool:
        """By name, since the importances of an old head may have no parameter any more."""
        full = name if self.module is None else f"{self.module}.{name}"
        return not isinstance(self.exclude, str) and any(below(full, excluded) for excluded in self.exclude)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _scale_of_gradients(trainer: Trainer, optimizer: Optimizer) -> float:
    """Factor of gradients that are not unscaled yet: fused optimizers unscale them in their step."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return 1.0
    return float(scaler.get_scale())
