"""Sketches: small tensors themselves, large ones in a few directions, and distances of the right size."""

import pytest
import torch

from pl_personalize.per_sample.comparison import Sketch

SHAPES = [(), (0,), (7,), (3, 5), (4, 3, 2, 2), (300, 400), (1000, 100), (70_000,), (5, 70_000), (64, 32, 8, 8)]


def _of(*tensors, power=1):
    sketch = Sketch(tensors[0].shape, torch.float64, torch.device("cpu"))
    return sketch, [sketch.add(tensor, power) for tensor in tensors]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("power", [1, 2])
def test_equal_sums_are_no_distance_apart(shape, power):
    torch.manual_seed(0)
    a, b = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    total = a.abs() ** power + b.abs() ** power

    (parts, norms), (whole, _) = _of(a, b, power=power), _of(total)

    assert parts.distance(whole) <= 1e-12 * (1 + float(total.norm()))
    assert norms == pytest.approx([float((t.abs() ** power).norm()) for t in (a, b)])


@pytest.mark.parametrize("shape", [s for s in SHAPES if 0 not in s and s != ()], ids=str)
@pytest.mark.parametrize("kind", ["everywhere", "one entry", "one row", "a factor"])
def test_a_difference_is_seen_at_about_its_size(shape, kind):
    torch.manual_seed(1)
    a = torch.rand(shape, dtype=torch.float64) + 1
    b = a.clone()
    if kind == "everywhere":
        b += 0.1 * torch.rand_like(b)
    elif kind == "one entry":
        b.view(-1)[b.numel() // 2] += 3.0
    elif kind == "one row":
        b[-1] *= 1.5
    else:
        b *= 1.01

    distance = _of(a)[0].distance(_of(b)[0])

    assert distance == pytest.approx(float((a - b).norm()), rel=0.95)
    assert distance > 0.05 * float((a - b).norm())
