"""The gradients of norms equal those of the norm written out, in every memory layout."""

from itertools import permutations

import pytest
import torch
import torch.nn.functional as F

from pl_personalize.per_sample.norm_calls import right_norm_gradients


def _layouts(tensor):
    for order in permutations(range(tensor.dim())):
        yield tensor.permute(order).contiguous().permute([order.index(k) for k in range(tensor.dim())])


def _batch_norm(x, mean, variance, weight, bias):
    return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, 1e-5)


def _by_torch(x, mean, variance, weight, bias):
    return torch.batch_norm(x, weight, bias, mean, variance, False, 0.0, 1e-5, False)


def _by_name(x, mean, variance, weight, bias):
    return F.batch_norm(input=x, running_mean=mean, running_var=variance, weight=weight, bias=bias, eps=1e-5)


def _instance_norm(x, mean, variance, weight, bias):
    return F.instance_norm(x, mean, variance, weight, bias, use_input_stats=False, eps=1e-5)


def _written_out(x, mean, variance, weight, bias):
    shape = (1, -1) + (1,) * (x.dim() - 2)
    return (x - mean.view(shape)) * (weight * (variance + 1e-5).rsqrt()).view(shape) + bias.view(shape)


@pytest.mark.parametrize("norm", [_batch_norm, _by_torch, _by_name, _instance_norm])
@pytest.mark.parametrize(
    "shape", [(1, 4, 2, 3), (2, 4, 3, 1), (2, 4, 1, 3), (1, 4, 1, 1), (2, 3, 4), (1, 2, 3)], ids=str
)
def test_layouts_do_not_matter(norm, shape):
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2))
    mean, variance, weight, bias = (torch.rand(shape[1], dtype=torch.float64) + 0.5 for _ in range(4))
    weight.requires_grad_(), bias.requires_grad_()
    wanted = x.clone().requires_grad_()
    right = torch.autograd.grad(_written_out(wanted, mean, variance, weight, bias), (wanted, weight, bias), grad)

    for laid_out in _layouts(x):
        for incoming in _layouts(grad):
            inputs = (laid_out.detach().requires_grad_(), weight, bias)
            with right_norm_gradients():
                output = norm(inputs[0], mean, variance, weight, bias)
            for found, value in zip(torch.autograd.grad(output, inputs, incoming), right, strict=True):
                torch.testing.assert_close(found, value)


def test_second_derivatives():
    x = torch.randn(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    mean, variance, weight, bias = (torch.rand(3, dtype=torch.float64) + 0.5 for _ in range(4))
    with right_norm_gradients():
        assert torch.autograd.gradgradcheck(
            lambda x: _batch_norm(x, mean, variance, weight, bias).permute(0, 2, 3, 1).sin().sum(), (x,)
        )


def test_norms_under_activation_checkpointing():
    from torch.utils.checkpoint import checkpoint

    x = torch.randn(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    statistics = [torch.rand(3, dtype=torch.float64) + 0.5 for _ in range(4)]
    right = torch.autograd.grad(_written_out(x, *statistics).permute(0, 2, 3, 1).contiguous().sin().sum(), x)[0]

    with right_norm_gradients():
        output = checkpoint(lambda x: _batch_norm(x, *statistics).sin(), x, use_reentrant=False)
        found = torch.autograd.grad(output.permute(0, 2, 3, 1).flatten(1, 2).clone().sum(), x)[0]

    torch.testing.assert_close(found, right)
