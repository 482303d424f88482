"""The table that an experiment ends with."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from torch import Tensor

from pl_personalize.artifacts import ArtifactError, write_atomically
from pl_personalize.metrics import average_accuracy, forgetting
from pl_personalize.runner.methods import ADAPTATIONS, METHODS, variant_label
from pl_personalize.runner.paper import PaperResult

ALL_USERS = "all"
FEWEST_SEEDS = 3  # that methods are told apart by
MANY_USERS = 10  # as many as that, and more, are too many for columns, colours and heat maps


@dataclass(frozen=True)
class ResultRow:
    """The result of a method for a user and a seed, in percent.

    Attributes:
        benchmark: Name of the benchmark.
        backbone: Name of the network.
        method: Name of the method.
        adaptation: Of batch norm; ``none`` where there is none.
        user: Name of the user, or ``all`` for the mean over users.
        seed: The seed.
        avg_acc: Mean accuracy over tasks of the model after the last task.
        forgetting: Mean loss of accuracy since a task was new, divided by the number of tasks; ``None`` where there is
            but one model.
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
        """The method, with its adaptation if there is one."""
        return variant_label(self.method, self.adaptation)


def result_row(
    matrix: Tensor, *, benchmark: str, backbone: str, method: str, user: str, seed: int, adaptation: str = "none"
) -> ResultRow:
    """The row that follows from an accuracy matrix (model by task, in [0, 1])."""
    if method in METHODS and METHODS[method].one_each:
        accuracy, lost = matrix.diagonal().mean(), None
    else:
        accuracy = average_accuracy(matrix)
        lost = None if matrix.diagonal().isnan().any() else 100 * float(forgetting(matrix))
    return ResultRow(benchmark, backbone, method, adaptation, user, seed, 100 * float(accuracy), lost)


def with_means_over_users(rows: Sequence[ResultRow]) -> list[ResultRow]:
    """The rows, and after the users of each method and seed their mean, as user ``all``."""
    groups: dict[tuple[Any, ...], list[ResultRow]] = {}
    for row in rows:
        groups.setdefault((row.benchmark, row.backbone, row.method, row.adaptation, row.seed), []).append(row)
    complete: list[ResultRow] = []
    for group in groups.values():
        lost = [row.forgetting for row in group if row.forgetting is not None]
        overall = {
            "user": ALL_USERS,
            "avg_acc": mean(row.avg_acc for row in group),
            "forgetting": mean(lost) if lost else None,
        }
        complete += [*group, ResultRow(**{**asdict(group[0]), **overall})]
    return complete


def write_csv(path: Path, rows: Sequence[Any], row_type: type[Any] = ResultRow, *, decimals: int = 4) -> Path:
    """Write dataclass rows: a line for each, empty where there is no value.

    Args:
        path: The file, such as ``results.csv``.
        rows: The rows.
        row_type: Their class, whose fields are the columns.
        decimals: Of numbers that are no integers.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in fields(row_type)])
    for row in rows:
        values = asdict(row)
        writer.writerow(
            ["" if v is None else f"{v:.{decimals}f}" if isinstance(v, float) else v for v in values.values()]
        )
    return write_atomically(path, text.getvalue().encode())


def read_csv(path: Path) -> list[ResultRow]:
    """Read a ``results.csv``.

    Raises:
        ArtifactError: If it is missing or not such a file.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [
                ResultRow(
                    benchmark=row["benchmark"],
                    backbone=row["backbone"],
                    method=row["method"],
                    adaptation=row["adaptation"],
                    user=row["user"],
                    seed=int(row["seed"]),
                    avg_acc=float(row["avg_acc"]),
                    forgetting=float(row["forgetting"]) if row["forgetting"] else None,
                )
                for row in csv.DictReader(file)
            ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} cannot be read as a table of results: {error}") from error


def cell(rows: Sequence[ResultRow]) -> str:
    """Mean accuracy over seeds, its standard deviation, and in brackets the forgetting."""
    lost = [row.forgetting for row in rows if row.forgetting is not None]
    forgotten = f"{round(mean(lost), 1) + 0.0:.1f}" if lost else "n/a"  # + 0.0: no negative zero
    return f"{mean_and_deviation([row.avg_acc for row in rows])} ({forgotten})"


