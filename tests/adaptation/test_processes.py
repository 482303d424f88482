"""Statistics of several processes."""

import pytest
from adaptation_cases import assert_close, made, naive_statistics

from pl_personalize.adaptation import estimate_batchnorm

# Several processes


class Reduction:
    """Sums over processes that were found out before; what one process brings, where they were not."""

    def __init__(self, totals):
        self.calls, self.totals = [], totals

    def __call__(self, total):
        k = len(self.calls)
        self.calls.append(total.clone())
        return (self.totals[k] if k < len(self.totals) else total).clone()


def both_processes(estimate):
    """Run ``estimate(rank, all_reduce)`` for both until the sums of all their reductions are known."""
    totals = []
    while True:
        runs = [Reduction(totals), Reduction(totals)]
        results = []
        for rank, run in enumerate(runs):
            try:
                results.append(estimate(rank, run))
            except ValueError as error:
                results.append(error)
        numbers = {len(run.calls) for run in runs}
        if numbers == {len(totals)}:
            return results
        k = len(totals)
        totals.append(runs[0].calls[k] + runs[1].calls[k])


@pytest.mark.parametrize("name", ["images", "rows", "used twice"])
def test_two_processes_share_the_data(name):
    model, x = made(name, 12)
    shares = [[x[0:3], x[6:9]], [x[3:6], x[9:12]]]
    results = both_processes(lambda rank, reduce: estimate_batchnorm(model, shares[rank], all_reduce=reduce))
    for found in results:
        assert_close(found, estimate_batchnorm(model, x.split(3)), 1e-12)
        assert found.num_samples == 12


@pytest.mark.filterwarnings("ignore:The forward does not reach")  # while the sums are not known
@pytest.mark.parametrize("name", ["images", "rows", "used twice"])
def test_two_processes_exactly_whatever_each_has(name):
    model, x = made(name)
    for sizes in ([6, 5], [10, 1], [11, 0]):
        shares = [[p for p in part.split(4) if len(p)] for part in x.split(sizes)]
        results = both_processes(
            lambda rank, reduce, s=shares: estimate_batchnorm(model, s[rank], exact=True, all_reduce=reduce)
        )
        for found in results:
            assert_close(found, naive_statistics(model, [x]), 1e-9)
            assert found.num_samples == 11


def test_two_processes_without_any_sample_both_refuse():
    model, _ = made("rows")
    for exact in (False, True):
        results = both_processes(
            lambda rank, reduce, e=exact: estimate_batchnorm(model, [], exact=e, all_reduce=reduce)
        )
        assert all("no samples" in str(error) for error in results)
