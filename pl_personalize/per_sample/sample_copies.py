"""Copies, one per sample, of parameters that modules use directly: class tokens, positional embeddings, scales."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

from torch import Tensor, nn

Place = tuple[nn.Module, str]


class SampleCopies:
    """Replaces parameters in their modules by one copy per sample, so that the copies' gradients are per sample.

    Sums, products and concatenations of a parameter and an input are the same with copies that have the samples in the
    right dimension. It is not known in advance, so :meth:`try_next` goes through several shapes. ``places`` are modules
    and local names of parameters with a single owner, mapped to their full names.
    """

    def __init__(self, places: Mapping[Place, str]) -> None:
        self._shapes = {place: shapes for place in places if (shapes := _shapes(_parameter(place)))}
        self._names = {place: places[place] for place in self._shapes}

    @property
    def names(self) -> list[str]:
        """Full names of the copied parameters."""
        return list(self._names.values())

    def __contains__(self, place: Place) -> bool:
        return place in self._names

    def start(
        self,
        num_samples: int,
        make_root: Callable[[Tensor], Tensor],
        on_gradients: Callable[[str, int, Tensor], None] | None = None,
        only: Iterable[Place] | None = None,
    ) -> None:
        """Put ``num_samples`` copies in place, by default everywhere, after ``make_root`` made them part of the graph.

        ``on_gradients`` is called with a parameter's name, the dimension of the samples and the copies' gradients.
        """
        for place in self._names if only is None else only:
            dim, shape = self._shapes[place][0]
            parameter = _parameter(place).detach().reshape(shape)
            copies = make_root(parameter.expand(*shape[:dim], num_samples, *shape[dim + 1 :]).clone())
            if on_gradients is not None:
                copies.register_hook(partial(on_gradients, self._names[place], dim))  # type: ignore[no-untyped-call]
            module, local = place
            vars(module)[local] = copies  # found before the parameter

    def stop(self) -> None:
        """Remove the copies."""
        for module, local in self._names:
            vars(module).pop(local, None)

    def alike(self) -> list[dict[Place, str]]:
        """Groups of places with the same local name in modules of the same type, and their full names."""
        groups: dict[tuple[type, str], dict[Place, str]] = {}
        for (module, local), name in self._names.items():
            groups.setdefault((type(module), local), {})[module, local] = name
        return list(groups.values())

    def try_next(self, names: Iterable[str]) -> bool:
        """Switch these parameters to their next shape, or stop copying them; whether any was copied."""
        wanted = set(names)
        found = [place for place, name in self._names.items() if name in wanted]
        for place in found:
            del self._shapes[place][0]
            if not self._shapes[place]:
                del self._names[place], self._shapes[place]
        return bool(found)


def _parameter(place: Place) -> Tensor:
    module, local = place
    parameter = module._parameters[local]
    assert parameter is not None
    return parameter


def _shapes(parameter: Tensor) -> list[tuple[int, tuple[int, ...]]]:
    """Candidates, most likely first: the dimension of the samples, and the shape of the copy for one sample."""
    shape = tuple(parameter.shape)
    # A dimension of size 1 may stand for the batch.
    found = [(dim, shape) for dim in (0, 1) if 1 < len(shape) > dim and shape[dim] == 1]
    # A factor or summand per channel, or for all. Not on a GPU if it may be a table: a lookup in the wrong dimension is
    # out of bounds, which breaks a CUDA context for good.
    if not shape or (all(size == 1 for size in shape[1:]) and not parameter.is_cuda):
        found += [(0, (1, *[1] * ones, *shape)) for ones in range(3 if shape else 4)]
    return found
