"""One parameter's prefix merges against Python's floats, and what must hold for any numbers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import naive_merge

from pl_personalize.functional.merge_rule import MergeInputs
from pl_personalize.functional.merging import WeightedOptions, check_importance
from pl_personalize.functional.merging import prefix_merges as merges_of_inputs

THETAS = [torch.tensor([[1.0, -2.0], [0.5, 3.0]]), torch.tensor([[0.0, 4.0], [0.5, -1.0]]), torch.full((2, 2), 2.5)]
OMEGAS = [
    torch.tensor([[1.0, 0.0], [0.2, 0.0]]),
    torch.tensor([[3.0, 0.5], [0.0, 0.0]]),
    torch.tensor([[0, 1e-6], [2, 0]]),
]


def prefix_merges(thetas, omegas, weights, zero="mean", *, scales=None, bounds=None, start=0, out=None):
    inputs = MergeInputs(thetas, weights, omegas, scales=scales, bounds=bounds)
    return merges_of_inputs(inputs, WeightedOptions(zero), start, out)


@pytest.mark.parametrize("zero", ["mean", "reference"])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, 2.0, 7.0]])
@pytest.mark.parametrize("omegas", [OMEGAS, None], ids=["importances", "mean"])
def test_prefixes_equal_plain_python(omegas, weights, zero):
    merged = prefix_merges(THETAS, omegas, weights, zero)

    assert len(merged) == 3
    assert torch.equal(merged[0], THETAS[0])
    for t in (2, 3):
        right = naive_merge(THETAS[:t], omegas and omegas[:t], weights[:t], zero)
        torch.testing.assert_close(merged[t - 1].double(), right, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("zero", "expected"), [("mean", (2 * 3.0 - 1.0) / 3), ("reference", 0.0)])
def test_an_entry_without_any_importance(zero, expected):
    merged = prefix_merges(THETAS[:2], OMEGAS[:2], [2.0, 1.0], zero)

    assert merged[1][1, 1].item() == pytest.approx(expected)
    assert merged[0][1, 1].item() == 3.0  # the first is expert 1, whatever its importances


@pytest.mark.parametrize("start", [0, 1, 2])
def test_start_leaves_out_the_earlier_merges_and_changes_no_bit(start):
    everything = prefix_merges(THETAS, OMEGAS, [1.0] * 3)

    part = prefix_merges(THETAS, OMEGAS, [1.0] * 3, start=start)

    assert len(part) == 3 - start
    assert all(map(torch.equal, part, everything[start:]))


def test_results_are_new_and_inputs_stay():
    thetas, omegas = [t.clone() for t in THETAS], [o.clone() for o in OMEGAS]

    for merged in prefix_merges(thetas, omegas, [1.0] * 3):
        merged.fill_(99.0)

    assert all(map(torch.equal, thetas, THETAS))
    assert all(map(torch.equal, omegas, OMEGAS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_low_precision_is_accumulated_in_float32(dtype):
    """The sum of 400 ones in bfloat16 is 256."""
    thetas = [torch.full((3,), 1.0 + k % 2, dtype=dtype) for k in range(400)]

    (merged,) = prefix_merges(thetas, [torch.ones(3, dtype=dtype)] * 400, [1.0] * 400, start=399)

    assert merged.dtype == dtype
    assert merged.tolist() == [1.5] * 3


def test_float64_keeps_its_precision():
    thetas = [torch.tensor([1.0 + 1e-12], dtype=torch.float64), torch.tensor([1.0 + 3e-12], dtype=torch.float64)]

    merged = prefix_merges(thetas, [torch.ones(1)] * 2, [1.0, 1.0])[1]

    assert merged.item() == pytest.approx(1.0 + 2e-12, rel=0, abs=1e-15)


@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e-6, 1e6, 1e30, 1e38])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_the_scale_of_the_importances_does_not_matter(scale, size):
    """Squared gradients of a confident expert go down to 1e-38; float32 itself must not run out."""
    omegas = [torch.tensor([0.5, 2.0]), torch.tensor([2.0, 1.0])]
    thetas = [torch.tensor([1.0, 1.0]) * size, torch.tensor([3.0, 1.0]) * size]
    right = naive_merge(thetas, omegas)

    merged = prefix_merges(thetas, [omega * scale for omega in omegas], [1.0, 1.0])[1]

    torch.testing.assert_close(merged.double(), right, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scales", [(1.0, 1.0), (1e-30, 1.0), (1.0, 1e30), (1e38, 1e38)])
@pytest.mark.parametrize("empty", [0, 1, 3])
def test_bounds_that_are_known_change_no_bit(scales, empty):
    omegas = [torch.tensor([0.0] * empty + [2.0, 0.5, 1.0]) * scale for scale in scales]
    thetas = [torch.arange(3.0 + empty) + k for k in range(2)]
    bounds = [check_importance("w", omega) for omega in omegas]

    looked = prefix_merges(thetas, omegas, [1.0, 1.0])
    known = prefix_merges(thetas, omegas, [1.0, 1.0], bounds=bounds)

    assert all(map(torch.equal, looked, known))
    torch.testing.assert_close(known[1].double(), naive_merge(thetas, omegas), rtol=1e-6, atol=0)


@pytest.mark.parametrize("zero", ["mean", "reference"])
@pytest.mark.parametrize("smallest", [1e-38, 1e-30, 1e-6])
def test_entries_without_importance_beside_small_ones(smallest, zero):
    omegas = [torch.tensor([0.0, smallest, 0.0, 1.0]), torch.tensor([0.0, 3 * smallest, 0.0, 1.0])]
    thetas = [torch.tensor([1.0, 2.0, -3.0, 4.0]), torch.tensor([2.0, 6.0, 5.0, 8.0])]

    for merged in prefix_merges([*thetas, thetas[0]], [*omegas, omegas[0] * 0], [1.0] * 3, zero)[1:2]:
        torch.testing.assert_close(merged.double(), naive_merge(thetas, omegas, [1.0, 1.0], zero), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scales", [(1.0, 1e-30), (1e-30, 1.0), (1.0, 1e42), (1e42, 1.0)])
@pytest.mark.parametrize("unit", [1e-25, 1.0])
def test_factors_of_any_size_make_no_importance_disappear(scales, unit):
    thetas = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 8.0, 5.0])]
    omegas = [torch.tensor([0.0, unit, 0.0]), torch.tensor([unit, 0.0, 0.0])]

    merged = prefix_merges(thetas, omegas, [1.0, 1.0], scales=scales)[1]

    assert merged.tolist() == [4.0, 2.0, 4.0]


@pytest.mark.parametrize("zero", ["mean", "reference"])
def test_importances_in_float64_keep_its_range(zero):
    thetas = [torch.tensor([1.0, 2.0]), torch.tensor([4.0, 8.0])]
    omegas = [torch.tensor([1e-50, 0.0], dtype=torch.float64), torch.tensor([3e-50, 0.0], dtype=torch.float64)]

    merged = prefix_merges(thetas, omegas, [1.0, 1.0], zero)[1]

    assert merged.tolist() == pytest.approx([3.25, 5.0 if zero == "mean" else 0.0])


# Away from the ends of float32's range, which the test above has.
_SIZES = st.just(0.0) | st.floats(2.0**-20, 2.0**20, width=32)
_ENTRIES = _SIZES | _SIZES.map(lambda value: -value)


@st.composite
def _columns(draw):
    """Experts, importances and weights of one parameter."""
    experts, entries = draw(st.integers(1, 4)), draw(st.integers(1, 5))

    def rows(values):
        row = st.lists(values, min_size=entries, max_size=entries).map(torch.tensor)
        return draw(st.lists(row, min_size=experts, max_size=experts))

    weights = draw(st.lists(st.floats(0.01, 100), min_size=experts, max_size=experts))
    return rows(_ENTRIES), rows(_SIZES), weights


@given(_columns(), st.integers(-20, 20))
def test_scaling_all_importances_by_a_power_of_two_changes_no_bit(columns, exponent):
    thetas, omegas, weights = columns

    merged = prefix_merges(thetas, omegas, weights)
    scaled = prefix_merges(thetas, [omega * 2.0**exponent for omega in omegas], weights)

    assert all(map(torch.equal, merged, scaled))


@given(_columns(), st.sampled_from(["mean", "reference"]))
def test_any_numbers_equal_plain_python(columns, zero):
    """So they lie between the experts', and in whatever order these are."""
    thetas, omegas, weights = columns
    slack = 8 * torch.finfo(torch.float32).eps * torch.stack(thetas).abs().amax(0)

    for t, merged in enumerate(prefix_merges(thetas, omegas, weights, zero, start=1), start=2):
        assert ((merged - naive_merge(thetas[:t], omegas[:t], weights[:t], zero)).abs() <= slack).all()


