"""Quadratic penalties as gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def add_l2_gradient_(parameters: Sequence[Tensor], anchors: Sequence[Tensor], strength: float) -> None:
    r"""Add the gradient of :math:`\lambda \|\theta - \theta_\mathrm{ref}\|^2`, without a factor 1/2, to ``.grad``.

    L2-transfer of Lee et al., NeurIPS 2017, in the convention of De Lange et al., CVPR 2020. Parameters whose ``.grad``
    is ``None`` are left alone.

    Args:
        parameters: The parameters.
        anchors: What they are pulled to, of the same shapes.
        strength: λ.
    """
    pulled = [(p, a) for p, a in zip(parameters, anchors, strict=True) if p.grad is not None]
    if not pulled:
        return
    gradients = [p.grad for p, _ in pulled if p.grad is not None]
    torch._foreach_add_(gradients, [p.detach() for p, _ in pulled], alpha=2 * strength)
    torch._foreach_add_(gradients, [a for _, a in pulled], alpha=-2 * strength)
