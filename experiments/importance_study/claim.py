"""What follows from the correlations: one expert on different images against different experts on the same images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import isnan, nan, sqrt
from statistics import fmean, stdev

from scipy import stats

from importance_study.pairs import ALL, BY_INPUT, BY_UNIT, COEFFICIENTS, KINDS, Group, ImportanceName, PairRow

HIGH, LOW = 0.7, 0.3
COMPARED = {"as defined": ("model", "fixed"), "users alone, any images": ("users", "images")}


@dataclass(frozen=True)
class Comparison:
    """Whether pairs of one expert correlate more than pairs on the same images.

    Attributes:
        kind: ``mas`` or ``fisher``.
        coefficient: ``pearson`` or ``spearman``.
        name: Which pairs are compared.
        same_model: Mean over the pairs of one expert.
        same_images: Mean over the pairs of different experts on the same images.
        difference: Of the two.
        low: Lower end of its 95 % interval; NaN where there is none.
        high: Upper end.
        above: How often a random pair of one expert correlates more than a random pair on the same images.
    """

    kind: ImportanceName
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
        """``yes``, ``no``, or that it is not clear."""
        if isnan(self.low):
            return "no interval"
        return "yes" if self.low > 0 else "no, the reverse" if self.high < 0 else "not clear"

    @property
    def high_against_low(self) -> bool:
        """Whether the first is high and the second is low, as the claim puts it."""
        return self.same_model >= HIGH and self.same_images <= LOW


def mean_of(rows: Sequence[PairRow], coefficient: str) -> float:
    """Mean correlation; NaN without any."""
    values = [value for value in (getattr(row, coefficient) for row in rows) if not isnan(value)]
    return fmean(values) if values else nan


def compare(rows: Sequence[PairRow], known: dict[str, Group]) -> list[Comparison]:
    """One expert on different images against different experts on the same images, for all parameters.

    The pairs are not independent: those of one expert share it, and those of a seed share everything. So with three
    sets of experts or more, the interval is that of a paired t-test over sets; with fewer, that of a jackknife over
    experts, each of which is left out with all its pairs. Neither knows of other users.

    Args:
        rows: Of one reduction.
        known: See :func:`groups`.
    """
    found = []
    for kind in dict.fromkeys(row.kind for row in rows):
        here = [row for row in rows if row.kind == kind and row.parameters == ALL]
        for name, (model, images) in COMPARED.items():
            chosen = [[row for row in here if row in known[group]] for group in (model, images)]
            if not all(chosen):
                continue
            for coefficient in COEFFICIENTS:
                first, second = (mean_of(group, coefficient) for group in chosen)
                low, high = interval(chosen, coefficient)
                above = share_above(chosen, coefficient)
                found.append(Comparison(kind, coefficient, name, first, second, first - second, low, high, above))
    return found


def interval(chosen: Sequence[Sequence[PairRow]], coefficient: str) -> tuple[float, float]:
    """The 95 % interval of the difference between the means of two groups of pairs, see :func:`compare`."""

    def difference(keep: Callable[[PairRow], bool] = lambda row: True) -> float:
        first, second = (mean_of([row for row in group if keep(row)], coefficient) for group in chosen)
        return first - second

    sets = sorted({row.experts for group in chosen for row in group})
    if len(sets) >= 3:
        values = [difference(partial(_of_set, one)) for one in sets]
        middle, error = fmean(values), stdev(values) / sqrt(len(values))
    else:
        experts = sorted({expert for group in chosen for row in group for expert in _experts(row)})
        if len(experts) < 3 * len(sets):
            return nan, nan
        values = [difference(partial(_without, expert)) for expert in experts]
        middle, count = difference(), len(values)
        error = sqrt((count - 1) / count * sum((value - fmean(values)) ** 2 for value in values))
    half = error * float(stats.t.ppf(0.975, len(values) - 1))
    return middle - half, middle + half


def _of_set(experts: str, row: PairRow) -> bool:
    return row.experts == experts


def _without(expert: tuple[str, str], row: PairRow) -> bool:
    return expert not in _experts(row)


def _experts(row: PairRow) -> list[tuple[str, str]]:
    return [(row.experts, row.first_expert), (row.experts, row.second_expert)]


def share_above(chosen: Sequence[Sequence[PairRow]], coefficient: str) -> float:
    """How often a random pair of the first group is above a random pair of the second, of the same experts."""
    wins = total = 0
    for one in {row.experts for row in chosen[0]}:
        here = [[getattr(row, coefficient) for row in group if row.experts == one] for group in chosen]
        first, second = ([value for value in values if not isnan(value)] for values in here)
        wins += sum(a > b for a in first for b in second)
        total += len(first) * len(second)
    return wins / total if total else nan


def verdict(comparisons: Sequence[Comparison], rows: Sequence[PairRow], known: dict[str, Group]) -> str:
    """What the numbers say of the claim, in words."""
    sentences = []
    for kind in dict.fromkeys(one.kind for one in comparisons):
        pearson, spearman = (
            next(c for c in comparisons if (c.kind, c.coefficient, c.name) == (kind, coefficient, "as defined"))
            for coefficient in COEFFICIENTS
        )
        sentences.append(
            f"{KINDS[kind]}: importances of one expert on different images correlate with {pearson.same_model:.2f} "
            f"(ranks: {spearman.same_model:.2f}), those of different experts on the same images with "
            f"{pearson.same_images:.2f} ({spearman.same_images:.2f})."
        )
    sentences.append(f"The direction of the claim: {direction(comparisons)}.")
    sharp, count = sum(one.high_against_low for one in comparisons), len(comparisons)
    held = f"all {count}" if sharp == count else f"{sharp} of {count}" if sharp else f"none of {count}"
    sentences.append(f"“High” (here: at least {HIGH}) against “low” (at most {LOW}) holds in {held}.")
    return " ".join([*sentences, *units_and_inputs(rows, known)])


def direction(comparisons: Sequence[Comparison]) -> str:
    """Whether one expert on different images correlates more than different experts on the same."""
    count = len(comparisons)
    tested = [one for one in comparisons if one.verdict != "no interval"]
    yes, no = (sum(one.verdict == word for one in tested) for word in ("yes", "no, the reverse"))
    more = f"one expert correlates more in {sum(one.difference > 0 for one in comparisons)} of {count} comparisons"
    if len(tested) < count:
        return f"{more}; these are too few experts to say how sure that is"
    if yes == count:
        return f"it holds in all {count} comparisons: importances describe the model more than the data"
    return f"{more}, beyond its uncertainty in {yes}" + (f"; the reverse holds in {no}" if no else "")


def units_and_inputs(rows: Sequence[PairRow], known: dict[str, Group]) -> Iterator[str]:
    """Which side wins where matrices are summed by unit, and by input."""
    for ending, winner, sign in ((BY_UNIT, "one expert correlates", 1), (BY_INPUT, "the same images correlate", -1)):
        differences = []
        for kind in dict.fromkeys(row.kind for row in rows):
            for name in dict.fromkeys(row.parameters for row in rows if row.parameters.endswith(ending)):
                here = [row for row in rows if (row.kind, row.parameters) == (kind, name)]
                for model, images in COMPARED.values():
                    groups = [[row for row in here if row in known[group]] for group in (model, images)]
                    differences += [mean_of(groups[0], c) - mean_of(groups[1], c) for c in COEFFICIENTS]
        differences = [value for value in differences if not isnan(value)]
        if differences:
            wins = sum(sign * value > 0 for value in differences)
            yield f"Summed {ending}, {winner} more in {wins} of {len(differences)}."
