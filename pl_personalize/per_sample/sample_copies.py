"""A copy for each sample of parameters that modules use as such: class tokens, positional embeddings, layer scales."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

from torch import Tensor, nn

Place = tuple[nn.Module, str]


class SampleCopies:
    """Shows a parameter to its module as one copy for each sample; the copies' gradients are per sample.

    A module that adds a parameter to its input, or multiplies the two, or puts it beside the input, computes the same
    from copies that have the samples where its input has them. How many dimensions lie between is not known, so there
    are several shapes to try (:meth:`try_next`) until the gradients are right, or none is left.

    Args:
        places: The modules and the local names of parameters that each have one owner, and their full names.
    """

    def __init__(self, places: Mapping[Place, str]) -> None:
        self._names = dict(places)
        self._shapes = {place: _shapes(_parameter(place)) for place in places}
        self._drop_exhausted()

    @property
    def names(self) -> list[str]:
        """The full names of the parameters that are copied."""
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
        """Put the copies where the modules look for their parameters.

        Args:
            num_samples: How many.
            make_root: Makes a tensor part of the graph.
            on_gradients: Called with a parameter's name, the dimension of the samples and the copies' gradients.
            only: Of these places alone.
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
        """The modules see their parameters again."""
        for module, local in self._names:
            vars(module).pop(local, None)

    def alike(self) -> list[list[Place]]:
        """The places in groups of the same parameter in modules of the same type, which are used in the same way."""
        groups: dict[tuple[type, str], list[Place]] = {}
        for module, local in self._names:
            groups.setdefault((type(module), local), []).append((module, local))
        return list(groups.values())

    def try_next(self, names: Iterable[str]) -> bool:
        """Go on to the next shape for these parameters, or give up their copies; whether there were any."""
        wanted = set(names)
        found = [place for place, name in self._names.items() if name in wanted]
        for place in found:
            del self._shapes[place][0]
        self._drop_exhausted()
        return bool(found)

    def names_of(self, places: Iterable[Place]) -> list[str]:
        """The full names of the parameters at these places."""
        return [self._names[place] for place in places]

    def _drop_exhausted(self) -> None:
        for place in [place for place in self._names if not self._shapes[place]]:
            del self._names[place], self._shapes[place]


def _parameter(place: Place) -> Tensor:
    module, local = place
    parameter = module._parameters[local]
    assert parameter is not None
    return parameter


def _shapes(parameter: Tensor) -> list[tuple[int, tuple[int, ...]]]:
    """What to try, most likely first: the dimension of the samples, and the copies' shape for one sample."""
    shape = tuple(parameter.shape)
    # A dimension of size 1 may be there for the batch.
    found = [(dim, shape) for dim in (0, 1) if 1 < len(shape) > dim and shape[dim] == 1]
    # A factor or a summand for each channel, or for all. Not on a GPU where it may be a table: an entry that is looked
    # up in the wrong dimension is out of bounds, which stops a GPU for good.
    if not shape or (all(size == 1 for size in shape[1:]) and not parameter.is_cuda):
        found += [(0, (1, *[1] * ones, *shape)) for ones in range(3 if shape else 4)]
    return found