@pytest.mark.parametrize("zero", ["mean", "reference"])
@pytest.mark.parametrize("weighted", [True, False], ids=["importances", "mean"])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.complex64, 1e-6), (torch.complex128, 1e-14)])
def test_complex_parameters_equal_the_formula(dtype, rtol, weighted, zero):
    generator = torch.Generator().manual_seed(0)
    thetas = [torch.randn(3, 4, dtype=torch.complex128, generator=generator).to(dtype) for _ in range(3)]
    omegas = [torch.rand(3, 4, dtype=torch.float64, generator=generator) for _ in thetas] if weighted else None
    for omega in omegas or ():
        omega[0, 1] = 0.0  # important to nobody
    weights = [0.5, 2.0, 7.0]

    merged = prefix_merges(thetas, omegas, weights, zero)

    assert torch.equal(merged[0], thetas[0])
    for t in (2, 3):
        masses = [w * (omegas[k] if weighted else torch.ones(3, 4).double()) for k, w in enumerate(weights[:t])]
        right = sum(m * theta.to(torch.complex128) for m, theta in zip(masses, thetas, strict=False)) / sum(masses)
        if weighted:
            mean = sum(w * theta[0, 1].item() for w, theta in zip(weights[:t], thetas, strict=False)) / sum(weights[:t])
            right[0, 1] = mean if zero == "mean" else 0.0
        assert merged[t - 1].dtype == dtype
        torch.testing.assert_close(merged[t - 1].to(torch.complex128), right, rtol=rtol, atol=rtol)


