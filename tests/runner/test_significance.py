import math
from dataclasses import replace

import pytest
from scipy import stats

from pl_personalize.runner.results import ResultRow, with_means_over_users
from pl_personalize.runner.significance import compare, holm, marks, paired_test, welch_test


def rows(table):
    """``{(method, user): accuracies of seeds 1, 2, …}`` as rows, with means over users."""
    return with_means_over_users(
        [
            ResultRow("Numbers", "MLP", method, "none", user, seed, accuracy, None)
            for (method, user), accuracies in table.items()
            for seed, accuracy in enumerate(accuracies, 1)
        ]
    )


TABLE = {
    ("A", "u"): [90.0, 91.0, 92.0, 90.0],
    ("A", "v"): [80.0, 81.0, 82.0, 81.5],
    ("B", "u"): [89.0, 89.9, 91.1, 88.9],
    ("B", "v"): [79.1, 79.9, 81.0, 80.6],
    ("C", "u"): [90.5, 90.5, 92.5, 90.0],
    ("C", "v"): [79.5, 81.5, 81.5, 82.0],
}


def test_pairs_are_of_one_seed():
    found = {(one.user, one.method, one.other): one for one in compare(rows(TABLE))}
    assert set(found) == {(u, *pair) for u in ("u", "v", "all") for pair in (("A", "B"), ("A", "C"), ("B", "C"))}
    expected = stats.ttest_rel(TABLE["A", "u"], TABLE["B", "u"]).pvalue
    assert found["u", "A", "B"].p == pytest.approx(expected)
    assert found["u", "A", "B"].pairs == 4
    means = [[(u + v) / 2 for u, v in zip(TABLE[m, "u"], TABLE[m, "v"], strict=True)] for m in "AB"]
    assert found["all", "A", "B"].p == pytest.approx(stats.ttest_rel(*means).pvalue)
    assert found["all", "A", "B"].pairs == 4
    assert found["all", "A", "B"].difference == pytest.approx(1.0)


def test_adaptations_that_are_bounds_do_not_compete():
    table = [
        replace(row, method="FIM-IMM", adaptation={"A": "none", "B": "refit", "C": "refit+true-priors"}[row.method])
        for row in rows(TABLE)
    ]
    assert {(one.method, one.other) for one in compare(table)} == {("FIM-IMM", "FIM-IMM+refit")}


def test_noise_is_told_from_a_difference():
    found = {(one.user, one.method, one.other): one for one in compare(rows(TABLE))}
    assert found["u", "A", "B"].significant
    assert not found["u", "A", "C"].significant


def test_the_best_and_what_is_significantly_below_it_are_marked():
    table = rows(TABLE)
    assert marks(table, compare(table), ["A", "B", "C"]) == {
        ("C", "u"): "*",
        ("B", "u"): "↓",
        ("A", "v"): "*",
        ("C", "v"): "*",  # they tie
        ("B", "v"): "↓",
        ("C", "all"): "*",
        ("B", "all"): "↓",
    }


def test_all_that_are_equally_good_are_the_best():
    table = {(m, "u"): [90.0, 91.0, 92.0] for m in "AB"} | {("C", "u"): [80.0, 81.5, 82.1]}
    found = marks(rows(table), compare(rows(table)), list("ABC"))
    assert (found["A", "u"], found["B", "u"], found["C", "u"]) == ("*", "*", "↓")
    equal = rows({key: values for key, values in table.items() if key[0] != "C"})
    assert marks(equal, compare(equal), ["A", "B"]) == {}


def test_a_seed_that_one_method_lacks_is_no_pair():
    table = dict(TABLE)
    table["B", "u"] = table["B", "u"][:3]
    found = {one.user: one.pairs for one in compare(rows(table)) if (one.method, one.other) == ("A", "B")}
    assert found == {"u": 3, "v": 4, "all": 3}


def test_a_method_that_is_worse_for_every_user_is_worse_for_all():
    """By much for one and by little for the other: that users differ is no noise."""
    best = {("A", "u"): [95.0, 95.5, 95.2, 95.1, 95.3], ("A", "v"): [99.6, 99.5, 99.6, 99.7, 99.6]}
    worse = {("B", "u"): [82.0, 82.6, 82.1, 82.0, 82.4], ("B", "v"): [98.7, 98.6, 98.8, 98.7, 98.7]}
    others = {(m, user): [99.0 if user == "v" else 90.0] * 5 for m in "CDEF" for user in "uv"}
    table = rows(best | worse | others)

    found = marks(table, compare(table), list("ABCDEF"))
    assert found["A", "all"] == "*"
    assert {user: found.get(("B", user)) for user in ("u", "v", "all")} == {"u": "↓", "v": "↓", "all": "↓"}