def mean_and_deviation(values: Sequence[float]) -> str:
    """The mean, and of several values the standard deviation.

    Example:
        >>> mean_and_deviation([80.0, 82.0])
        '81.0 ± 1.4'
    """
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def results_table(
    rows: Sequence[ResultRow],
    marks: Mapping[tuple[str, str], str] | None = None,
    paper: Mapping[str, PaperResult] | None = None,
) -> str:
    """The results as a Markdown table, methods by users; where there are many users, users by methods.

    Args:
        rows: The results.
        marks: What stands behind the figures of a method and user.
        paper: The paper's figures by method, for a column of their own.
    """
    users = list(dict.fromkeys(row.user for row in rows))
    lines = [["method", *[user_title(user) for user in users]]]
    for label in dict.fromkeys(row.label for row in rows):
        lines.append([label, *[_marked_cell(rows, label, user, marks or {}) for user in users]])
    if paper:
        lines[0].append("paper")
        for line in lines[1:]:
            found_there = paper.get(line[0])
            lost = "n/a" if found_there is None or found_there.forgetting is None else f"{found_there.forgetting:.1f}"
            line.append("" if found_there is None else f"{found_there.avg_acc:.1f} ({lost})")
    if len([user for user in users if user != ALL_USERS]) >= MANY_USERS:
        lines = [list(column) for column in zip(*lines, strict=True)]
        lines[0][0] = "user"
    return markdown_table(lines)


def adaptation_table(rows: Sequence[ResultRow], user: str, marks: Mapping[tuple[str, str], str] | None = None) -> str:
    """The results for a user as a Markdown table, methods by adaptations of batch norm.

    Args:
        rows: The results.
        user: Name of the user, or ``all``.
        marks: What stands behind the figures of a label and user.
    """
    adaptations = list(dict.fromkeys(row.adaptation for row in rows))
    lines = [[user_title(user), *adaptations]]
    for method in dict.fromkeys(row.method for row in rows):
        labels = [variant_label(method, adaptation) for adaptation in adaptations]
        lines.append([method, *[_marked_cell(rows, label, user, marks or {}) for label in labels]])
    return markdown_table(lines)


def user_title(user: str) -> str:
    """What stands above a user's figures."""
    if user == ALL_USERS:
        return "all users"
    return user if re.match(r"user\S", user) else f"user {user}"  # user1, but user scan; no two users share a title


def _marked_cell(rows: Sequence[ResultRow], label: str, user: str, marks: Mapping[tuple[str, str], str]) -> str:
    found = [row for row in rows if (row.label, row.user) == (label, user)]
    return " ".join(filter(None, [cell(found) if found else "–", marks.get((label, user), "")]))


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells, the first of which is the header, as a Markdown table.

    Example:
        >>> print(markdown_table([["a", "b"], ["1", "200"]]))
        | a | b   |
        |---|-----|
        | 1 | 200 |
    """
    lines = [[" ".join(c.split()).replace("|", "\\|") for c in line] for line in lines]
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    text = ["| " + " | ".join(c.ljust(width) for c, width in zip(line, widths, strict=True)) + " |" for line in lines]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text)


def legend(rows: Sequence[ResultRow], *, marked: bool = False, paper_note: str | None = None) -> str:
    """What the numbers of the table are."""
    seeds = sorted({row.seed for row in rows})
    spread = f", mean ± standard deviation over {len(seeds)} seeds" if len(seeds) > 1 else f", seed {seeds[0]}"
    found = {row.method for row in rows}
    bounds = "; ".join(f"{name}: {method.bound}" for name, method in METHODS.items() if method.bound and name in found)
    sentences = [f"Average accuracy in percent (forgetting){spread}."]
    if any(row.forgetting is None for row in rows):
        sentences.append("n/a: each task has a model of its own, or a single model was tested.")
    if bounds:
        sentences.append(f"Bounds: {bounds}.")
    adaptations = list(dict.fromkeys(row.adaptation for row in rows))
    if adaptations != ["none"]:
        meanings = [f"{name}: {known.text}" for name, known in ADAPTATIONS.items() if name in adaptations]
        sentences.append(f"Batch norm (–: for merges alone): {'; '.join(meanings)}.")
    if marked:
        best = "the best adaptation of a method" if len(adaptations) > 1 else "the best method, bounds apart"
        sentences.append(
            f"* {best}; ↓ significantly below it (paired t-test over seeds, for all users of their means; "
            "Holm-corrected, p < 0.05)."
        )
    elif len(seeds) < FEWEST_SEEDS:
        sentences.append(f"Fewer than {FEWEST_SEEDS} seeds tell no methods apart, so nothing is marked.")
    if paper_note:
        sentences.append(paper_note)
    return " ".join(sentences)


def write_markdown(path: Path, title: str, table: str, text: str, options: Mapping[str, Any]) -> Path:
    """Write ``results.md``: the table, what it means, and the options that it was made with."""
    listed = "\n".join(f"* {key}: {value}" for key, value in options.items())
    content = f"# {title}\n\n{table}\n\n{text}\n\n## Options\n\n{listed}\n"
    return write_atomically(path, content.encode())
