"""Tables of ``importance_analysis.py``."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from importance_study.claim import compare, conclusion, verdict
from importance_study.pairs import ALL, COEFFICIENTS, KINDS, Estimate, Group, related
from pl_personalize import Importance
from pl_personalize.datamodules import TaskIncrementalDataModule
from pl_personalize.runner.results import markdown_table, mean_and_std, write_csv, write_markdown

DIFFERENCE = "same expert − same images"


def report(folder: Path, pairs: pd.DataFrame, known: dict[str, Group], settings: dict[str, Any]) -> None:
    """Print and write the tables and the verdict."""
    comparisons = compare(pairs, known)
    tables = {
        "All parameters": overall_table(pairs, known),
        DIFFERENCE[0].upper() + DIFFERENCE[1:]: comparison_table(comparisons),
        "Layer by layer": layer_table(pairs, known, plain(pairs)),
    }
    if summed(pairs):
        heading = "Summed over inputs (by unit) or over units (by input)"
        tables[heading] = layer_table(pairs, known, summed(pairs))
    text = "\n\n".join(f"{heading}:\n\n{table}" for heading, table in tables.items())
    said = f"{verdict(comparisons, pairs, known)}\n\n{legend(pairs)}"
    print(f"\n{text}\n\n{said}\n")
    paths = [
        write_markdown(folder / "importance-analysis.md", "Correlations of importances", text, said, settings),
        write_csv(folder / "correlations.csv", pairs),
        write_csv(folder / "comparisons.csv", comparisons),
    ]
    print("Tables:      " + ", ".join(map(str, paths)))


def plain(pairs: pd.DataFrame) -> list[str]:
    """``all`` and the names of the parameters."""
    return [name for name in pairs["parameters"].unique() if " " not in name]


def summed(pairs: pd.DataFrame) -> list[str]:
    """Names of the summed matrices."""
    return [name for name in pairs["parameters"].unique() if " " in name]


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
    chosen = [known[name] for name in ("model", "users", "fixed", "images", "nothing")]
    chosen = [group for group in chosen if len(group.of(pairs))]
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
) -> dict[str, tuple[str, str, torch.Tensor, torch.Tensor]]:
    """The pair of one expert, and the pair on the same images, with the rank correlation nearest to their mean.

    Args:
        pairs: Correlations of one kind and set of experts, for all parameters.
        known: The groups.
        found: The importances.
        data: The images.
    """
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
