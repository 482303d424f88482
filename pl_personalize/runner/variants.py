"""Variants, the rows of the tables: a method, and the adaptation of its models on the device."""

from __future__ import annotations

from typing import NamedTuple

from pl_personalize.adaptations import ADAPTATIONS
from pl_personalize.methods import METHODS


class Variant(NamedTuple):
    """A method and an adaptation."""

    method: str
    adaptation: str = "none"

    @property
    def is_registered(self) -> bool:
        """Whether its names are registered; a folder may hold results of extensions that are not imported now."""
        return self.method in METHODS and all(name in ADAPTATIONS for name in self.adaptation.split("+"))

    @property
    def label(self) -> str:
        """Its name in stages, tables and figures."""
        return variant_label(*self)


def variant_label(method: str, adaptation: str) -> str:
    """``FIM-RACL``, or with an adaptation ``FIM-RACL+AdaBN``.

    Example:
        >>> variant_label("FIM-RACL", "AdaBN")
        'FIM-RACL+AdaBN'
    """
    return method if adaptation == "none" else f"{method}+{adaptation}"
