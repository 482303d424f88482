"""Figures of ``importance_analysis.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm
from torch import Tensor

from importance_study.pairs import ALL, COEFFICIENTS, KINDS, Group
from pl_personalize.runner.figures import new_figure, save_figure

COLORS = {"model": "#1f5fa8", "users": "#7fb2e5", "fixed": "#c8501e", "images": "#f0a878", "nothing": "#9a9a9a"}
LOWEST_QUANTILE = 0.01  # where axes start, because importances come arbitrarily close to zero


def draw_correlations(path: Path, pairs: pd.DataFrame, known: Mapping[str, Group], parameters: Sequence[str]) -> Path:
    """Draw mean correlations of the groups as bars, one row per coefficient and one column per kind.

    Args:
        path: The PNG to write.
        pairs: The correlations.
        known: The groups.
        parameters: Parameters on the x-axis.
    """
    kinds = list(pairs["kind"].unique())
    bars = [name for name in COLORS if len(known[name].of(pairs))]
    figure = new_figure(len(kinds) * (1.2 + 1.25 * len(parameters)), 7.4)
    axes = figure.subplots(2, len(kinds), squeeze=False, sharey=True)
    width = 0.84 / len(bars)
    for line, coefficient in zip(axes, COEFFICIENTS, strict=True):
        for axis, kind in zip(line, kinds, strict=True):
            for k, name in enumerate(bars):
                here = known[name].of(pairs[pairs["kind"] == kind])
                cells = here.groupby("parameters")[coefficient].agg(["mean", "std"]).reindex(parameters)
                cells.index = np.arange(len(parameters)) + (k - (len(bars) - 1) / 2) * width
                cells = cells.dropna(subset="mean").fillna(0.0)
                axis.bar(cells.index, cells["mean"], width * 0.94, color=COLORS[name], label=known[name].full_title)
                style = {"fmt": "none", "ecolor": "black", "elinewidth": 0.8, "capsize": 1.5}
                axis.errorbar(cells.index, cells["mean"], cells["std"], **style)
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
    figure.suptitle("Correlations of importances: mean and standard deviation over pairs", fontsize=11)
    return save_figure(figure, path)


def draw_scatter(path: Path, kind: str, pairs: Mapping[str, tuple[str, str, Tensor, Tensor]]) -> Path:
    """Draw pairs of importances, parameter by parameter, as two-dimensional histograms with logarithmic axes.

    Args:
        path: The PNG to write.
        kind: Name of the importance.
        pairs: Names of the two and their values, by title.
    """
    figure = new_figure(5.6 * len(pairs), 5.2)
    axes = figure.subplots(1, len(pairs), squeeze=False)[0]
    for axis, (name, (first_label, second_label, first, second)) in zip(axes, pairs.items(), strict=True):
        both = (first > 0) & (second > 0)
        x, y = (one[both].double().log10().numpy() for one in (first, second))
        if len(x):
            edges = [np.linspace(np.quantile(one, LOWEST_QUANTILE), one.max() + 0.05, 90) for one in (x, y)]
            *_, image = axis.hist2d(x, y, bins=edges, norm=LogNorm(), cmap="viridis", rasterized=True)
            axis.axline((0, 0), slope=1, color="#c8501e", linewidth=0.8)
            figure.colorbar(image, ax=axis, label="parameters")
        axis.set_title(name, fontsize=10)
        axis.set_xlabel(f"log₁₀ importance, {first_label}", fontsize=9)
        axis.set_ylabel(f"log₁₀ importance, {second_label}", fontsize=9)
    shown = f"without zeros and the lowest {100 * LOWEST_QUANTILE:.0f} %; line: equal"
    figure.suptitle(f"{kind}, {ALL} parameters of the body; {shown}", fontsize=11)
    return save_figure(figure, path)
