"""Lists of names, and hints on wrong names, for messages."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

from torch import nn

_SHOWN = 5


def some(names: Iterable[str], separator: str = ", ") -> str:
    """The first names, and the number of the others.

    Example:
        >>> some(f"layer{k}.weight" for k in range(7))
        'layer0.weight, layer1.weight, layer2.weight, layer3.weight, layer4.weight and 2 more'
        >>> some([])
        'none'
    """
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return separator.join(names[:_SHOWN]) + more if names else "none"


def prefix_hint(names: Iterable[str], known: Iterable[str]) -> str:
    """A sentence on the prefix or inner part by which names differ from known ones; empty if they differ otherwise.

    Examples are the ``module.`` of a wrapped model, the ``body.`` of a submodule, and the ``.default`` of an adapter.
    If several prefixes are possible, none is named.

    Example:
        >>> prefix_hint(["module.fc.weight", "module.fc.bias"], ["fc.weight", "fc.bias"])
        " Without the prefix 'module.' the names would match."
        >>> prefix_hint(["fc.weight"], ["body.fc.weight", "head.weight"])
        " With the prefix 'body.' the names would match."
        >>> prefix_hint(["fc.lora_A.default.weight"], ["fc.lora_A.weight", "fc.weight"])
        " Without '.default' the names would match."
        >>> prefix_hint(["fc.weight"], ["conv.weight"])
        ''
    """
    names, there = [str(name) for name in names], dict.fromkeys(map(str, known))
    for text, part_of, without in (("the prefix ", _prefix, str.removeprefix), ("", _part_inside, _without)):
        lacking = set()
        for first, other in product(names[:1], there):
            if (part := part_of(first, other)) and all(without(name, part) in there for name in names):
                return f" Without {text}'{part}' the names would match."
            if (part := part_of(other, first)) and {without(name, part) for name in there}.issuperset(names):
                lacking.add(part)
        if lacking:
            return f" With {text}'{lacking.pop()}' the names would match." if len(lacking) == 1 else ""
    return ""


def _prefix(longer: str, shorter: str) -> str:
    """The part of the longer name before the shorter one, such as ``module.``; empty if they end differently."""
    return longer.removesuffix(shorter) if longer.endswith(f".{shorter}") else ""


def _part_inside(longer: str, shorter: str) -> str:
    """The part whose removal turns the longer name into the shorter one, such as ``.default``; empty if none does."""
    parts, left = longer.split("."), shorter.split(".")
    begin = next((k for k, (a, b) in enumerate(zip(parts, left, strict=False)) if a != b), len(left))
    more = len(parts) - len(left)
    for count in range(1, more + 1):  # the first occurrence, if there are several
        part = "." + ".".join(parts[begin : begin + count])
        if 0 < begin < len(left) and _without(longer, part) == shorter:
            return part
    return ""


def _without(name: str, part: str) -> str:
    """The name without any occurrence of a part."""
    while (shorter := f".{name}.".replace(f"{part}.", ".", 1).strip(".")) != name:
        name = shorter
    return name


def submodule(model: nn.Module, name: str) -> nn.Module:
    """The submodule of that name, or a ``ValueError``."""
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        parts, hint = dict(model.named_children()), prefix_hint([name], dict(model.named_modules()))
        raise ValueError(f"The model has no module {name!r}; it has {some(parts)}.{hint}") from error
