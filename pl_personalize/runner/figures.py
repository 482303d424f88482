"""The figures that an experiment ends with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from pl_personalize.runner.results import ALL_USERS, ResultRow, user_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI = 130


def _new_figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw_matrices(path: Path, title: str, matrices: Mapping[str, Tensor], tasks: Sequence[str]) -> Path:
    """Accuracy matrices as heat maps side by side.

    Args:
        path: The PNG to write.
        title: Above all.
        matrices: For each user the accuracies, model by task, in [0, 1].
        tasks: Names of the tasks.
    """
    figure = _new_figure(1.2 + (0.62 * len(tasks) + 1.2) * len(matrices), 1.6 + 0.5 * len(tasks))
    figure.suptitle(title)
    seen = [100 * value for matrix in matrices.values() for value in matrix.flatten().tolist() if value == value]
    low = min(50, 10 * int(min(seen, default=50) / 10))
    axes = figure.subplots(1, len(matrices), squeeze=False)[0]
    for axis, (user, matrix) in zip(axes, matrices.items(), strict=True):
        tested = [t for t in range(len(matrix)) if not bool(matrix[t].isnan().all())]  # of Joint, one model alone
        values = 100 * matrix[tested].numpy()
        image = axis.imshow(np.ma.masked_invalid(values), cmap="viridis", vmin=low, vmax=100, aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            if value == value:
                colour = "black" if value > low + 0.6 * (100 - low) else "white"
                axis.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=9)
        axis.set_title(user_title(user), fontsize=10)
        axis.set_xticks(range(len(tasks)), tasks)
        axis.set_yticks(range(len(tested)), [f"{t + 1}" for t in tested])
        axis.set_xlabel("task")
    axes[0].set_ylabel("model after task")
    figure.colorbar(image, ax=list(axes), label="accuracy (%)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI)
    return path


def draw_methods(path: Path, title: str, rows: Sequence[ResultRow]) -> Path:
    """Average accuracy of the methods side by side, a bar for each user, a dot for each seed.

    Under several adaptations of batch norm there is a bar for each of these, over all users.

    Args:
        path: The PNG to write.
        title: Above all.
        rows: The results.
    """
    methods = list(dict.fromkeys(row.method for row in rows))
    adaptations = list(dict.fromkeys(row.adaptation for row in rows))
    users = [user for user in dict.fromkeys(row.user for row in rows) if user != ALL_USERS]
    several = len(adaptations) > 1
    bars = {a: (a, ALL_USERS) for a in adaptations} if several else {user_title(u): (adaptations[0], u) for u in users}
    figure = _new_figure(1.5 + max(0.9, 0.22 * len(bars)) * len(methods), 4)
    axis = figure.subplots()
    width = 0.8 / len(bars)
    lowest = 100.0
    for k, (name, key) in enumerate(bars.items()):
        groups = [[r.avg_acc for r in rows if (r.method, r.adaptation, r.user) == (m, *key)] for m in methods]
        cells = {place: cell for place, cell in enumerate(groups) if cell}  # not every adaptation is for every method
        places = [place + (k - (len(bars) - 1) / 2) * width for place in cells]
        axis.bar(places, [mean(cell) for cell in cells.values()], width * 0.94, label=name)
        for place, cell in zip(places, cells.values(), strict=True):
            axis.plot([place] * len(cell), cell, "o", color="black", markersize=2.5, alpha=0.6)
            lowest = min(lowest, *cell)
    floor = max(0, 10 * int(lowest / 10) - 10)
    axis.set_ylim(floor, 100)
    axis.set_xticks(range(len(methods)), methods)
    axis.set_ylabel("average accuracy (%)" + (f", axis from {floor}" if floor else "") + "; dots: seeds")
    axis.set_title(f"{title}, all users" if several else title)
    figure.legend(loc="outside lower center", ncols=min(5, len(bars)), frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI)
    return path
