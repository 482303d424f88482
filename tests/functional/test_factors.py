"""Which entries are factors of one weight."""

import pytest
import torch

from pl_personalize.functional.factors import factor_pairs


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("layer.lora_A.weight", "layer.lora_B.weight"),
        ("layer.lora_A.default.weight", "layer.lora_B.default.weight"),
        ("lora_A", "lora_B"),
        ("embed.lora_embedding_A.default", "embed.lora_embedding_B.default"),
        ("lora_unet_q.lora_down.weight", "lora_unet_q.lora_up.weight"),
        ("layer.hada_w1_a.default", "layer.hada_w1_b.default"),
        ("layer.hada_w2_a", "layer.hada_w2_b"),
        ("layer.lokr_w2_a", "layer.lokr_w2_b"),
        ("layer.lokr_w1", "layer.lokr_w2"),
    ],
)
def test_factors_of_low_rank(one, other):
    entries = {name: torch.zeros(2, 2) for name in (other, "layer.weight", one)}

    assert factor_pairs(entries) == [(one, other)]
    assert factor_pairs({one: entries[one], "layer.weight": entries["layer.weight"]}) == []


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("weight_g", "weight_v"),
        ("net.0.weight_ih_l0_g", "net.0.weight_ih_l0_v"),
        ("net.parametrizations.weight.original0", "net.parametrizations.weight.original1"),
    ],
)
@pytest.mark.parametrize(
    ("norm", "direction", "is_one"),
    [
        ((4, 1, 1), (4, 3, 2), True),
        ((1, 3), (4, 3), True),
        ((), (4, 3), True),
        ((4,), (4, 3), False),
        ((4, 3), (4, 3), False),
        ((5, 1), (4, 3), False),
        ((4,), (4,), False),
    ],
)
def test_weight_norm_is_told_by_shapes(one, other, norm, direction, is_one):
    entries = {one: torch.zeros(norm), other: torch.zeros(direction)}

    assert factor_pairs(entries) == ([(one, other)] if is_one else [])


@pytest.mark.parametrize("name", ["xlora_A.weight", "lora_Ax.weight", "g", "layer.original0"])
def test_other_names(name):
    assert (
        factor_pairs(dict.fromkeys([name, "xlora_B.weight", "lora_Bx.weight", "v", "layer.original1"], torch.zeros(2)))
        == []
    )
