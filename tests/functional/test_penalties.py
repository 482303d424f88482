"""The penalty's gradient, against autograd on the penalty itself and by hand."""

import pytest
import torch

from pl_personalize.functional import penalties
from pl_personalize.functional.penalties import add_l2_gradient_, add_penalty_gradient_, quadratic_penalty

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


# With importances


def _importances(dtype=torch.float64, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(shape, dtype=dtype, generator=generator) for shape in SHAPES]


def _naive_penalty(parameters, anchors, importances, strength):
    """One entry at a time."""
    total = 0.0
    for k, (parameter, anchor) in enumerate(zip(parameters, anchors, strict=True)):
        omega = torch.ones_like(anchor) if importances is None else importances[k]
        for p, a, o in zip(parameter.flatten(), anchor.flatten(), omega.flatten(), strict=True):
            total = total + strength * o * (p - a) ** 2
    return total


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("strength", [0.0, 0.001, 400.0])
def test_value_and_gradient_equal_those_of_the_formula(strength, weighted):
    parameters, anchors = _parameters(), [p.detach() for p in _parameters(seed=1)]
    importances = _importances() if weighted else None
    loss = sum(p.sin().sum() for p in parameters)
    penalty = _naive_penalty(parameters, anchors, importances, strength)
    right = torch.autograd.grad(loss + penalty, parameters, retain_graph=True)
    before = [t.clone() for t in [*(p.detach() for p in parameters), *anchors, *(importances or [])]]
    loss.backward()

    value = quadratic_penalty(parameters, anchors, importances, strength)
    add_penalty_gradient_(parameters, anchors, importances, strength)

    assert value.shape == ()
    torch.testing.assert_close(value, penalty, rtol=1e-12, atol=1e-12)
    through_autograd = torch.autograd.grad(value, parameters)
    through_formula = torch.autograd.grad(penalty, parameters, allow_unused=True, materialize_grads=True)
    for parameter, gradient in zip(parameters, right, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-12)
    for mine, gradient in zip(through_autograd, through_formula, strict=True):
        torch.testing.assert_close(mine, gradient, rtol=1e-12, atol=1e-12)
    after = [*(p.detach() for p in parameters), *anchors, *(importances or [])]
    assert all(map(torch.equal, before, after))


def test_a_parameter_without_a_gradient_gets_one_and_a_frozen_one_does_not():
    idle, frozen = (torch.nn.Parameter(torch.full((2,), 3.0), requires_grad=needs) for needs in (True, False))
    add_penalty_gradient_([idle, frozen], [torch.ones(2)] * 2, [torch.tensor([1.0, 0.5])] * 2, strength=2.0)
    assert idle.grad.tolist() == [8.0, 4.0]
    assert frozen.grad is None


def test_what_has_a_gradient_and_is_frozen_is_left_alone():
    frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    frozen.grad = torch.tensor([5.0, 6.0])
    add_penalty_gradient_([frozen], [torch.zeros(2)])
    assert frozen.grad.tolist() == [5.0, 6.0]


def test_a_sparse_gradient_becomes_dense():
    """As a backward pass through the penalty would make it."""
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    anchor = torch.zeros(4, 2)
    loss = embedding(torch.tensor([1, 1, 3])).square().sum()
    right = torch.autograd.grad(loss, [embedding.weight], retain_graph=True)[0].to_dense() + 2 * embedding.weight
    loss.backward()
    assert embedding.weight.grad.is_sparse
    add_penalty_gradient_([embedding.weight], [anchor])
    torch.testing.assert_close(embedding.weight.grad, right.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_importances_of_half_precision_parameters(dtype):
    """In float32, where Ω of 1e-9 is not zero and neither is what it adds."""
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=dtype))
    anchor, omega = torch.tensor([0.5, -1.0, 3.0], dtype=dtype), torch.tensor([1e-9, 2e-9, 1e-9])
    parameter.grad = torch.zeros_like(parameter)
    add_penalty_gradient_([parameter], [anchor], [omega], strength=1e8)
    torch.testing.assert_close(parameter.grad, torch.tensor([0.1, -0.4, 0.0], dtype=dtype))
    value = quadratic_penalty([parameter], [anchor], [omega], strength=1e8)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(0.225)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("weighted", [True, False])
def test_at_the_anchor_the_gradient_keeps_every_bit(dtype, weighted):
    """Adding 2λθ and then −2λθ would not."""
    parameter = torch.nn.Parameter(torch.tensor([1.1, -7.3, 1234.5], dtype=dtype))
    gradient = torch.tensor([1e-3, 2.2e-5, -3.3e-7], dtype=dtype)
    parameter.grad = gradient.clone()
    omega = [torch.full((3,), 0.7, dtype=dtype)] if weighted else None
    add_penalty_gradient_([parameter], [parameter.detach().clone()], omega, strength=3.3)
    assert torch.equal(parameter.grad, gradient)


