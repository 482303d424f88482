"""Knowledge distillation: what a network answered before, as a target."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    r"""The cross-entropy between softened answers of a teacher and of a student, mean over samples.

    .. math::
        -\frac{1}{n} \sum_i \sum_c \mathrm{softmax}(t_i / T)_c \, \log \mathrm{softmax}(s_i / T)_c

    As in Learning without Forgetting (Li and Hoiem, ECCV 2016, equation 2), in the convention of De Lange et al., CVPR
    2020: there is no factor :math:`T^2`. Both logits are (n, classes); no gradient reaches the teacher's.

    Raises:
        ValueError: If the shapes differ or the temperature is not positive.

    Example:
        >>> import torch
        >>> answers = torch.tensor([[2.0, 0.0]])
        >>> round(float(distillation_loss(answers, answers)), 4)  # the entropy of softmax([1, 0])
        0.5822
    """
    if student.shape != teacher.shape or student.dim() != 2:
        raise ValueError(
            f"Both logits must be (n, classes); got {tuple(student.shape)} of the student and {tuple(teacher.shape)} "
            "of the teacher."
        )
    if not temperature > 0:
        raise ValueError(f"The temperature must be positive; got {temperature}.")
    return F.cross_entropy(student / temperature, (teacher.detach() / temperature).softmax(1))
