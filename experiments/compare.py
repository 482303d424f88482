"""Compare two tables of results method by method, with Welch's t-test over seeds.

If the other table has a single seed, its value is compared with the prediction interval of ours.

python experiments/compare.py runs/numbers/results.csv experiments/reference/numbers_meter_digits_published_code.csv
"""

from __future__ import annotations

import sys
from pathlib import Path

from pl_personalize.runner.command_line import run_script
from pl_personalize.runner.results import ALL_USERS, ResultRow, cell, markdown_table, read_csv, result_frame
from pl_personalize.runner.significance import LEVEL, one_more_test, welch_test


def compare(ours: list[ResultRow], theirs: list[ResultRow], user: str) -> list[list[str]]:
    """Lines of a table with the results, the difference, p and a verdict for each method that both tables have."""
    lines = [["method", "ours", "theirs", "difference", "p", "verdict"]]
    other = dict(iter(result_frame(row for row in theirs if row.user == user).groupby("label")))
    for label, first in result_frame(row for row in ours if row.user == user).groupby("label", sort=False):
        if len(first) < 2 or label not in other:
            continue
        values, reference = list(first["avg_acc"]), list(other[label]["avg_acc"])
        p = one_more_test(values, reference[0]) if len(reference) == 1 else welch_test(values, reference)
        difference = first["avg_acc"].mean() - other[label]["avg_acc"].mean()
        verdict = "no significant difference" if p >= LEVEL else "ours above" if difference > 0 else "ours below"
        lines.append([label, cell(first), cell(other[label]), f"{difference:+.2f}", f"{p:.3f}", verdict])
    return lines


def main(ours: Path, theirs: Path, user: str = ALL_USERS) -> None:
    """Compare two tables of results.

    Args:
        ours: A ``results.csv``.
        theirs: Another one.
        user: User whose results to compare.
    """
    tables = read_csv(ours), read_csv(theirs)
    benchmarks = [sorted({row.benchmark for row in rows}) for rows in tables]
    if not set(benchmarks[0]) & set(benchmarks[1]):
        found = [", ".join(names) or "nothing" for names in benchmarks]
        sys.exit(f"error: {ours} is of {found[0]}, and {theirs} of {found[1]}.")
    lines = compare(*tables, user)
    if len(lines) == 1:
        sys.exit(f"error: for user {user!r}, {ours} has no method with two seeds or more that is also in {theirs}.")
    print(markdown_table(lines))
    print(
        "\nAverage accuracy in percent (forgetting), mean ± standard deviation over seeds. p: Welch's t-test; for a "
        "single seed of theirs, the t-test that it is another seed of ours."
    )


if __name__ == "__main__":
    run_script(main, as_positional=True)
