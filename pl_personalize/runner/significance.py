"""Significance tests of the differences between methods."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import mean, stdev

import numpy as np
from scipy import stats

from pl_personalize.runner.results import ALL_USERS, FEWEST_SEEDS, ResultRow, result_frame

LEVEL = 0.05


@dataclass(frozen=True)
class Comparison:
    """A paired t-test of two methods, by their labels.

    ``difference`` is the mean of (first − second) over ``pairs`` seeds, in percentage points of accuracy; ``p`` is
    two-sided, and ``p_adjusted`` has Holm's correction, see :func:`compare`.
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
        """Whether the methods differ significantly."""
        return self.p_adjusted < LEVEL


def compare(rows: Sequence[ResultRow]) -> list[Comparison]:
    """Compare methods under the same adaptation, and adaptations of the same method, paired by seed.

    For ``all`` users, the means over users are compared. Pairs of seed and user would not be independent: the users of
    a seed share its experts, and differences between users would be mistaken for noise. Bounds are compared only with
    themselves under other adaptations, and adaptations that are bounds not at all. Holm's correction covers the pairs
    of one user that answer one question: which method is best under an adaptation, or which adaptation is best for a
    method. With fewer than three seeds, nothing is compared.
    """
    frame = result_frame(row for row in rows if row.user != ALL_USERS)
    users, seeds = list(frame["user"].unique()), sorted(frame["seed"].unique())
    if len(seeds) < FEWEST_SEEDS:
        return []
    accuracies = {
        label: group.pivot(index="seed", columns="user", values="avg_acc").reindex(seeds, columns=users).to_numpy()
        for label, group in frame.groupby("label")
    }
    questions: dict[str, list[str]] = {}
    for row in frame.drop_duplicates("label").itertuples():
        if row.oracle:
            continue
        if not row.bound:
            questions.setdefault(f"methods under {row.adaptation}", []).append(row.label)
        questions.setdefault(f"adaptations of {row.method}", []).append(row.label)
    found: list[Comparison] = []
    for user in [*users, ALL_USERS]:
        columns = [k for k, name in enumerate(users) if user in (name, ALL_USERS)]
        for labels in questions.values():
            tests = []
            for first, second in combinations(labels, 2):
                by_user = (accuracies[first] - accuracies[second])[:, columns]
                differences = [mean(values) for values in by_user[~np.isnan(by_user).any(1)].tolist()]
                if len(differences) > 1:
                    tests.append((first, second, len(differences), mean(differences), paired_test(differences)))
            adjusted = holm([test[-1] for test in tests])
            found += [Comparison(user, *test, p) for test, p in zip(tests, adjusted, strict=True)]
    return found


def paired_test(differences: Sequence[float]) -> float:
    """Two-sided p-value of a paired t-test.

    Example:
        >>> round(paired_test([1.0, 2.0, 3.0]), 4)
        0.0742
        >>> paired_test([0.0, 0.0])
        1.0
    """
    if max(differences) == min(differences):  # the test is undefined without variance
        return float(differences[0] == 0)
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def welch_test(first: Sequence[float], second: Sequence[float]) -> float:
    """Two-sided p-value of Welch's t-test.

    Example:
        >>> round(welch_test([1.0, 2.0, 3.0], [2.0, 4.0, 9.0]), 4)
        0.2838
    """
    if max(first) == min(first) and max(second) == min(second):  # the test is undefined without variance
        return float(first[0] == second[0])
    return float(stats.ttest_ind(first, second, equal_var=False).pvalue)


def one_more_test(sample: Sequence[float], value: float) -> float:
    """Two-sided p-value of the t-test that ``value`` comes from the same normal distribution as the sample.

    Example:
        >>> round(one_more_test([1.0, 2.0, 3.0], 5.0), 4)
        0.1217
    """
    std = stdev(sample) * math.sqrt(1 + 1 / len(sample))
    if std == 0:
        return float(value == sample[0])
    return float(2 * stats.t.sf(abs(value - mean(sample)) / std, len(sample) - 1))


def holm(values: Sequence[float]) -> list[float]:
    """Holm's step-down correction of p-values for multiple tests (Holm, Scand. J. Statist. 1979).

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
    """Marks by label and user: the best of the competing labels (``*``), and those significantly below it (``↓``).

    Nothing is marked for a user if all are equal. An unmarked method may be as good as the best or worse: the seeds are
    too few to tell.
    """
    found: dict[tuple[str, str], str] = {}
    competing = [one for one in comparisons if one.method in labels and one.other in labels]
    means = result_frame(rows).groupby(["user", "label"])["avg_acc"].agg(mean)
    for user in dict.fromkeys(one.user for one in competing):
        here = means[user][list(labels)]
        best = here.idxmax()
        tied = here.index[np.isclose(here, here[best], rtol=1e-9, atol=1e-9)]
        if len(tied) == len(labels):
            continue
        found |= {(label, user): "*" for label in tied}
        for one in competing:
            if one.user == user and best in (one.method, one.other) and one.significant:
                found[one.other if one.method == best else one.method, user] = "↓"
    return found