def test_complex_parameters_of_any_layout():
    """Conjugated lazily, strided, transposed and without an entry."""
    theta = torch.randn(6, 4, dtype=torch.complex64)
    for view in (theta.conj(), theta[:, 0], theta.T, theta[:0], theta[0, 0]):
        other = torch.randn(view.shape, dtype=torch.complex64)

        merged = prefix_merges([view, other], None, [1.0, 3.0], start=1)[0]

        assert merged.shape == view.shape
        assert not merged.is_conj()
        torch.testing.assert_close(merged, (view + 3 * other) / 4)


def test_a_complex_parameter_may_be_overwritten():
    thetas = [torch.randn(5, dtype=torch.complex64) for _ in range(2)]
    omegas = [torch.rand(5) for _ in range(2)]
    right = prefix_merges(thetas, omegas, [1.0, 1.0], start=1)[0]

    merged = prefix_merges(thetas, omegas, [1.0, 1.0], start=1, out=[thetas[0]])[0]

    assert merged is thetas[0]
    assert torch.equal(merged, right)


def test_complex_and_real_parameters_do_not_mix():
    with pytest.raises(ValueError, match="complex in some experts and real in others"):
        prefix_merges([torch.ones(2), torch.ones(2, dtype=torch.complex64)], None, [1.0, 1.0])


def test_a_complex_importance_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'w' is torch.complex64; importances are real"):
        check_importance("w", torch.ones(2, dtype=torch.complex64))
