"""Merging on a user's device: importances are estimated and used there, and nothing is uploaded."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pl_personalize.artifacts import TensorFile, save_tensors
from pl_personalize.checks import check_option
from pl_personalize.estimation import estimate_importance
from pl_personalize.functional.batches import Forward
from pl_personalize.functional.names import submodule
from pl_personalize.functional.state_dicts import StateDict
from pl_personalize.importance import Kind
from pl_personalize.merging import merge

_KIND = "kept"


def merge_on_device(
    experts: Iterable[nn.Module],
    images: Iterable[Iterable[Any]],
    kind: Kind,
    *,
    module: str | None = None,
    exclude: Sequence[str] = (),
    draws: int | Literal["all"] = 1,
    generator: torch.Generator | int | None = None,
    forward: Forward | None = None,
    max_scratch_mb: float = 256,
    max_memory_mb: float = 256,
    progress: bool = False,
    **options: Any,
) -> dict[str, Tensor]:
    r"""Merge experts by their importances on a user's images, on the device that has both (RACL).

    To estimate importances, a device needs every expert; so it can merge them itself. The result equals, bit for bit,
    that of :func:`~pl_personalize.merge` on a server that got the importances of
    :func:`~pl_personalize.estimate_importance`, and no importance leaves the device (De Lange et al., CVPR 2020, where
    the server merges).

    Experts are used one after the other, so an iterator may load each from its file when it is asked for it, also into
    the same module. What the merge needs of an iterator's experts (the merged part and its importances) is copied:
    ``max_memory_mb`` of it to memory, the rest to temporary files, which are read in chunks.

    Args:
        experts: The experts: a sequence of modules, or an iterator that loads them.
        images: For each expert, an iterable of batches of the user's images of its task. Labels are ignored.
        kind: Kind of the importances, such as ``"mas"`` or ``"fisher"``.
        module: Submodule to merge, such as ``"body"`` if heads differ. Names in the result are relative to it.
        exclude: See :func:`~pl_personalize.estimate_importance`, as for the next four.
        draws: Labels drawn per image for ``"fisher"``.
        generator: Source of these labels, or a seed.
        forward: ``(model, batch) -> logits``, if calling the model on the input is not enough.
        max_scratch_mb: Memory for per-sample gradients, in MiB.
        max_memory_mb: Memory for importances and copies of experts, in MiB.
        progress: Show a progress bar for each expert whose pass takes more than two seconds.
        options: Further arguments of :func:`~pl_personalize.merge`, such as ``rule`` and ``out``.

    Returns:
        The merged state dict of ``module``, with the last expert's entries that are not merged, such as statistics of
        batch norm.

    Raises:
        ValueError: If there are no experts, or another number of image iterables; if the importances of an expert
            cannot be estimated (named with its number), for the reasons of :func:`~pl_personalize.estimate_importance`;
            or if experts cannot be merged, for those of :func:`~pl_personalize.merge`.

    Example:
        >>> experts = [nn.Linear(2, 3) for _ in range(2)]
        >>> images = [torch.randn(8, 2) for _ in range(2)]  # of each task
        >>> sorted(merge_on_device(experts, [[batch] for batch in images], "mas"))
        ['bias', 'weight']
    """
    check_option("max_memory_mb", max_memory_mb)
    with ExitStack() as stack:
        kept = _Kept(max_memory_mb * 2**20, stack)
        states: list[StateDict] = []
        importances: list[StateDict] = []
        data = iter(images)
        for k, expert in enumerate(experts):
            try:
                own = next(data)
            except StopIteration:
                raise ValueError(f"There are no images for expert {k + 1}: pass an iterable for each expert.") from None
            try:
                importance = estimate_importance(
                    expert,
                    own,
                    kind,
                    module=module,
                    exclude=exclude,
                    draws=draws,
                    generator=generator,
                    forward=forward,
                    max_scratch_mb=max_scratch_mb,
                    progress=progress,
                )
            except ValueError as error:
                raise ValueError(f"Expert {k + 1}: {error}") from error
            state = (expert if module is None else submodule(expert, module)).state_dict()
            states.append(state if isinstance(experts, Sequence) else kept.copied(state))
            importances.append(kept.keep(importance))
        if next(data, None) is not None:
            raise ValueError(f"There are images for more than the {len(states)} experts.")
        if not states:
            raise ValueError("There are no experts to merge: pass at least one.")
        return merge(states, importances, **options)


class _Kept:
    """Tensors that are needed later: in memory up to a limit, then in temporary files."""

    def __init__(self, num_bytes: float, stack: ExitStack) -> None:
        self._left, self._stack, self._files = num_bytes, stack, 0
        self._folder: Path | None = None

    def keep(self, tensors: StateDict) -> StateDict:
        """The tensors themselves, or a file of them."""
        values = list(tensors.values())
        size = sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))
        if size <= self._left or not all(isinstance(value, Tensor) for value in values):  # files hold tensors only
            self._left -= size
            return tensors
        if self._folder is None:
            self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="pl-personalize-")))
        self._files += 1
        path = save_tensors(self._folder / f"{self._files}.safetensors", tensors, kind=_KIND)
        return TensorFile(path, kind=_KIND)

    def copied(self, state: StateDict) -> StateDict:
        """A copy of a state dict with its module versions, or a file of it."""
        found = self.keep(state)
        return copy.deepcopy(found) if found is state else found
