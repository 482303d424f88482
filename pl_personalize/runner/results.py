"""The table that an experiment ends with."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from torch import Tensor

from pl_personalize.artifacts import write_atomically
from pl_personalize.metrics import average_accuracy, forgetting
from pl_personalize.runner.methods import BOUNDS

ALL_USERS = "all"


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


def result_row(
    matrix: Tensor, *, benchmark: str, backbone: str, method: str, user: str, seed: int, adaptation: str = "none"
) -> ResultRow:
    """The row that follows from an accuracy matrix (model by task, in [0, 1])."""
    if method == "Experts":  # the bound: each task with the expert that was trained for it
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


def write_csv(path: Path, rows: Iterable[ResultRow]) -> Path:
    """Write ``results.csv``: one line for each row, numbers with four decimals, empty where there is none."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in fields(ResultRow)])
    for row in rows:
        values = asdict(row)
        writer.writerow(["" if v is None else f"{v:.4f}" if isinstance(v, float) else v for v in values.values()])
    return write_atomically(path, text.getvalue().encode())


def summarise(rows: Sequence[ResultRow]) -> dict[str, dict[str, str]]:
    """For each method and user the mean accuracy over seeds, its standard deviation, and in brackets the forgetting."""
    cells: dict[str, dict[str, list[ResultRow]]] = {}
    for row in rows:
        cells.setdefault(row.method, {}).setdefault(row.user, []).append(row)
    return {m: {user: _cell(found) for user, found in by_user.items()} for m, by_user in cells.items()}


def _cell(rows: Sequence[ResultRow]) -> str:
    accuracies = [row.avg_acc for row in rows]
    spread = f" ± {stdev(accuracies):.1f}" if len(rows) > 1 else ""
    lost = [row.forgetting for row in rows if row.forgetting is not None]
    return f"{mean(accuracies):.1f}{spread} ({f'{mean(lost):.1f}' if lost else 'n/a'})"


def markdown_table(rows: Sequence[ResultRow]) -> str:
    """The summary as a Markdown table, methods by users."""
    summary = summarise(rows)
    users = list(dict.fromkeys(row.user for row in rows))
    lines = [["method", *[f"user {user}" if user != ALL_USERS else "all users" for user in users]]]
    lines += [[method, *[cells.get(user, "") for user in users]] for method, cells in summary.items()]
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text)


def legend(rows: Sequence[ResultRow]) -> str:
    """What the numbers of the table are."""
    seeds = sorted({row.seed for row in rows})
    spread = f", mean ± standard deviation over {len(seeds)} seeds" if len(seeds) > 1 else f", seed {seeds[0]}"
    bounds = "; ".join(f"{name}: {what}" for name, what in BOUNDS.items() if any(row.method == name for row in rows))
    return f"Average accuracy in percent (forgetting){spread}. Bounds: {bounds}."


def write_markdown(path: Path, title: str, rows: Sequence[ResultRow], options: Mapping[str, Any]) -> Path:
    """Write ``results.md``: the table, what it means, and the options that it was made with."""
    listed = "\n".join(f"* {key}: {value}" for key, value in options.items())
    text = f"# {title}\n\n{markdown_table(rows)}\n\n{legend(rows)}\n\n## Options\n\n{listed}\n"
    return write_atomically(path, text.encode())
