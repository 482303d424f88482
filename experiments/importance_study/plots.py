"""The figures of ``importance_analysis.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor

from importance_study.pairs import ALL, COEFFICIENTS, KINDS, Group, PairRow

COLOURS = {"model": "#1f5fa8", "users": "#7fb2e5", "fixed": "#c8501e", "images": "#f0a878", "nothing": "#9a9a9a"}
SHOWN_FROM = 0.01  # importances reach down to nothing; the axes begin at this quantile


def full_title(group: Group) -> str:
    """Its title where the line above does not complete it."""
    return group.title.replace("– of", "same expert, images of")


def draw_correlations(
    path: Path, rows: Sequence[PairRow], known: Mapping[str, Group], parameters: Sequence[str]
) -> Path:
    """Mean correlations of the groups side by side, a row for each coefficient, a column for each kind.

    Args:
        path: The PNG to write.
        rows: The correlations.
        known: The groups.
        parameters: What stands on the x-axis.
    """
    kinds = list(dict.fromkeys(row.kind for row in rows))
    bars = [name for name in COLOURS if any(row in known[name] for row in rows)]
    figure = Figure(figsize=(len(kinds) * (1.2 + 1.25 * len(parameters)), 7.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(kinds), squeeze=False, sharey=True)
    width = 0.84 / len(bars)
    for line, coefficient in zip(axes, COEFFICIENTS, strict=True):
        for axis, kind in zip(line, kinds, strict=True):
            for k, name in enumerate(bars):
                place_of = [place + (k - (len(bars) - 1) / 2) * width for place in range(len(parameters))]
                groups = [
                    [
                        value
                        for row in rows
                        if (row.kind, row.parameters) == (kind, one) and row in known[name]
                        if not isnan(value := getattr(row, coefficient))
                    ]
                    for one in parameters
                ]
                cells = [(place, group) for place, group in zip(place_of, groups, strict=True) if group]
                places, means = [place for place, _ in cells], [fmean(group) for _, group in cells]
                spreads = [stdev(group) if len(group) > 1 else 0.0 for _, group in cells]
                axis.bar(places, means, width * 0.94, color=COLOURS[name], label=full_title(known[name]))
                axis.errorbar(places, means, spreads, fmt="none", ecolor="black", elinewidth=0.8, capsize=1.5)
            axis.set_title(KINDS[kind], fontsize=11)
            axis.set_xticks(
                range(len(parameters)), [one.replace(" by", "\nby").replace(".", ".\n") for one in parameters]
            )
            axis.tick_params(axis="x", labelsize=8.5)
            axis.axhline(0, color="black", linewidth=0.6)
            axis.grid(axis="y", linewidth=0.4, alpha=0.5)
            axis.set_axisbelow(True)
            axis.spines[["top", "right"]].set_visible(False)
        line[0].set_ylabel(f"{coefficient.capitalize()} correlation")
    low = min(0.0, axes[0][0].get_ylim()[0])
    axes[0][0].set_ylim(max(-1.0, low), 1.05)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.suptitle("Importances correlated: mean and standard deviation over pairs", fontsize=11)
    return save(figure, path)


def draw_scatter(path: Path, kind: str, pairs: Mapping[str, tuple[str, str, Tensor, Tensor]]) -> Path:
    """Two importances against each other, parameter by parameter, as a histogram with logarithmic axes.

    Args:
        path: The PNG to write.
        kind: Name of the importance.
        pairs: By title: what the two are, and the two.
    """
    figure = Figure(figsize=(5.6 * len(pairs), 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(pairs), squeeze=False)[0]
    for axis, (name, (first_label, second_label, first, second)) in zip(axes, pairs.items(), strict=True):
        both = (first > 0) & (second > 0)
        x, y = (one[both].double().log10().numpy() for one in (first, second))
        if len(x):
            edges = [np.linspace(np.quantile(one, SHOWN_FROM), one.max() + 0.05, 90) for one in (x, y)]
            *_, image = axis.hist2d(x, y, bins=edges, norm=LogNorm(), cmap="viridis", rasterized=True)
            axis.axline((0, 0), slope=1, color="#c8501e", linewidth=0.8)
            figure.colorbar(image, ax=axis, label="parameters")
        axis.set_title(name, fontsize=10)
        axis.set_xlabel(f"log₁₀ importance, {first_label}", fontsize=9)
        axis.set_ylabel(f"log₁₀ importance, {second_label}", fontsize=9)
    shown = f"zeros and the lowest {100 * SHOWN_FROM:.0f} % are left out; line: equal"
    figure.suptitle(f"{kind}, {ALL} parameters of the body; {shown}", fontsize=11)
    return save(figure, path)


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path
