"""Published results of De Lange et al., CVPR 2020."""

from __future__ import annotations

from importlib.resources import files
from typing import NamedTuple

import pandas as pd

from pl_personalize.runner.variants import variant_label


class PaperResult(NamedTuple):
    """A cell of the paper's tables: average accuracy and forgetting (divided by the number of tasks), in percent."""

    avg_acc: float
    forgetting: float | None


_OUR_NAMES = {"LWF": "LwF", "Task Experts": "FT"}
# Without adaptation, the published code copies γ and β of the task's model into a merge and keeps other models as is.
_OUR_ADAPTATIONS = {"none": "none", "BN": "reference", "AdaBN": "AdaBN", "AdaBN-S": "AdaBN-S"}


def paper_results(benchmark: str, backbone: str, adaptation: str = "none") -> dict[str, PaperResult]:
    """Results in the paper's repository and slides, by method.

    Args:
        benchmark: ``Numbers``, ``CatPrior`` or ``TransPrior``.
        backbone: ``MLP``, ``AlexNet``, ``VGG11`` or ``VGG11-BN``.
        adaptation: Treatment of batch norm: ``none``, ``BN``, ``AdaBN`` or ``AdaBN-S``.

    Example:
        >>> paper_results("Numbers", "MLP")["FIM-RACL"]
        PaperResult(avg_acc=87.83, forgetting=0.3)
    """
    with (files("pl_personalize.runner") / "data" / "paper_results.csv").open(encoding="utf-8") as file:
        table = pd.read_csv(file, keep_default_na=False, na_values={"avg_acc": [""], "forgetting": [""]})
    setting = [benchmark, backbone, adaptation]
    chosen = table[(table[["benchmark", "backbone", "adaptation"]] == setting).all(axis=1) & table["avg_acc"].notna()]
    return {
        row.method: PaperResult(row.avg_acc, None if pd.isna(row.forgetting) else row.forgetting)
        for row in chosen.itertuples()
    }


def paper_by_label(benchmark: str, backbone: str) -> dict[str, PaperResult]:
    """Results under all adaptations, by our labels of methods and adaptations.

    Args:
        benchmark: See :func:`paper_results`.
        backbone: See :func:`paper_results`.

    Example:
        >>> list(paper_by_label("CatPrior", "VGG11"))
        ['MAS-RACL', 'FIM-RACL', 'MAS-IMM', 'FIM-IMM']
    """
    found: dict[str, PaperResult] = {}
    for theirs, ours in _OUR_ADAPTATIONS.items():
        for name, result in paper_results(benchmark, backbone, theirs).items():
            unmerged = ours == "reference" and not name.endswith(("-RACL", "-IMM"))
            found[variant_label(_OUR_NAMES.get(name, name), "last" if unmerged else ours)] = result
    return found
