"""Quadratic penalties on the distance to earlier parameters: value and gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def quadratic_penalty(
    parameters: Sequence[Tensor],
    anchors: Sequence[Tensor],
    importances: Sequence[Tensor] | None = None,
    strength: float = 1.0,
) -> Tensor:
    r"""The penalty :math:`\lambda \sum_p \Omega_p |\theta_p - \theta^\mathrm{ref}_p|^2`, without a factor 1/2.

    The sum is over all entries of all parameters. With importances it is EWC (Kirkpatrick et al., PNAS 2017, who write
    λ/2: their λ is twice this one) or MAS (Aljundi et al., ECCV 2018); without, L2-transfer (Lee et al., NeurIPS 2017).
    The convention is that of De Lange et al., CVPR 2020.

    Args:
        parameters: Real or complex tensors of any shapes.
        anchors: θ_ref, of the same shapes; real for real parameters.
        importances: Ω, real, of the same shapes; ``None``: 1 everywhere.
        strength: λ.

    Returns:
        A real scalar, differentiable in all inputs that need a gradient; float32 for parameters of lower precision.

    Raises:
        ValueError: If the numbers of tensors or their shapes differ, or a tensor is complex that must be real.

    Example:
        >>> theta, reference, omega = torch.tensor([1.0, 3.0]), torch.tensor([0.0, 5.0]), torch.tensor([2.0, 1.0])
        >>> quadratic_penalty([theta], [reference], [omega], strength=0.5)
        tensor(3.)
    """
    _check_shapes(parameters, anchors, importances)
    total: Tensor | None = None
    for k, (parameter, anchor) in enumerate(zip(parameters, anchors, strict=True)):
        precision = torch.promote_types(parameter.dtype, torch.float32)
        difference = parameter.to(precision) - anchor.to(precision)
        squares = torch.view_as_real(difference).square().sum(-1) if difference.is_complex() else difference.square()
        term = (squares if importances is None else importances[k] * squares).sum()
        total = term if total is None else total + term.to(total.device)
    return torch.zeros(()) if total is None else strength * total


@torch.no_grad()
def add_penalty_gradient_(
    parameters: Sequence[Tensor],
    anchors: Sequence[Tensor],
    importances: Sequence[Tensor] | None = None,
    strength: float = 1.0,
) -> None:
    r"""Add :math:`2 \lambda \Omega (\theta - \theta_\mathrm{ref})`, the penalty's gradient, to ``.grad`` in place.

    Equals a backward pass through :func:`quadratic_penalty`, without a graph: a missing gradient is created, a sparse
    one becomes dense, and parameters that need no gradient are skipped. The gradient of a complex parameter is the
    direction of steepest ascent, as everywhere in PyTorch.

    Arguments and errors are those of :func:`quadratic_penalty`. Parameters are leaf tensors; anchors have their types
    and devices, importances their devices, and float32 if need be for parameters of half precision.

    Example:
        >>> theta = torch.tensor([1.0, 3.0], requires_grad=True)
        >>> theta.grad = torch.tensor([10.0, 0.0])
        >>> add_penalty_gradient_([theta], [torch.tensor([0.0, 5.0])], [torch.tensor([2.0, 1.0])], strength=0.5)
        >>> theta.grad
        tensor([12., -2.])
    """
    _check_shapes(parameters, anchors, importances)
    pulled = [k for k, parameter in enumerate(parameters) if parameter.requires_grad]
    if not pulled:
        return
    # On a CPU, one at a time: a small difference is still in cache when it is added.
    for part in [[k] for k in pulled] if parameters[pulled[0]].device.type == "cpu" else [pulled]:
        factors = None if importances is None else [importances[k] for k in part]
        _add_differences([parameters[k] for k in part], [anchors[k] for k in part], factors, strength)


@torch.no_grad()
def add_l2_gradient_(parameters: Sequence[Tensor], anchors: Sequence[Tensor], strength: float) -> None:
    r"""Add the gradient of :math:`\lambda \|\theta - \theta_\mathrm{ref}\|^2`, without a factor 1/2, to ``.grad``.

    Like :func:`add_penalty_gradient_` without importances, but in two fused additions without temporary tensors; the
    results differ by rounding. L2-transfer of Lee et al., NeurIPS 2017, in the convention of De Lange et al., CVPR
    2020. Parameters whose ``.grad`` is ``None`` are skipped.
    """
    pulled = [(p, a) for p, a in zip(parameters, anchors, strict=True) if p.grad is not None]
    if not pulled:
        return
    gradients = [p.grad for p, _ in pulled if p.grad is not None]
    torch._foreach_add_(gradients, [p.detach() for p, _ in pulled], alpha=2 * strength)
    torch._foreach_add_(gradients, [a for _, a in pulled], alpha=-2 * strength)


def _check_shapes(
    parameters: Sequence[Tensor], anchors: Sequence[Tensor], importances: Sequence[Tensor] | None
) -> None:
    for what, tensors in (("anchors", anchors), ("importances", parameters if importances is None else importances)):
        if len(tensors) != len(parameters):
            raise ValueError(f"{len(parameters)} parameters need as many {what}; got {len(tensors)}.")
        for k, (parameter, tensor) in enumerate(zip(parameters, tensors, strict=True)):
            if tensor.shape != parameter.shape:
                raise ValueError(
                    f"Number {k} of the {what} is {tuple(tensor.shape)}; its parameter is {tuple(parameter.shape)}."
                )
            if tensor.is_complex() and (tensors is importances or not parameter.is_complex()):
                raise ValueError(
                    f"Number {k} of the {what} is {tensor.dtype}, but must be real: "
                    + ("importances are." if tensors is importances else f"its parameter is {parameter.dtype}.")
                )


def _dense_gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    elif parameter.grad.layout != torch.strided:
        parameter.grad = parameter.grad.to_dense()
    return parameter.grad


def _add_differences(
    parameters: list[Tensor], anchors: list[Tensor], factors: list[Tensor] | None, strength: float
) -> None:
    gradients = [_dense_gradient(parameter) for parameter in parameters]
    # The difference comes first: added one after the other, θ and θ_ref would round the gradient by parts of θ.
    differences = torch._foreach_sub([parameter.detach() for parameter in parameters], anchors)
    if factors is None:
        torch._foreach_add_(gradients, differences, alpha=2 * strength)
    else:
        torch._foreach_addcmul_(gradients, differences, factors, value=2 * strength)
