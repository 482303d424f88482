"""The figures of De Lange et al., CVPR 2020, to stand beside ours."""

from __future__ import annotations

import csv
from importlib.resources import files
from typing import NamedTuple

from pl_personalize.runner.methods import METHODS, variant_label


class PaperResult(NamedTuple):
    """A cell of the paper's tables: average accuracy and forgetting (divided by the number of tasks), in percent."""

    avg_acc: float
    forgetting: float | None


_OUR_NAMES = {"LWF": "LwF", "Task Experts": "FT"}
# Batch norm without adaptation copies γ and β of the task's model into a merge, and leaves other models as they are.
_OUR_ADAPTATIONS = {"none": "none", "BN": "reference", "AdaBN": "AdaBN", "AdaBN-S": "AdaBN-S"}


def paper_results(benchmark: str, backbone: str, adaptation: str = "none") -> dict[str, PaperResult]:
    """What the paper's repository and slides report, by method.

    Args:
        benchmark: ``Numbers``, ``CatPrior`` or ``TransPrior``.
        backbone: ``MLP``, ``AlexNet``, ``VGG11`` or ``VGG11-BN``.
        adaptation: Of batch norm: ``none``, ``BN``, ``AdaBN`` or ``AdaBN-S``.

    Example:
        >>> paper_results("Numbers", "MLP")["FIM-RACL"]
        PaperResult(avg_acc=87.83, forgetting=0.3)
    """
    text = (files("pl_personalize.runner") / "data" / "paper_results.csv").read_text("utf-8")
    return {
        row["method"]: PaperResult(float(row["avg_acc"]), float(row["forgetting"]) if row["forgetting"] else None)
        for row in csv.DictReader(text.splitlines())
        if (row["benchmark"], row["backbone"], row["adaptation"]) == (benchmark, backbone, adaptation)
        and row["avg_acc"]
    }


def paper_by_label(benchmark: str, backbone: str) -> dict[str, PaperResult]:
    """The same under our names for methods and adaptations of batch norm, all of them.

    Args:
        benchmark: See :func:`paper_results`.
        backbone: See there.

    Example:
        >>> list(paper_by_label("CatPrior", "VGG11"))
        ['MAS-RACL', 'FIM-RACL', 'MAS-IMM', 'FIM-IMM']
    """
    found: dict[str, PaperResult] = {}
    for theirs, ours in _OUR_ADAPTATIONS.items():
        for name, result in paper_results(benchmark, backbone, theirs).items():
            method = _OUR_NAMES.get(name, name)
            merges = any(method == known and METHODS[known].merges for known in METHODS)
            found[variant_label(method, "last" if ours == "reference" and not merges else ours)] = result
    return found
