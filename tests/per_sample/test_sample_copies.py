"""Copies of parameters for each sample: in the right place, of the right shape, and gone afterwards."""

import pytest
import torch
from torch import nn

from pl_personalize.per_sample.sample_copies import SampleCopies


class Holder(nn.Module):
    """Something with a parameter."""

    def __init__(self, *shape):
        super().__init__()
        self.p = nn.Parameter(torch.arange(float(torch.Size(shape).numel())).reshape(shape))


# The parameter's shape, and those of its copies for 5 samples, in the order in which they are tried.
SHAPES = [
    ((1, 7, 3), [(5, 7, 3)]),
    ((1, 1, 3), [(5, 1, 3), (1, 5, 3)]),
    ((7, 1, 3), [(7, 5, 3)]),
    ((3, 1, 1), [(3, 5, 1), (5, 3, 1, 1), (5, 1, 3, 1, 1), (5, 1, 1, 3, 1, 1)]),
    ((4,), [(5, 4), (5, 1, 4), (5, 1, 1, 4)]),
    ((), [(5,), (5, 1), (5, 1, 1), (5, 1, 1, 1)]),
    ((7, 3), []),
]


@pytest.mark.parametrize(("shape", "copies"), SHAPES, ids=str)
def test_shapes_are_tried_in_order_and_then_given_up(shape, copies):
    module = Holder(*shape)
    found, tried = SampleCopies({(module, "p"): "holder.p"}), []
    while found.names:
        found.start(5, lambda tensor: tensor.requires_grad_())
        tried.append(tuple(module.p.shape))
        for row in module.p.unbind(tried[-1].index(5)):
            assert torch.equal(row.flatten(), module._parameters["p"].flatten())
        found.stop()
        assert module.p is module._parameters["p"]
        assert found.try_next(["holder.p"])
    assert tried == copies
    assert not found.try_next(["holder.p"])


def test_gradients_come_with_the_name_and_the_dimension_of_the_samples():
    module, seen = Holder(1, 3), []
    copies = SampleCopies({(module, "p"): "holder.p"})
    copies.start(4, lambda tensor: tensor.requires_grad_(), lambda *found: seen.append(found))
    (module.p * torch.arange(4.0)[:, None]).sum().backward()
    copies.stop()

    ((name, dim, gradient),) = seen
    assert (name, dim) == ("holder.p", 0)
    assert gradient.tolist() == [[k] * 3 for k in range(4)]


def test_places_that_are_alike_go_together():
    first, second, other = Holder(1, 3), Holder(1, 3), nn.PReLU()
    copies = SampleCopies({(first, "p"): "a", (second, "p"): "b", (other, "weight"): "c"})

    assert [list(places.values()) for places in copies.alike()] == [["a", "b"], ["c"]]
    copies.start(2, lambda tensor: tensor, only=copies.alike()[0])
    assert (first.p.shape, second.p.shape, other.weight.shape) == ((2, 3), (2, 3), (1,))
    copies.stop()
