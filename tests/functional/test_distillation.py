"""The distillation loss against its formula, written out."""

import pytest
import torch

from pl_personalize.functional.distillation import distillation_loss


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_it_is_the_mean_cross_entropy_of_softened_answers(temperature):
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    right = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = (torch.tensor(z, dtype=torch.float64).div(temperature).exp() for z in (t, s))
        right -= float((p / p.sum() * (q / q.sum()).log()).sum()) / 5

    assert float(distillation_loss(student, teacher, temperature)) == pytest.approx(right, rel=1e-12)


def test_the_gradient_is_without_the_square_of_the_temperature():
    """(softmax(s/T) - softmax(t/T)) / (n T); with the usual factor T² it would be four times this for T = 2."""
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    distillation_loss(student, teacher, 2.0).backward()

    right = ((student / 2).softmax(1) - (teacher / 2).softmax(1)) / 6
    torch.testing.assert_close(student.grad, right.detach())
    assert teacher.grad is None


@pytest.mark.parametrize(
    ("student", "teacher", "temperature", "message"),
    [
        ((3, 4), (3, 5), 2.0, r"\(3, 4\) of the student and \(3, 5\)"),
        ((3,), (3,), 2.0, r"must be \(n, classes\)"),
        ((3, 4), (3, 4), 0.0, "positive; got 0.0"),
        ((3, 4), (3, 4), float("nan"), "positive; got nan"),
    ],
)
def test_what_does_not_fit_is_refused(student, teacher, temperature, message):
    with pytest.raises(ValueError, match=message):
        distillation_loss(torch.zeros(student), torch.zeros(teacher), temperature)
