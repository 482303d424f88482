"""The figures that an experiment ends with."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pl_personalize.runner.results import ALL_USERS, MANY_USERS, ResultRow, user_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI = 130
_MAPS_IN_A_ROW = 5
_LONG_NAME = 8  # letters, beside which another has no room


def _new_figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def lowest_accuracy(matrices: Iterable[Tensor]) -> float:
    """Where the colours of heat maps begin, in percent: at most 50; those of one run have it in common."""
    seen = [100 * value for matrix in matrices for value in matrix.flatten().tolist() if value == value]
    return min(50, 10 * int(min(seen, default=50) / 10))


def draw_matrices(
    path: Path, title: str, matrices: Mapping[str, Tensor], tasks: Sequence[str], low: float | None = None
) -> Path:
    """Accuracy matrices as heat maps side by side, five in a row; of many users their mean.

    Args:
        path: The PNG to write.
        title: Above all.
        matrices: For each user the accuracies, model by task, in [0, 1].
        tasks: Names of the tasks.
        low: The accuracy with the darkest colour, in percent; by default :func:`lowest_accuracy` of these.
    """
    if len(matrices) >= MANY_USERS:
        matrices = {ALL_USERS: torch.stack(list(matrices.values())).mean(0)}
    columns = min(_MAPS_IN_A_ROW, len(matrices))
    rows = math.ceil(len(matrices) / columns)
    figure = _new_figure(1.2 + (0.62 * len(tasks) + 1.2) * columns, 0.6 + (1 + 0.5 * len(tasks)) * rows)
    figure.suptitle(title)
    low = lowest_accuracy(matrices.values()) if low is None else low
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes[len(matrices) :]:
        axis.set_axis_off()
    for axis, (user, matrix) in zip(axes, matrices.items(), strict=False):
        tested = [t for t in range(len(matrix)) if not bool(matrix[t].isnan().all())]  # of Joint, one model alone
        values = 100 * matrix[tested].numpy()
        image = axis.imshow(np.ma.masked_invalid(values), cmap="viridis", vmin=low, vmax=100, aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            if value == value:
                colour = "black" if value > low + 0.6 * (100 - low) else "white"
                axis.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=9)
        axis.set_title(user_title(user), fontsize=10)
        turned = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if max(map(len, tasks)) > _LONG_NAME else {}
        axis.set_xticks(range(len(tasks)), tasks, **turned)
        axis.set_yticks(range(len(tested)), [f"{t + 1}" for t in tested])
        axis.set_xlabel("task")
    for axis in axes[::columns]:
        axis.set_ylabel("model after task")
    figure.colorbar(image, ax=list(axes), label="accuracy (%)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI)
    return path


def draw_methods(path: Path, title: str, rows: Sequence[ResultRow]) -> Path:
    """Average accuracy of the methods side by side, a bar for each user, a dot for each seed.

    Of many users there is one bar, over all of them, with a dot for each. Under several adaptations of batch norm there
    is a bar for each of these, over all users.

    Args:
        path: The PNG to write.
        title: Above all.
        rows: The results.
    """
    methods = list(dict.fromkeys(row.method for row in rows))
    adaptations = list(dict.fromkeys(row.adaptation for row in rows))
    users = [user for user in dict.fromkeys(row.user for row in rows) if user != ALL_USERS]
    by_adaptation, by_user = len(adaptations) > 1, len(adaptations) == 1 and len(users) < MANY_USERS
    bars = {user_title(u): (adaptations[0], u) for u in users} if by_user else {a: (a, ALL_USERS) for a in adaptations}
    longest = max(map(len, bars))
    width = max(5.0, 1.5 + max(0.9, 0.22 * len(bars)) * len(methods))
    in_a_line = max(1, min(len(bars), int(width / (0.65 + 0.09 * longest))))
    figure = _new_figure(width, 4 + 0.22 * math.ceil(len(bars) / in_a_line))
    axis = figure.subplots()
    bar_width = 0.8 / len(bars)
    lowest, highest = 100.0, 0.0
    for k, (name, (adaptation, user)) in enumerate(bars.items()):
        of_this = [row for row in rows if row.adaptation == adaptation]
        groups = [_seeds(of_this, method, user) for method in methods]
        dots = groups if by_user or by_adaptation else [_users(of_this, method) for method in methods]
        there = [place for place, group in enumerate(groups) if group]  # not every adaptation is for every method
        places = [place + (k - (len(bars) - 1) / 2) * bar_width for place in there]
        axis.bar(places, [mean(groups[place]) for place in there], bar_width * 0.94, label=name)
        for x, place in zip(places, there, strict=True):
            axis.plot([x] * len(dots[place]), dots[place], "o", color="black", markersize=2.5, alpha=0.6)
            lowest, highest = min(lowest, *dots[place]), max(highest, *dots[place])
    floor = max(0, 10 * int(lowest / 10) - 10)
    axis.set_ylim(floor, min(100, 10 * int(highest / 10) + 10))
    axis.set_xticks(range(len(methods)), methods)
    axis.set_ylabel("average accuracy (%)" + (f", axis from {floor}" if floor else ""))
    what = "dots: seeds" if by_user or by_adaptation else f"dots: {len(users)} users"
    lines = [*textwrap.wrap(title, int(11 * width)), what if by_user else f"all users, {what}"]
    axis.set_title("\n".join(lines), fontsize=10)
    if by_user or by_adaptation:
        figure.legend(loc="outside lower center", ncols=in_a_line, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI)
    return path


def _seeds(rows: Sequence[ResultRow], method: str, user: str) -> list[float]:
    """The accuracy with each seed."""
    return [row.avg_acc for row in rows if (row.method, row.user) == (method, user)]


def _users(rows: Sequence[ResultRow], method: str) -> list[float]:
    """The accuracy for each user, mean over seeds."""
    users = dict.fromkeys(row.user for row in rows if row.method == method and row.user != ALL_USERS)
    return [mean(_seeds(rows, method, user)) for user in users]
