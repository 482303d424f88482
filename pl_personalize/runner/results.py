"""Tables of results: rows, ``results.csv`` and Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pandas as pd
from torch import Tensor

from pl_personalize.adaptations import ADAPTATIONS
from pl_personalize.artifacts import ArtifactError, write_atomically
from pl_personalize.methods import METHODS
from pl_personalize.metrics import average_accuracy, forgetting
from pl_personalize.runner.paper import PaperResult
from pl_personalize.runner.variants import variant_label

ALL_USERS = "all"
FEWEST_SEEDS = 3  # needed for a significance test
MANY_USERS = 10  # from this number on, users get no columns, colors or heat maps of their own


@dataclass(frozen=True)
class ResultRow:
    """Result of one method for one user (``all``: the mean over users) and seed, in percent.

    ``avg_acc`` is the mean accuracy over tasks of the model after the last task. ``forgetting`` is the sum of drops in
    accuracy since a task was learned, divided by the number of tasks; ``None`` if only one model per task was tested.
    """

    benchmark: str
    backbone: str
    method: str
    adaptation: str
    user: str
    seed: int
    avg_acc: float
    forgetting: float | None

    @property
    def label(self) -> str:
        """Name of the method, with its adaptation if there is one."""
        return variant_label(self.method, self.adaptation)


def result_row(
    matrix: Tensor, *, benchmark: str, backbone: str, method: str, user: str, seed: int, adaptation: str = "none"
) -> ResultRow:
    """Summarize an accuracy matrix (model × task, in [0, 1])."""
    if method in METHODS and METHODS[method].one_each:
        accuracy, lost = task_accuracies(matrix, method).mean(), None
    else:
        accuracy = average_accuracy(matrix)
        lost = None if matrix.diagonal().isnan().any() else 100 * float(forgetting(matrix))
    return ResultRow(benchmark, backbone, method, adaptation, user, seed, 100 * float(accuracy), lost)


def task_accuracies(matrix: Tensor, method: str) -> Tensor:
    """Accuracy on each task, in the end: of the last model, or of each task's own."""
    return matrix.diagonal() if method in METHODS and METHODS[method].one_each else matrix[-1]


def result_frame(rows: Iterable[ResultRow]) -> pd.DataFrame:
    """Data frame of the rows with their ``label``.

    ``bound`` tells whether the method is a bound rather than a competitor, and ``oracle`` whether the adaptation is.
    """
    rows = list(rows)
    frame = pd.DataFrame(rows, columns=[field.name for field in fields(ResultRow)])
    return frame.assign(
        forgetting=frame["forgetting"].astype(float),
        label=[row.label for row in rows],
        bound=[row.method in METHODS and METHODS[row.method].bound is not None for row in rows],
        oracle=[any(s in ADAPTATIONS and ADAPTATIONS[s].bound for s in row.adaptation.split("+")) for row in rows],
    )


def with_means_over_users(rows: Sequence[ResultRow]) -> list[ResultRow]:
    """Add the mean over users, as user ``all``, after the rows of each method and seed."""
    complete: list[ResultRow] = []
    by = ["benchmark", "backbone", "method", "adaptation", "seed"]
    for _, group in result_frame(rows).groupby(by, sort=False):
        lost = group["forgetting"].dropna()
        of_users = [rows[k] for k in group.index]
        overall = {"avg_acc": mean(group["avg_acc"]), "forgetting": mean(lost) if len(lost) else None}
        complete += [*of_users, replace(of_users[0], user=ALL_USERS, **overall)]
    return complete


def write_csv(path: Path, rows: pd.DataFrame | Sequence[Any], *, decimals: int = 4) -> Path:
    """Write a data frame or dataclass instances as CSV, with empty cells for missing values."""
    text = pd.DataFrame(rows).to_csv(index=False, float_format=f"%.{decimals}f", lineterminator="\n")
    return write_atomically(path, text.encode())


def read_csv(path: Path) -> list[ResultRow]:
    """Read a ``results.csv``.

    Raises:
        ArtifactError: If the file is missing or not a table of results.
    """
    types = {field.name: str for field in fields(ResultRow)} | {"seed": int, "avg_acc": float, "forgetting": float}
    try:
        frame = pd.read_csv(
            path, usecols=list(types), dtype=types, keep_default_na=False, na_values={"forgetting": [""]}
        )
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read as a table of results: {error}") from error
    frame["forgetting"] = frame["forgetting"].astype(object).where(frame["forgetting"].notna(), None)
    return [ResultRow(**row) for row in frame.to_dict("records")]


def cell(rows: pd.DataFrame) -> str:
    """Mean and standard deviation of the accuracy over seeds, and the mean forgetting in parentheses."""
    lost = rows["forgetting"].dropna()
    forgotten = f"{round(mean(lost), 1) + 0.0:.1f}" if len(lost) else "n/a"  # + 0.0: no negative zero
    return f"{mean_and_std(rows['avg_acc'])} ({forgotten})"


