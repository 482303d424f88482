"""Compare two tables of results, method by method: Welch's t-test over seeds.

Where the other table has a single seed, its value is compared with the spread of ours.

python experiments/compare.py runs/numbers/results.csv experiments/reference/numbers_meter_digits_published_code.csv
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import mean

from jsonargparse import auto_cli

from pl_personalize import ArtifactError
from pl_personalize.runner.command_line import errors_in_one_line
from pl_personalize.runner.results import ALL_USERS, ResultRow, cell, markdown_table, read_csv
from pl_personalize.runner.significance import LEVEL, one_more_test, welch_test


def compare(ours: list[ResultRow], theirs: list[ResultRow], user: str) -> list[list[str]]:
    """The lines of a table: for each method that both have, the figures, the difference, p and a verdict."""
    lines = [["method", "ours", "theirs", "difference", "p", "verdict"]]
    for method in dict.fromkeys(row.label for row in ours):
        first, second = ([row for row in rows if (row.label, row.user) == (method, user)] for rows in (ours, theirs))
        if len(first) < 2 or not second:
            continue
        accuracies = [[row.avg_acc for row in rows] for rows in (first, second)]
        difference, p = mean(accuracies[0]) - mean(accuracies[1]), test(*accuracies)
        verdict = "no significant difference" if p >= LEVEL else "ours above" if difference > 0 else "ours below"
        lines.append([method, cell(first), cell(second), f"{difference:+.2f}", f"{p:.3f}", verdict])
    return lines


def test(ours: list[float], theirs: list[float]) -> float:
    """P of the hypothesis that there is no difference."""
    return one_more_test(ours, theirs[0]) if len(theirs) == 1 else welch_test(ours, theirs)


def main(ours: Path, theirs: Path, user: str = ALL_USERS) -> None:
    """Compare two tables of results.

    Args:
        ours: A ``results.csv``.
        theirs: Another, of the same columns.
        user: Whose figures to compare.
    """
    try:
        tables = read_csv(ours), read_csv(theirs)
        benchmarks = [sorted({row.benchmark for row in rows}) for rows in tables]
        if not set(benchmarks[0]) & set(benchmarks[1]):
            found = [", ".join(names) or "nothing" for names in benchmarks]
            sys.exit(f"error: {ours} is of {found[0]}, and {theirs} of {found[1]}.")
        lines = compare(*tables, user)
    except ArtifactError as error:
        sys.exit(f"error: {error}")
    if len(lines) == 1:
        sys.exit(
            f"error: {ours} and {theirs} have no method in common, of which the first has two seeds, for user {user!r}."
        )
    print(markdown_table(lines))
    print(
        "\nAverage accuracy in percent (forgetting), mean ± standard deviation over seeds. p: Welch's t-test; where "
        "there is one seed of theirs, whether it could be one more of ours."
    )


if __name__ == "__main__":
    with errors_in_one_line():
        auto_cli(main)