def test_l2_is_the_penalty_without_importances():
    parameters, anchors = _parameters(), [p.detach() for p in _parameters(seed=1)]
    others = _parameters()
    for parameter in [*parameters, *others]:
        parameter.grad = torch.ones_like(parameter)
    add_l2_gradient_(parameters, anchors, 0.3)
    add_penalty_gradient_(others, anchors, None, 0.3)
    for parameter, other in zip(parameters, others, strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weighted", [True, False])
def test_all_at_once_as_on_gpus_is_the_same(weighted):
    parameters, anchors = _parameters(torch.float32), [p.detach() for p in _parameters(torch.float32, seed=1)]
    factors = _importances(torch.float32) if weighted else None
    others = [p.detach().clone() for p in parameters]
    for p in (*parameters, *others):
        p.grad = torch.ones_like(p)
    add_penalty_gradient_(parameters, anchors, factors, 0.3)
    penalties._add_differences(others, anchors, factors, 0.3)
    assert all(torch.equal(p.grad, other.grad) for p, other in zip(parameters, others, strict=True))


def test_the_penalty_of_nothing():
    assert quadratic_penalty([], [], [], 2.0).item() == 0
    add_penalty_gradient_([], [])


@pytest.mark.parametrize("function", [quadratic_penalty, add_penalty_gradient_])
@pytest.mark.parametrize(
    ("anchors", "importances", "message"),
    [
        ([], None, "2 parameters need as many anchors; got 0"),
        ([torch.zeros(3), torch.zeros(2)], [torch.zeros(3)], "2 parameters need as many importances; got 1"),
        ([torch.zeros(3), torch.zeros(3)], None, r"Number 1 of the anchors is \(3,\); its parameter is \(2,\)"),
        ([torch.zeros(3), torch.zeros(2)], [torch.zeros(1), torch.zeros(2)], r"Number 0 of the importances is \(1,\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(function, anchors, importances, message):
    """Also those that would broadcast."""
    parameters = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match=message):
        function(parameters, anchors, importances, 1.0)
    assert all(p.grad is None for p in parameters)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_parameters(dtype, weighted):
    """The distance is that in the plane: real and imaginary part are pulled as two real parameters."""
    generator = torch.Generator().manual_seed(0)
    parts, anchor = (torch.randn(3, 4, 2, dtype=torch.float64, generator=generator) for _ in range(2))
    omega = torch.rand(3, 4, dtype=torch.float64, generator=generator)
    parts.requires_grad_()
    factor = omega if weighted else torch.ones_like(omega)
    right = 0.5 * (factor[..., None] * (parts - anchor) ** 2).sum()
    (gradient,) = torch.autograd.grad(right, parts)
    parameter = torch.nn.Parameter(torch.view_as_complex(parts.detach()).to(dtype))
    arguments = (
        [parameter],
        [torch.view_as_complex(anchor).to(dtype)],
        [omega.to(dtype.to_real())] if weighted else None,
    )

    value = quadratic_penalty(*arguments, strength=0.5)
    add_penalty_gradient_(*arguments, strength=0.5)

    assert value.dtype == dtype.to_real()
    torch.testing.assert_close(value.double(), right.detach(), rtol=1e-6, atol=1e-6)
    (through_autograd,) = torch.autograd.grad(value, parameter)
    for mine in (parameter.grad, through_autograd):
        torch.testing.assert_close(torch.view_as_real(mine).double(), gradient, rtol=1e-6, atol=1e-6)


def test_a_complex_parameter_beside_a_real_one_and_at_its_anchor():
    parameters = [torch.tensor([1 + 2j], requires_grad=True), torch.tensor([3.0], requires_grad=True)]

    value = quadratic_penalty(parameters, [torch.tensor([0j]), torch.tensor([1.0])])
    at_the_anchor = quadratic_penalty(parameters[:1], [parameters[0].detach()])

    assert value.item() == 9.0
    assert torch.autograd.grad(at_the_anchor, parameters[0])[0].tolist() == [0j]


@pytest.mark.parametrize("function", [quadratic_penalty, add_penalty_gradient_])
def test_what_has_to_be_real_is_refused_by_its_number(function):
    real, complex_one = torch.ones(2), torch.ones(2, dtype=torch.complex64)
    with pytest.raises(ValueError, match=r"Number 1 of the anchors is torch.complex64.*its parameter is torch.float32"):
        function([complex_one, real], [complex_one, complex_one])
    with pytest.raises(ValueError, match=r"Number 0 of the importances is torch.complex64, but must be real"):
        function([complex_one], [complex_one], [complex_one])