def mean_and_std(values: Iterable[float], decimals: int = 1) -> str:
    """Mean and, of two values or more, standard deviation; NaNs are skipped, and a dash stands for no value.

    Example:
        >>> mean_and_std([80.0, 82.0]), mean_and_std([0.123], 2), mean_and_std([])
        ('81.0 ± 1.4', '0.12', '–')
    """
    values = [value for value in values if value == value]
    if not values:
        return "–"
    return f"{mean(values):.{decimals}f}" + (f" ± {stdev(values):.{decimals}f}" if len(values) > 1 else "")


def results_table(
    rows: Sequence[ResultRow],
    marks: Mapping[tuple[str, str], str] | None = None,
    paper: Mapping[str, PaperResult] | None = None,
) -> str:
    """Markdown table of methods × users, transposed for many users; with marks by label and user, and the paper's."""
    users, cells = list(dict.fromkeys(row.user for row in rows)), _cells(rows, marks)
    lines = [["method", *map(user_title, users)]]
    for label in dict.fromkeys(row.label for row in rows):
        lines.append([label, *[cells.get((label, user), "–") for user in users]])
    if paper:
        lines[0].append("paper")
        for line in lines[1:]:
            result = paper.get(line[0])
            lost = "n/a" if result is None or result.forgetting is None else f"{result.forgetting:.1f}"
            line.append("" if result is None else f"{result.avg_acc:.1f} ({lost})")
    if len(set(users) - {ALL_USERS}) >= MANY_USERS:
        lines = [list(column) for column in zip(*lines, strict=True)]
        lines[0][0] = "user"
    return markdown_table(lines)


def adaptation_table(rows: Sequence[ResultRow], user: str, marks: Mapping[tuple[str, str], str] | None = None) -> str:
    """Markdown table of methods × adaptations for one user or ``all``, with marks by label and user."""
    adaptations, cells = list(dict.fromkeys(row.adaptation for row in rows)), _cells(rows, marks)
    lines = [[user_title(user), *adaptations]]
    for method in dict.fromkeys(row.method for row in rows):
        lines.append([method, *[cells.get((variant_label(method, one), user), "–") for one in adaptations]])
    return markdown_table(lines)


def _cells(rows: Sequence[ResultRow], marks: Mapping[tuple[str, str], str] | None) -> dict[tuple[str, str], str]:
    groups = result_frame(rows).groupby(["label", "user"])
    return {key: f"{cell(group)} {(marks or {}).get(key, '')}".strip() for key, group in groups}


def user_title(user: str) -> str:
    """Heading for a user's results; different users have different headings."""
    if user == ALL_USERS:
        return "all users"
    return user if re.match(r"user\S", user) else f"user {user}"  # user1, but user scan


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Markdown table of lines of cells, the first of which is the header.

    Example:
        >>> print(markdown_table([["a", "b"], ["1", "200"]]))
        | a | b   |
        |---|-----|
        | 1 | 200 |
    """
    lines = [[" ".join(c.split()).replace("|", "\\|") for c in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["| " + " | ".join(c.ljust(width) for c, width in zip(line, widths, strict=True)) + " |" for line in lines]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text)


def legend(rows: Sequence[ResultRow], *, marked: bool = False, paper_note: str | None = None) -> str:
    """Explanation of the numbers and marks in the tables."""
    seeds = sorted({row.seed for row in rows})
    spread = f", mean ± standard deviation over {len(seeds)} seeds" if len(seeds) > 1 else f", seed {seeds[0]}"
    methods, adaptations = {row.method for row in rows}, list(dict.fromkeys(row.adaptation for row in rows))
    bounds = [f"{name}: {method.bound}" for name, method in METHODS.items() if method.bound and name in methods]
    sentences = [f"Average accuracy in percent (forgetting){spread}."]
    if any(row.forgetting is None for row in rows):
        sentences.append("n/a: each task has its own model, or only one model was tested.")
    if bounds:
        sentences.append(f"Bounds: {'; '.join(bounds)}.")
    if adaptations != ["none"]:
        steps = {step for name in adaptations for step in name.split("+")}
        texts = [f"{name}: {known.text}" for name, known in ADAPTATIONS.items() if name in steps]
        sentences.append(f"Adaptations (–: not applicable): {'; '.join(texts)}.")
    if marked:
        best = (
            "the best adaptation of a method, bounds excluded"
            if len(adaptations) > 1
            else "the best method, bounds excluded"
        )
        sentences.append(
            f"* {best}; ↓ significantly below it (paired t-test over seeds, for all users on their means; "
            "Holm-corrected, p < 0.05)."
        )
    elif len(seeds) < FEWEST_SEEDS:
        sentences.append(f"Nothing is marked: significance tests need {FEWEST_SEEDS} seeds or more.")
    return " ".join([*sentences, *filter(None, [paper_note])])


def write_markdown(path: Path, title: str, table: str, text: str, options: Mapping[str, Any]) -> Path:
    """Write ``results.md``: the tables, their explanation, and the options of the run."""
    listed = "\n".join(f"* {key}: {value}" for key, value in options.items())
    content = f"# {title}\n\n{table}\n\n{text}\n\n## Options\n\n{listed}\n"
    return write_atomically(path, content.encode())
