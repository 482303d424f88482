"""Which differences between methods are more than noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import mean

from pl_personalize.runner.results import ALL_USERS, ResultRow

LEVEL = 0.05


@dataclass(frozen=True)
class Comparison:
    """A paired t-test between two methods.

    Attributes:
        user: Name of the user, or ``all``.
        method: The first method.
        other: The second.
        pairs: Number of pairs: seeds, for ``all`` seeds times users.
        difference: Mean of (first - second), in points of accuracy.
        p: Two-sided.
        p_adjusted: The same after Holm's correction over all pairs of methods for this user.
    """

    user: str
    method: str
    other: str
    pairs: int
    difference: float
    p: float
    p_adjusted: float

    @property
    def within_noise(self) -> bool:
        """Whether the methods cannot be told apart."""
        return self.p_adjusted >= LEVEL


def compare_methods(rows: Sequence[ResultRow], methods: Sequence[str]) -> list[Comparison]:
    """Every pair of methods, for each user over seeds, and over the pairs of seed and user.

    The users of a seed share its experts, so for ``all`` the pairs are not quite independent, and p is somewhat too
    small; for a single user it is not.

    Args:
        rows: The results; rows of ``all`` users are passed over.
        methods: What to compare.

    Returns:
        Nothing for a single seed: that says nothing of chance.
    """
    accuracies: dict[str, dict[tuple[str, int], float]] = {method: {} for method in methods}
    for row in rows:
        if row.method in accuracies and row.user != ALL_USERS:
            accuracies[row.method][row.user, row.seed] = row.avg_acc
    if len({row.seed for row in rows}) < 2:
        return []
    users = list(dict.fromkeys(row.user for row in rows if row.user != ALL_USERS))
    found: list[Comparison] = []
    for user in [*users, ALL_USERS]:
        tests = []
        for first, second in combinations(methods, 2):
            keys = [key for key in accuracies[first].keys() & accuracies[second].keys() if user in (ALL_USERS, key[0])]
            keys.sort()
            differences = [accuracies[first][key] - accuracies[second][key] for key in keys]
            if len(differences) > 1:
                tests.append((first, second, len(differences), mean(differences), paired_test(differences)))
        adjusted = holm([test[-1] for test in tests])
        found += [Comparison(user, *test, p) for test, p in zip(tests, adjusted, strict=True)]
    return found


def paired_test(differences: Sequence[float]) -> float:
    """Two-sided p of a t-test that the differences have mean zero.

    Example:
        >>> round(paired_test([1.0, 2.0, 3.0]), 4)
        0.0742
        >>> paired_test([0.0, 0.0])
        1.0
    """
    from scipy import stats

    if max(differences) == min(differences):  # no variance: the test is not defined
        return 1.0 if differences[0] == 0 else 0.0
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def welch_test(first: Sequence[float], second: Sequence[float]) -> float:
    """Two-sided p of Welch's t-test that two samples, of different variance, have one mean.

    Example:
        >>> round(welch_test([1.0, 2.0, 3.0], [2.0, 4.0, 9.0]), 4)
        0.2838
    """
    from scipy import stats

    if max(first) == min(first) and max(second) == min(second):  # no variance: the test is not defined
        return 1.0 if first[0] == second[0] else 0.0
    return float(stats.ttest_ind(first, second, equal_var=False).pvalue)


def holm(values: Sequence[float]) -> list[float]:
    """Holm's step-down correction of p-values for their number (Holm, Scand. J. Statist. 1979).

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    adjusted = [math.nan] * len(values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        largest = max(largest, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = largest
    return adjusted


def marks(
    rows: Sequence[ResultRow], comparisons: Sequence[Comparison], methods: Sequence[str]
) -> Mapping[tuple[str, str], str]:
    """For each user the best of the methods (``*``), and those that cannot be told from it (``≈``).

    Args:
        rows: The results, with those of ``all`` users.
        comparisons: What :func:`compare_methods` found for them.
        methods: The competitors.

    Returns:
        By method and user; nothing for a user without comparisons.
    """
    found: dict[tuple[str, str], str] = {}
    for user in dict.fromkeys(comparison.user for comparison in comparisons):
        means = {m: mean(r.avg_acc for r in rows if (r.method, r.user) == (m, user)) for m in methods}
        best = max(means, key=means.__getitem__)
        found[best, user] = "*"
        for one in comparisons:
            if one.user == user and best in (one.method, one.other) and one.within_noise:
                found[one.other if one.method == best else one.method, user] = "≈"
    return found
