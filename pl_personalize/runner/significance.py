"""Which differences between methods are more than noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import mean, stdev

from pl_personalize.runner.methods import METHODS
from pl_personalize.runner.results import ALL_USERS, FEWEST_SEEDS, ResultRow

LEVEL = 0.05


@dataclass(frozen=True)
class Comparison:
    """A paired t-test between two methods.

    Attributes:
        user: Name of the user, or ``all``.
        method: The first method, with its adaptation if there is one.
        other: The second.
        pairs: Number of pairs, which are seeds.
        difference: Mean of (first - second), in points of accuracy.
        p: Two-sided.
        p_adjusted: The same after Holm's correction, see :func:`compare`.
    """

    user: str
    method: str
    other: str
    pairs: int
    difference: float
    p: float
    p_adjusted: float

    @property
    def significant(self) -> bool:
        """Whether the methods can be told apart."""
        return self.p_adjusted < LEVEL


def compare(rows: Sequence[ResultRow]) -> list[Comparison]:
    """Methods with each other, and the adaptations of each method, for each user over seeds.

    For ``all`` users the means over users are compared, as they are in the table. Seed and user together would be no
    pairs: the users of a seed share its experts, and a method that is worse by much for one user and by little for
    another would not be told from it.

    Args:
        rows: The results; rows of ``all`` users are passed over. Methods that are bounds are compared with themselves,
            under other adaptations, alone.

    Returns:
        Nothing for fewer than three seeds: they say next to nothing of chance. Holm's correction is for the pairs of a
        user that answer one question: which method under an adaptation, or which adaptation of a method.
    """
    bounds = {name for name, method in METHODS.items() if method.bound is not None}
    accuracies: dict[str, dict[tuple[str, int], float]] = {}
    questions: dict[str, dict[str, None]] = {}
    for row in rows:
        if row.user == ALL_USERS:
            continue
        accuracies.setdefault(row.label, {})[row.user, row.seed] = row.avg_acc
        if row.method not in bounds:
            questions.setdefault(f"methods under {row.adaptation}", {})[row.label] = None
        questions.setdefault(f"adaptations of {row.method}", {})[row.label] = None
    if len({row.seed for row in rows}) < FEWEST_SEEDS:
        return []
    users = list(dict.fromkeys(row.user for row in rows if row.user != ALL_USERS))
    found: list[Comparison] = []
    for user in [*users, ALL_USERS]:
        for labels in questions.values():
            tests = []
            for first, second in combinations(labels, 2):
                of_whom = users if user == ALL_USERS else [user]
                differences = _differences(accuracies[first], accuracies[second], of_whom)
                if len(differences) > 1:
                    tests.append((first, second, len(differences), mean(differences), paired_test(differences)))
            adjusted = holm([test[-1] for test in tests])
            found += [Comparison(user, *test, p) for test, p in zip(tests, adjusted, strict=True)]
    return found


def _differences(
    first: Mapping[tuple[str, int], float], second: Mapping[tuple[str, int], float], users: Sequence[str]
) -> list[float]:
    """Between means over users, for each seed that both methods have for all of them."""
    common = {key: first[key] - second[key] for key in first.keys() & second.keys()}
    seeds = sorted({seed for _, seed in common})
    return [mean(common[u, seed] for u in users) for seed in seeds if all((u, seed) in common for u in users)]


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


def one_more_test(sample: Sequence[float], value: float) -> float:
    """Two-sided p of the t-test that ``value`` is one more of a normal sample: is it in the prediction interval?

    Example:
        >>> round(one_more_test([1.0, 2.0, 3.0], 5.0), 4)
        0.1217
    """
    from scipy import stats

    deviation = stdev(sample) * math.sqrt(1 + 1 / len(sample))
    if deviation == 0:
        return 1.0 if value == sample[0] else 0.0
    return float(2 * stats.t.sf(abs(value - mean(sample)) / deviation, len(sample) - 1))


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
    rows: Sequence[ResultRow], comparisons: Sequence[Comparison], labels: Sequence[str]
) -> dict[tuple[str, str], str]:
    """For each user the best of some competitors (``*``), and those that are significantly below it (``↓``).

    Where all are equal, there is no best.

    What has no mark may be as good as the best, or worse: that so few seeds do not say.

    Args:
        rows: The results, with those of ``all`` users.
        comparisons: What :func:`compare` found for them.
        labels: The competitors.

    Returns:
        By label and user; nothing for a user without comparisons.
    """
    found: dict[tuple[str, str], str] = {}
    of_these = [one for one in comparisons if one.method in labels and one.other in labels]
    for user in dict.fromkeys(comparison.user for comparison in of_these):
        means = {label: mean(r.avg_acc for r in rows if (r.label, r.user) == (label, user)) for label in labels}
        best = max(means, key=means.__getitem__)
        tied = [label for label in labels if math.isclose(means[label], means[best], abs_tol=1e-9)]
        if len(tied) == len(labels):  # nothing is best
            continue
        found |= {(label, user): "*" for label in tied}
        for one in of_these:
            if one.user == user and best in (one.method, one.other) and one.significant:
                found[one.other if one.method == best else one.method, user] = "↓"
    return found
