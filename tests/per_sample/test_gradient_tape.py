"""What the tape notes beside the sums."""

import pytest
import torch
from torch import nn

from pl_personalize.per_sample.comparison import rounding_of_sums
from pl_personalize.per_sample.gradient_tape import GradientTape


def test_rounding_of_a_bias_adds_up_over_uses_and_is_forgotten_with_the_sums():
    layer = nn.Linear(3, 2).requires_grad_(False)
    tape = GradientTape(dict(layer.named_parameters()), [layer], 1, 2**20)
    x, cotangent = torch.randn(4, 5, 3), torch.randn(4, 5, 2)

    def noted(uses, *, learning=True):
        tape.reset()
        tape.is_learning = learning
        tape.start(len(x), x.device)
        logits = sum(layer(x) for _ in range(uses))
        tape.stop()
        tape.backward(logits, cotangent, last=True)
        return tape.bias_rounding

    tape.attach()
    assert noted(1) == {"bias": rounding_of_sums(cotangent, 2)}
    assert noted(2) == pytest.approx({"bias": 2 * rounding_of_sums(cotangent, 2)})
    assert noted(1, learning=False) == {}
    tape.detach()
