"""Tables and figures of ``importance_analysis.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.colors import LogNorm
from torch import Tensor

from importance_study.claim import compare, conclusion, verdict
from importance_study.pairs import ALL, COEFFICIENTS, KINDS, Estimate, Group, related
from pl_personalize import Importance
from pl_personalize.datamodules import TaskIncrementalDataModule
from pl_personalize.runner.figures import new_figure, save_figure
from pl_personalize.runner.results import markdown_table, mean_and_std, write_csv, write_markdown

DIFFERENCE = "same expert − same images"
COLORS = {"model": "#1f5fa8", "users": "#7fb2e5", "fixed": "#c8501e", "images": "#f0a878", "nothing": "#9a9a9a"}
LOWEST_QUANTILE = 0.01  # where axes start, because importances come arbitrarily close to zero


def report(folder: Path, pairs: pd.DataFrame, known: dict[str, Group], settings: dict[str, Any]) -> list[Path]:
    """Print and write the tables and the verdict; draw the correlations and return the figures."""
    comparisons, names = compare(pairs, known), pairs["parameters"].unique()
    tables = {
        "All parameters": overall_table(pairs, known),
        DIFFERENCE[0].upper() + DIFFERENCE[1:]: comparison_table(comparisons),
    }
    figures = []
    for heading, file, is_summed in (
        ("Layer by layer", "layers", False),
        ("Summed over inputs (by unit) or over units (by input)", "units-and-inputs", True),
    ):
        if chosen := [name for name in names if (" " in name) == is_summed]:
            tables[heading] = layer_table(pairs, known, chosen)
            figures.append(draw_correlations(folder / "figures" / f"{file}.png", pairs, known, chosen))
    text = "\n\n".join(f"{heading}:\n\n{table}" for heading, table in tables.items())
    said = f"{verdict(comparisons, pairs, known)}\n\n{legend(pairs)}"
    print(f"\n{text}\n\n{said}\n")
    paths = [
        write_markdown(folder / "importance-analysis.md", "Correlations of importances", text, said, settings),
        write_csv(folder / "correlations.csv", pairs),
        write_csv(folder / "comparisons.csv", comparisons),
    ]
    print("Tables:      " + ", ".join(map(str, paths)))
    return figures


def overall_table(pairs: pd.DataFrame, known: dict[str, Group]) -> str:
    """Groups × kinds and coefficients."""
    kinds, here = list(pairs["kind"].unique()), pairs[pairs["parameters"] == ALL]
    lines = [["pairs", "number", *[f"{KINDS[k]} {c.capitalize()}" for k in kinds for c in COEFFICIENTS]]]
    for group in known.values():
        if len(found := group.of(here)):
            cells = [mean_and_std(found.loc[found["kind"] == k, c], 2) for k in kinds for c in COEFFICIENTS]
            lines.append([group.title, str(len(found) // len(kinds)), *cells])
    return markdown_table(lines)


def layer_table(pairs: pd.DataFrame, known: dict[str, Group], parameters: Sequence[str]) -> str:
    """Parameters × groups, Pearson's and Spearman's correlations."""
    chosen = [known[name] for name in COLORS if len(known[name].of(pairs))]
    lines = [["importance", "parameters", *[group.full_title for group in chosen]]]
    for kind in pairs["kind"].unique():
        for name in parameters:
            here = pairs[(pairs["kind"] == kind) & (pairs["parameters"] == name)]
            means = [group.of(here)[COEFFICIENTS].mean() for group in chosen]
            lines.append([KINDS[kind], name, *[" / ".join(mean_and_std([v], 2) for v in mean) for mean in means]])
    return markdown_table(lines)


def comparison_table(comparisons: pd.DataFrame) -> str:
    """The comparisons with their intervals."""
    lines = [["importance", "coefficient", "pairs", DIFFERENCE, "95 % interval", "pair above pair", "same expert more"]]
    for one in comparisons.itertuples():
        ends = "–" if isnan(one.low) else f"{one.low:+.2f} to {one.high:+.2f}"
        values = f"{one.same_model:.2f} − {one.same_images:.2f} = {one.difference:+.2f}"
        cells = [one.name, values, ends, f"{100 * one.above:.0f} %", conclusion(one.low, one.high)]
        lines.append([KINDS[one.kind], one.coefficient.capitalize(), *cells])
    return markdown_table(lines)


def legend(pairs: pd.DataFrame) -> str:
    """Explanation of the numbers."""
    sets = pairs["experts"].nunique()
    how = (
        f"a paired t-test over the {sets} sets of experts, which share their images"
        if sets >= 3
        else "a jackknife over experts, each left out with all its pairs; later experts start from earlier ones"
    )
    sentences = [
        "Correlation over the parameters of the body, mean ± standard deviation over pairs (layer by layer: Pearson / "
        "Spearman; ties share their mean rank).",
        "Pairs are not independent, so the standard deviation gives no standard error of the mean.",
        f"The interval is that of {how}, so it is approximate, and does not cover other users.",
        "Pair above pair: how often a random pair of one expert correlates more than a random pair on the same images. "
        "As defined: all pairs of server and users, against the one set of images; users alone: without the server, "
        "whose images resemble those of all users, against the images of every user and task.",
    ]
    if lost := int(pairs.loc[pairs["parameters"] == ALL, "pearson"].isna().sum()):
        sentences.append(f"{lost} pairs are left out because one importance is constant, so they have no correlation.")
    return " ".join(sentences)


def typical(
    pairs: pd.DataFrame, known: dict[str, Group], found: dict[Estimate, Importance], data: TaskIncrementalDataModule
) -> dict[str, tuple[str, str, Tensor, Tensor]]:
    """The pair of one expert, and that on the same images, whose rank correlation is nearest to the mean, by title."""
    estimates, pairs = list(related(len(data.tasks), data.users)), pairs.reset_index(drop=True)
    chosen = {}
    for group in (known["users" if len(data.users) > 1 else "model"], known["fixed"]):
        values = group.of(pairs)["spearman"].dropna()
        if len(values):
            place = (values - values.mean()).abs().idxmin()
            row = pairs.loc[place]
            first, second = (torch.cat([v.flatten() for v in found[one].values()]) for one in estimates[place][1:])
            heading = f"{group.full_title}\nPearson {row['pearson']:.2f}, Spearman {row['spearman']:.2f}"
            names = [f"expert {row[f'{end}_expert']} on {row[f'{end}_images']}" for end in ("first", "second")]
            chosen[heading] = (names[0], names[1], first, second)
    return chosen


def draw_correlations(path: Path, pairs: pd.DataFrame, known: Mapping[str, Group], parameters: Sequence[str]) -> Path:
    """Draw mean correlations of the groups as bars, one row per coefficient and one column per kind."""
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
    """Draw pairs of importances (names and values by title) as two-dimensional histograms with logarithmic axes."""
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
