"""The figures of De Lange et al., CVPR 2020, to stand beside ours."""

from __future__ import annotations

import csv
from importlib.resources import files
from typing import NamedTuple


class PaperResult(NamedTuple):
    """A cell of the paper's tables: average accuracy and forgetting (divided by the number of tasks), in percent."""

    avg_acc: float
    forgetting: float | None


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
