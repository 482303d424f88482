"""The claim: one expert on different images against different experts on the same images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isnan, nan, sqrt
from statistics import fmean

import numpy as np
import pandas as pd
from scipy import stats

from importance_study.pairs import ALL, BY_INPUT, BY_UNIT, COEFFICIENTS, KINDS, Group

HIGH, LOW = 0.7, 0.3
COMPARED = {"as defined": ("model", "fixed"), "users alone, any images": ("users", "images")}


@dataclass(frozen=True)
class Comparison:
    """Comparison of pairs of one expert with pairs on the same images.

    Attributes:
        kind: ``mas`` or ``fisher``.
        coefficient: ``pearson`` or ``spearman``.
        name: Which pairs are compared.
        same_model: Mean correlation over pairs of one expert.
        same_images: Mean correlation over pairs of different experts on the same images.
        difference: ``same_model`` − ``same_images``.
        low: Lower end of its 95 % interval; NaN if there are too few experts.
        high: Upper end.
        above: Probability that a random pair of one expert correlates more than a random pair on the same images.
    """

    kind: str
    coefficient: str
    name: str
    same_model: float
    same_images: float
    difference: float
    low: float
    high: float
    above: float

    @property
    def verdict(self) -> str:
        """Whether pairs of one expert correlate more."""
        if isnan(self.low):
            return "no interval"
        return "yes" if self.low > 0 else "no, the reverse" if self.high < 0 else "not clear"

    @property
    def high_against_low(self) -> bool:
        """Whether the first correlation is high and the second low, as claimed."""
        return self.same_model >= HIGH and self.same_images <= LOW


def compare(pairs: pd.DataFrame, known: dict[str, Group]) -> list[Comparison]:
    """Compare one expert on different images with different experts on the same images, for all parameters.

    The pairs are not independent: pairs of one expert share it, and pairs of one seed share everything. With three sets
    of experts or more, the interval is therefore that of a paired t-test over sets; with fewer, that of a jackknife
    over experts, each left out with all its pairs. Neither accounts for the choice of users.

    Args:
        pairs: Correlations with one reduction.
        known: The groups, see :func:`groups`.
    """
    found = []
    for kind, here in pairs[pairs["parameters"] == ALL].groupby("kind", sort=False):
        for name, ends in COMPARED.items():
            chosen = [known[end].of(here) for end in ends]
            if any(group.empty for group in chosen):
                continue
            for one in COEFFICIENTS:
                first, second = (float(group[one].mean()) for group in chosen)
                low, high = interval(chosen, one)
                above = share_above(chosen, one)
                found.append(Comparison(str(kind), one, name, first, second, first - second, low, high, above))
    return found


def interval(chosen: Sequence[pd.DataFrame], coefficient: str) -> tuple[float, float]:
    """95 % interval of the difference between the means of two groups of pairs, see :func:`compare`."""
    by_set = [group.groupby("experts")[coefficient].mean() for group in chosen]
    differences = by_set[0] - by_set[1]
    if len(differences) >= 3:
        return tuple(map(float, stats.ttest_1samp(differences, 0).confidence_interval()))
    ends = [group[["experts", f"{end}_expert"]].to_numpy().tolist() for group in chosen for end in ("first", "second")]
    experts = sorted({tuple(expert) for end in ends for expert in end})
    if len(experts) < 3 * len(differences):
        return nan, nan
    without = []
    for name, expert in experts:
        kept = [
            group[(group["experts"] != name) | ((group[["first_expert", "second_expert"]] != expert).all(axis=1))]
            for group in chosen
        ]
        without.append(float(kept[0][coefficient].mean() - kept[1][coefficient].mean()))
    middle, count = float(chosen[0][coefficient].mean() - chosen[1][coefficient].mean()), len(experts)
    error = sqrt((count - 1) / count * sum((value - fmean(without)) ** 2 for value in without))
    half = error * float(stats.t.ppf(0.975, count - 1))
    return middle - half, middle + half


def share_above(chosen: Sequence[pd.DataFrame], coefficient: str) -> float:
    """Probability that a random pair of the first group exceeds a random pair of the second, of the same experts."""
    above = []
    for experts in chosen[0]["experts"].unique():
        first, second = (g.loc[g["experts"] == experts, coefficient].dropna().to_numpy() for g in chosen)
        above.append((first[:, None] > second).ravel())
    wins = np.concatenate(above)
    return float(wins.mean()) if len(wins) else nan


def verdict(comparisons: Sequence[Comparison], pairs: pd.DataFrame, known: dict[str, Group]) -> str:
    """What the numbers say about the claim, in words."""
    sentences = []
    for kind in dict.fromkeys(one.kind for one in comparisons):
        pearson, spearman = (one for one in comparisons if (one.kind, one.name) == (kind, "as defined"))
        sentences.append(
            f"{KINDS[kind]}: importances of one expert on different images correlate with {pearson.same_model:.2f} "
            f"(ranks: {spearman.same_model:.2f}), those of different experts on the same images with "
            f"{pearson.same_images:.2f} ({spearman.same_images:.2f})."
        )
    sentences.append(f"The direction of the claim: {direction(comparisons)}.")
    sharp, count = sum(one.high_against_low for one in comparisons), len(comparisons)
    held = f"all {count}" if sharp == count else f"{sharp} of {count}" if sharp else f"none of {count}"
    sentences.append(f"“High” (here: at least {HIGH}) against “low” (at most {LOW}) holds in {held}.")
    return " ".join([*sentences, *units_and_inputs(pairs, known)])


def direction(comparisons: Sequence[Comparison]) -> str:
    """Whether one expert on different images correlates more than different experts on the same images."""
    count = len(comparisons)
    verdicts = [one.verdict for one in comparisons]
    more = f"one expert correlates more in {sum(one.difference > 0 for one in comparisons)} of {count} comparisons"
    if "no interval" in verdicts:
        return f"{more}; these are too few experts to say how sure that is"
    yes, no = verdicts.count("yes"), verdicts.count("no, the reverse")
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
