"""The claim: one expert on different images against different experts on the same images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isnan, nan, sqrt

import numpy as np
import pandas as pd
from scipy import stats

from importance_study.pairs import ALL, BY_INPUT, BY_UNIT, COEFFICIENTS, KINDS, Group

HIGH, LOW = 0.7, 0.3
COMPARED = {"as defined": ("model", "fixed"), "users alone, any images": ("users", "images")}


def compare(pairs: pd.DataFrame, known: dict[str, Group]) -> pd.DataFrame:
    """Compare one expert on different images with different experts on the same images, for all parameters.

    ``low`` and ``high`` are the ends of the 95 % interval of the difference between means, ``above`` is the probability
    that a random pair of one expert correlates more than a random pair on the same images.
    """
    found = []
    for kind, here in pairs[pairs["parameters"] == ALL].groupby("kind", sort=False):
        for name, ends in COMPARED.items():
            chosen = [known[end].of(here) for end in ends]
            if any(group.empty for group in chosen):
                continue
            for one in COEFFICIENTS:
                first, second = (float(group[one].mean()) for group in chosen)
                numbers = [first, second, first - second, *interval(chosen, one), share_above(chosen, one)]
                found.append([kind, one, name, *numbers])
    columns = ["kind", "coefficient", "name", "same_model", "same_images", "difference", "low", "high", "above"]
    return pd.DataFrame(found, columns=columns)


def conclusion(low: float, high: float) -> str:
    """Whether pairs of one expert correlate more, given the interval of the difference."""
    if isnan(low):
        return "no interval"
    return "yes" if low > 0 else "no, the reverse" if high < 0 else "not clear"


def interval(chosen: Sequence[pd.DataFrame], coefficient: str) -> tuple[float, float]:
    """95 % interval of the difference between the means of two groups of pairs; NaN for too few experts.

    Pairs of one expert share it, and pairs of one seed share everything. The interval is therefore that of a paired
    t-test over sets of experts, or for fewer than three sets, that of a jackknife over experts.
    """
    by_set = [group.groupby("experts")[coefficient].mean() for group in chosen]
    differences = by_set[0] - by_set[1]
    middle, error, count = differences.mean(), differences.sem(), len(differences)
    if count < 3:
        ends = ("first_expert", "second_expert")
        experts = sorted({tuple(one) for g in chosen for end in ends for one in g[["experts", end]].to_numpy()})
        if len(experts) < 3 * count:
            return nan, nan
        without = []
        for name, expert in experts:
            kept = [g[(g["experts"] != name) | (g[[*ends]] != expert).all(axis=1)] for g in chosen]
            without.append(kept[0][coefficient].mean() - kept[1][coefficient].mean())
        middle, count = chosen[0][coefficient].mean() - chosen[1][coefficient].mean(), len(experts)
        error = sqrt((count - 1) * np.var(without))
    half = error * stats.t.ppf(0.975, count - 1)
    return float(middle - half), float(middle + half)


def share_above(chosen: Sequence[pd.DataFrame], coefficient: str) -> float:
    """Probability that a random pair of the first group exceeds a random pair of the second, of the same experts."""
    above = []
    for experts in chosen[0]["experts"].unique():
        first, second = (g.loc[g["experts"] == experts, coefficient].dropna().to_numpy() for g in chosen)
        above.append((first[:, None] > second).ravel())
    wins = np.concatenate(above)
    return float(wins.mean()) if len(wins) else nan


def verdict(comparisons: pd.DataFrame, pairs: pd.DataFrame, known: dict[str, Group]) -> str:
    """Verdict on the claim, in words."""
    sentences = []
    for kind, here in comparisons[comparisons["name"] == "as defined"].groupby("kind", sort=False):
        pearson, spearman = here.itertuples()
        sentences.append(
            f"{KINDS[kind]}: importances of one expert on different images correlate with {pearson.same_model:.2f} "
            f"(ranks: {spearman.same_model:.2f}), those of different experts on the same images with "
            f"{pearson.same_images:.2f} ({spearman.same_images:.2f})."
        )
    sentences.append(f"The direction of the claim: {direction(comparisons)}.")
    sharp, count = ((comparisons["same_model"] >= HIGH) & (comparisons["same_images"] <= LOW)).sum(), len(comparisons)
    held = f"all {count}" if sharp == count else f"{sharp} of {count}" if sharp else f"none of {count}"
    sentences.append(f"“High” (here: at least {HIGH}) against “low” (at most {LOW}) holds in {held}.")
    return " ".join([*sentences, *units_and_inputs(pairs, known)])


def direction(comparisons: pd.DataFrame) -> str:
    """Whether one expert on different images correlates more than different experts on the same images."""
    count = len(comparisons)
    conclusions = [conclusion(*ends) for ends in zip(comparisons["low"], comparisons["high"], strict=True)]
    more = f"one expert correlates more in {(comparisons['difference'] > 0).sum()} of {count} comparisons"
    if "no interval" in conclusions:
        return f"{more}; these are too few experts to say how sure that is"
    yes, no = conclusions.count("yes"), conclusions.count("no, the reverse")
    if yes == count:
        return f"it holds in all {count} comparisons: importances describe the model more than the data"
    return f"{more}, beyond its uncertainty in {yes}" + (f"; the reverse holds in {no}" if no else "")


def units_and_inputs(pairs: pd.DataFrame, known: dict[str, Group]) -> Iterator[str]:
    """Which side wins for matrices summed by unit, and by input."""
    for ending, winner, sign in ((BY_UNIT, "one expert correlates", 1), (BY_INPUT, "the same images correlate", -1)):
        here = pairs[pairs["parameters"].str.endswith(ending)]
        differences = []
        for ends in COMPARED.values():
            first, second = (known[one].of(here).groupby(["kind", "parameters"])[COEFFICIENTS].mean() for one in ends)
            differences.append((first - second).to_numpy().ravel())
        values = np.concatenate(differences)
        values = values[~np.isnan(values)]
        if len(values):
            yield f"Summed {ending}, {winner} more in {(sign * values > 0).sum()} of {len(values)}."
