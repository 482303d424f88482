"""The penalty's gradient, against autograd on the penalty itself and by hand."""

import pytest
import torch

from pl_personalize.functional.penalties import add_l2_gradient_

SHAPES = [(3, 2), (4,), (), (0,)]


def _parameters(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, dtype=dtype, generator=generator)) for shape in SHAPES]


@pytest.mark.parametrize("strength", [0.0, 0.001, 1.0, 7.5])
def test_equals_autograd_of_the_penalty_added_to_the_loss(strength):
    parameters, anchors = _parameters(), [p.detach() for p in _parameters(seed=1)]
    loss = sum(p.sin().sum() for p in parameters)
    penalty = strength * sum((p - a).square().sum() for p, a in zip(parameters, anchors, strict=True))
    right = torch.autograd.grad(loss + penalty, parameters, retain_graph=True)
    values, references = [p.detach().clone() for p in parameters], [a.clone() for a in anchors]
    loss.backward()

    add_l2_gradient_(parameters, anchors, strength)

    for parameter, gradient in zip(parameters, right, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-12)
    assert all(map(torch.equal, parameters, values))
    assert all(map(torch.equal, anchors, references))


def test_there_is_no_factor_of_one_half():
    parameter = torch.nn.Parameter(torch.tensor([1.0, 3.0]))
    parameter.grad = torch.tensor([10.0, 0.0])

    add_l2_gradient_([parameter], [torch.tensor([0.0, 5.0])], strength=0.5)

    assert parameter.grad.tolist() == [11.0, -2.0]


def test_the_gradient_is_changed_in_place_and_outside_of_any_graph():
    parameter = torch.nn.Parameter(torch.ones(3))
    gradient = parameter.grad = torch.zeros(3)

    add_l2_gradient_([parameter], [torch.zeros(3)], strength=1.0)

    assert parameter.grad is gradient
    assert gradient.tolist() == [2.0, 2.0, 2.0]
    assert not gradient.requires_grad


def test_parameters_without_a_gradient_are_left_alone():
    first, second, third = (torch.nn.Parameter(torch.full((2,), 2.0)) for _ in range(3))
    first.grad, third.grad = torch.zeros(2), torch.ones(2)

    add_l2_gradient_([first, second, third], [torch.zeros(2), torch.ones(2), torch.full((2,), 2.0)], strength=1.0)

    assert second.grad is None
    assert (first.grad.tolist(), third.grad.tolist()) == ([4.0, 4.0], [1.0, 1.0])


def test_nothing_to_do():
    parameter = torch.nn.Parameter(torch.ones(1))

    add_l2_gradient_([], [], strength=1.0)
    add_l2_gradient_([parameter], [torch.zeros(1)], strength=1.0)

    assert parameter.grad is None


def test_one_anchor_for_each_parameter():
    parameter = torch.nn.Parameter(torch.ones(1))
    parameter.grad = torch.zeros(1)

    with pytest.raises(ValueError, match="shorter"):
        add_l2_gradient_([parameter, parameter], [torch.zeros(1)], strength=1.0)

    assert parameter.grad.tolist() == [0.0]
