"""Figures of results."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pl_personalize.runner.results import ALL_USERS, MANY_USERS, ResultRow, result_frame, user_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAPS_PER_ROW = 5
_LONG_NAME = 8  # characters; longer tick labels are rotated


def new_figure(width: float, height: float) -> Figure:
    """An empty figure without pyplot's global state, in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a PNG, creating its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def lowest_accuracy(matrices: Iterable[Tensor]) -> float:
    """Lower end of the color scale that the heat maps of a run share, in percent: at most 50."""
    seen = [100 * value for matrix in matrices for value in matrix.flatten().tolist() if value == value]
    return min(50, 10 * int(min(seen, default=50) / 10))


def draw_matrices(
    path: Path, title: str, matrices: Mapping[str, Tensor], tasks: Sequence[str], low: float | None = None
) -> Path:
    """Draw accuracy matrices (in [0, 1], model × task, by user) as heat maps; for many users, only their mean.

    The color scale starts at ``low`` percent, by default the :func:`lowest_accuracy` of the matrices.
    """
    if len(matrices) >= MANY_USERS:
        matrices = {ALL_USERS: torch.stack(list(matrices.values())).mean(0)}
    columns = min(_MAPS_PER_ROW, len(matrices))
    rows = math.ceil(len(matrices) / columns)
    figure = new_figure(1.2 + (0.62 * len(tasks) + 1.2) * columns, 0.6 + (1 + 0.5 * len(tasks)) * rows)
    figure.suptitle(title)
    low = lowest_accuracy(matrices.values()) if low is None else low
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes[len(matrices) :]:
        axis.set_axis_off()
    for axis, (user, matrix) in zip(axes, matrices.items(), strict=False):
        tested = [t for t in range(len(matrix)) if not bool(matrix[t].isnan().all())]  # Joint has only one model
        values = 100 * matrix[tested].numpy()
        image = axis.imshow(np.ma.masked_invalid(values), cmap="viridis", vmin=low, vmax=100, aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            if value == value:
                color = "black" if value > low + 0.6 * (100 - low) else "white"
                axis.text(column, row, f"{value:.0f}", ha="center", va="center", color=color, fontsize=9)
        axis.set_title(user_title(user), fontsize=10)
        turned = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if max(map(len, tasks)) > _LONG_NAME else {}
        axis.set_xticks(range(len(tasks)), tasks, **turned)
        axis.set_yticks(range(len(tested)), [f"{t + 1}" for t in tested])
        axis.set_xlabel("task")
    for axis in axes[::columns]:
        axis.set_ylabel("model after task")
    figure.colorbar(image, ax=list(axes), label="accuracy (%)")
    return save_figure(figure, path)


def draw_methods(path: Path, title: str, rows: Sequence[ResultRow]) -> Path:
    """Draw the average accuracy of each method as one bar per user, with one dot per seed.

    For many users there is a single bar, for their mean, with one dot per user; for several adaptations there is one
    bar per adaptation, for the mean over users.
    """
    frame = result_frame(rows)
    methods, adaptations = list(frame["method"].unique()), list(frame["adaptation"].unique())
    users = [user for user in frame["user"].unique() if user != ALL_USERS]
    by_adaptation, by_user = len(adaptations) > 1, len(adaptations) == 1 and len(users) < MANY_USERS
    bars = {user_title(u): (adaptations[0], u) for u in users} if by_user else {a: (a, ALL_USERS) for a in adaptations}
    width = max(5.0, 1.5 + max(0.9, 0.22 * len(bars)) * len(methods))
    per_line = max(1, min(len(bars), int(width / (0.65 + 0.09 * max(map(len, bars))))))
    figure = new_figure(width, 4 + 0.22 * math.ceil(len(bars) / per_line))
    axis = figure.subplots()
    bar_width, drawn = 0.8 / len(bars), []
    for k, (name, (adaptation, user)) in enumerate(bars.items()):
        here = frame[frame["adaptation"] == adaptation]
        of_bar = here[here["user"] == user]
        heights, dots = of_bar.groupby("method")["avg_acc"].mean(), of_bar
        if not (by_user or by_adaptation):
            dots = here[here["user"] != ALL_USERS].groupby(["method", "user"], as_index=False)["avg_acc"].mean()
        places = {method: place + (k - (len(bars) - 1) / 2) * bar_width for place, method in enumerate(methods)}
        axis.bar([places[method] for method in heights.index], heights, bar_width * 0.94, label=name)
        axis.plot(dots["method"].map(places), dots["avg_acc"], "o", color="black", markersize=2.5, alpha=0.6)
        drawn += list(dots["avg_acc"])
    floor = max(0, 10 * int(min(drawn) / 10) - 10)
    axis.set_ylim(floor, min(100, 10 * int(max(drawn) / 10) + 10))
    axis.set_xticks(range(len(methods)), methods)
    axis.set_ylabel("average accuracy (%)" + (f", axis from {floor}" if floor else ""))
    what = "dots: seeds" if by_user or by_adaptation else f"dots: {len(users)} users"
    lines = [*textwrap.wrap(title, int(11 * width)), what if by_user else f"all users, {what}"]
    axis.set_title("\n".join(lines), fontsize=10)
    if by_user or by_adaptation:
        figure.legend(loc="outside lower center", ncols=per_line, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    return save_figure(figure, path)
