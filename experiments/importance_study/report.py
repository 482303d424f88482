"""The tables of ``importance_analysis.py``, printed and written."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from importance_study.claim import Comparison, compare, verdict
from importance_study.pairs import (
    ALL,
    BY_INPUT,
    BY_UNIT,
    COEFFICIENTS,
    KINDS,
    Estimate,
    Group,
    ImportanceName,
    PairRow,
    related,
)
from importance_study.plots import full_title
from pl_personalize import Importance
from pl_personalize.datamodules import TaskIncrementalDataModule
from pl_personalize.runner.results import markdown_table, write_csv, write_markdown

DIFFERENCE = "same expert − same images"


def report(folder: Path, rows: Sequence[PairRow], known: dict[str, Group], settings: dict[str, Any]) -> None:
    """Print and write tables and verdict."""
    comparisons = compare(rows, known)
    tables = {
        "All parameters": overall_table(rows, known),
        DIFFERENCE[0].upper() + DIFFERENCE[1:]: comparison_table(comparisons),
        "Layer by layer": layer_table(rows, known, plain(rows)),
    }
    if summed(rows):
        tables["Summed over inputs (by unit) or over units (by input)"] = layer_table(rows, known, summed(rows))
    text = "\n\n".join(f"{heading}:\n\n{table}" for heading, table in tables.items())
    said = f"{verdict(comparisons, rows, known)}\n\n{legend(rows)}"
    print(f"\n{text}\n\n{said}\n")
    paths = [
        write_markdown(folder / "importance-analysis.md", "Correlations of importances", text, said, settings),
        write_csv(folder / "correlations.csv", rows, PairRow),
        write_csv(folder / "comparisons.csv", comparisons, Comparison),
    ]
    print("Tables:      " + ", ".join(map(str, paths)))


def plain(rows: Sequence[PairRow]) -> list[str]:
    """All parameters, and each."""
    return [name for name in dict.fromkeys(row.parameters for row in rows) if " " not in name]


def summed(rows: Sequence[PairRow]) -> list[str]:
    """Each matrix of parameters, summed."""
    return [name for name in dict.fromkeys(row.parameters for row in rows) if name.endswith((BY_UNIT, BY_INPUT))]


def overall_table(rows: Sequence[PairRow], known: dict[str, Group]) -> str:
    """Groups by kind and coefficient."""
    kinds = list(dict.fromkeys(row.kind for row in rows))
    here = [row for row in rows if row.parameters == ALL]
    lines = [["pairs", "number", *[f"{KINDS[k]} {c.capitalize()}" for k in kinds for c in COEFFICIENTS]]]
    for group in known.values():
        found = [row for row in here if row in group]
        if found:
            cells = [cell([row for row in found if row.kind == kind], c) for kind in kinds for c in COEFFICIENTS]
            lines.append([group.title, str(len(found) // len(kinds)), *cells])
    return markdown_table(lines)


def layer_table(rows: Sequence[PairRow], known: dict[str, Group], parameters: Sequence[str]) -> str:
    """Parameters by group, Pearson and Spearman."""
    kinds = list(dict.fromkeys(row.kind for row in rows))
    chosen = [known[name] for name in ("model", "users", "fixed", "images", "nothing")]
    chosen = [group for group in chosen if any(row in group for row in rows)]
    lines = [["importance", "parameters", *[full_title(group) for group in chosen]]]
    for kind in kinds:
        for name in parameters:
            here = [row for row in rows if (row.kind, row.parameters) == (kind, name)]
            cells = [
                " / ".join(cell([row for row in here if row in g], c, False) for c in COEFFICIENTS) for g in chosen
            ]
            lines.append([KINDS[kind], name, *cells])
    return markdown_table(lines)


def cell(rows: Sequence[PairRow], coefficient: str, spread: bool = True) -> str:
    """Mean and standard deviation over pairs."""
    values = [value for value in (getattr(row, coefficient) for row in rows) if not isnan(value)]
    if not values:
        return "–"
    return f"{fmean(values):.2f}" + (f" ± {stdev(values):.2f}" if spread and len(values) > 1 else "")


def comparison_table(comparisons: Sequence[Comparison]) -> str:
    """Each comparison with its interval."""
    lines = [["importance", "coefficient", "pairs", DIFFERENCE, "95 % interval", "pair above pair", "same expert more"]]
    for one in comparisons:
        ends = "–" if isnan(one.low) else f"{one.low:+.2f} to {one.high:+.2f}"
        values = f"{one.same_model:.2f} − {one.same_images:.2f} = {one.difference:+.2f}"
        above = f"{100 * one.above:.0f} %"
        lines.append([KINDS[one.kind], one.coefficient.capitalize(), one.name, values, ends, above, one.verdict])
    return markdown_table(lines)


def legend(rows: Sequence[PairRow]) -> str:
    """What the numbers are."""
    sets = len({row.experts for row in rows})
    if sets >= 3:
        how = f"a paired t-test over the {sets} sets of experts, which share their images"
    else:
        how = (
            "a jackknife over experts, each left out with all its pairs; experts of a sequence descend from each other"
        )
    lost = sum(isnan(row.pearson) for row in rows if row.parameters == ALL)
    sentences = [
        "Correlation over the parameters of the body, mean ± standard deviation over pairs (layer by layer: Pearson / "
        "Spearman; ties share their mean rank).",
        "Pairs are not independent, so their deviation is no error of the mean.",
        f"The interval is that of {how}, so it is approximate, and says nothing of other users.",
        "Pair above pair: how often a random pair of one expert correlates more than a random pair on the same images. "
        "As defined: all pairs of server and users, against the one set of images; users alone: without the server, "
        "whose images are of all users' kinds, against the images of every user and task.",
    ]
    if lost:
        sentences.append(f"{lost} pairs have no correlation, as one importance is constant, and are left out.")
    return " ".join(sentences)


def typical(
    rows: Sequence[PairRow],
    known: dict[str, Group],
    kind: ImportanceName,
    experts: str,
    found: dict[Estimate, Importance],
    data: TaskIncrementalDataModule,
) -> dict[str, tuple[str, str, torch.Tensor, torch.Tensor]]:
    """Of one expert and of the same images, the pair whose correlation of ranks is nearest to their mean."""
    here = [row for row in rows if (row.kind, row.parameters, row.experts) == (kind, ALL, experts)]
    estimates = {row: pair[1:] for row, pair in zip(here, related(len(data.tasks), data.users), strict=True)}
    pairs = {}
    for group in (known["users" if len(data.users) > 1 else "model"], known["fixed"]):
        members = [row for row in here if row in group and not isnan(row.spearman)]
        if members:
            middle = fmean(row.spearman for row in members)
            row = min(members, key=lambda row: abs(row.spearman - middle))
            first, second = (torch.cat([value.flatten() for value in found[one].values()]) for one in estimates[row])
            heading = f"{full_title(group)}\nPearson {row.pearson:.2f}, Spearman {row.spearman:.2f}"
            names = [f"expert {expert} on {images}" for expert, images in ends(row)]
            pairs[heading] = (names[0], names[1], first, second)
    return pairs


def ends(row: PairRow) -> tuple[tuple[str, str], tuple[str, str]]:
    """Expert and images of the first and the second."""
    return (row.first_expert, row.first_images), (row.second_expert, row.second_images)