def test_one_seed_says_nothing_of_chance():
    table = rows({key: values[:1] for key, values in TABLE.items()})
    assert compare(table) == []
    assert marks(table, [], ["A", "B", "C"]) == {}


def adapted(table):
    return [
        ResultRow("Numbers", "CNN", method, adaptation, "u", seed, accuracy, None)
        for (method, adaptation), accuracies in table.items()
        for seed, accuracy in enumerate(accuracies, 1)
    ]


def test_what_answers_one_question_is_compared():
    """Methods under one adaptation, adaptations of one method; a bound with itself alone."""
    cells = {
        ("MAS-IMM", "last"): [60.0, 61.0, 63.0],
        ("mean-IMM", "last"): [61.0, 62.5, 63.0],
        ("MAS-IMM", "AdaBN"): [70.0, 72.0, 73.0],
        ("mean-IMM", "AdaBN"): [71.0, 71.0, 74.0],
        ("MAS-IMM", "average"): [65.0, 66.0, 64.0],
        ("Experts", "last"): [90.0, 91.0, 92.0],
        ("Experts", "AdaBN"): [91.0, 91.0, 93.0],
    }
    found = {(one.method, one.other): one for one in compare(adapted(cells)) if one.user == "u"}
    assert set(found) == {
        ("MAS-IMM+last", "mean-IMM+last"),
        ("MAS-IMM+AdaBN", "mean-IMM+AdaBN"),
        ("MAS-IMM+last", "MAS-IMM+AdaBN"),
        ("MAS-IMM+last", "MAS-IMM+average"),
        ("MAS-IMM+AdaBN", "MAS-IMM+average"),
        ("mean-IMM+last", "mean-IMM+AdaBN"),
        ("Experts+last", "Experts+AdaBN"),
    }
    three = [found["MAS-IMM+last", "MAS-IMM+AdaBN"], found["MAS-IMM+last", "MAS-IMM+average"]]
    three.append(found["MAS-IMM+AdaBN", "MAS-IMM+average"])
    assert [one.p_adjusted for one in three] == holm([one.p for one in three])  # a family of its own
    alone = found["mean-IMM+last", "mean-IMM+AdaBN"]
    assert alone.p_adjusted == alone.p


def test_the_best_adaptation_of_a_method_is_marked():
    cells = {("MAS-IMM", "last"): [60.0, 61.0, 63.0], ("MAS-IMM", "AdaBN"): [70.0, 72.0, 73.0]}
    table = with_means_over_users(adapted(cells))
    best = marks(table, compare(table), ["MAS-IMM+last", "MAS-IMM+AdaBN"])
    assert best == {
        (f"MAS-IMM+{a}", user): mark for a, mark in (("AdaBN", "*"), ("last", "↓")) for user in ("u", "all")
    }


def test_without_variance_the_test_is_still_defined():
    assert paired_test([0.0, 0.0, 0.0]) == 1.0
    assert paired_test([1.0, 1.0]) == 0.0
    assert welch_test([1.0, 1.0], [1.0, 1.0]) == 1.0
    assert welch_test([1.0, 1.0], [2.0, 2.0]) == 0.0


def test_holm_is_monotone_and_at_most_one():
    assert holm([0.5, 0.001, 0.02, 0.9]) == [1.0, 0.004, 0.06, 1.0]
    assert holm([]) == []
    assert not any(map(math.isnan, holm([0.3])))


def test_welch_agrees_with_its_formula():
    first, second = [1.0, 2.0, 4.0], [5.0, 5.5, 9.0, 7.0]

    def mean_and_error(values):
        mean = sum(values) / len(values)
        return mean, sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values)

    (m1, e1), (m2, e2) = mean_and_error(first), mean_and_error(second)
    t = (m1 - m2) / math.sqrt(e1 + e2)
    freedom = (e1 + e2) ** 2 / (e1**2 / 2 + e2**2 / 3)
    assert welch_test(first, second) == pytest.approx(2 * stats.t.sf(abs(t), freedom))
