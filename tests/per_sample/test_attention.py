"""Attention by layers against nn.MultiheadAttention itself."""

import pytest
import torch
from torch import nn

from pl_personalize.per_sample.attention import split_attention


def made(**options):
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2, dropout=0.5, **options).double().eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer, torch.randn(5, 3, 8, dtype=torch.float64)


FLOATS = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
CAUSAL = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "mask",
    [None, FLOATS, CAUSAL, CAUSAL < 0, torch.stack([FLOATS * k for k in range(6)])],
    ids=["none", "float", "causal", "bool", "each head"],
)
def test_it_is_the_same_function(batch_first, bias, mask):
    layer, x = made(batch_first=batch_first, bias=bias)
    x = x.transpose(0, 1) if batch_first else x
    options = {"need_weights": False, "attn_mask": mask, "is_causal": mask is CAUSAL}
    expected = layer(x, x, x, **options)[0]
    split = split_attention(layer)
    split.attach(lambda: True)
    called = []
    for part in split.projections:
        part.register_forward_hook(lambda module, args, output: called.append(tuple(output.shape)))
    found, weights = layer(x, x, x, **options)
    assert weights is None
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert called == [(3, 5, 24), (3, 5, 8)]  # the batch first, whatever the layer's layout


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("mask", [None, CAUSAL], ids=["none", "causal"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_weights_are_returned_where_they_are_asked_for(batch_first, mask, average):
    layer, x = made(batch_first=batch_first)
    x = x.transpose(0, 1) if batch_first else x
    options = {"attn_mask": mask, "average_attn_weights": average}
    expected = layer(x, x, x, **options)
    split = split_attention(layer)
    split.attach(lambda: True)
    for found, right in zip(layer(x, x, x, **options), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mask", [None, FLOATS], ids=["none", "float"])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_padding_is_left_out(mask, kind):
    layer, x = made()
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:], padding[2, 0] = True, True
    if kind == "float":
        padding = torch.zeros(3, 5, dtype=torch.float64).masked_fill_(padding, float("-inf"))
    options = {"need_weights": False, "attn_mask": mask, "key_padding_mask": padding}
    expected = layer(x, x, x, **options)[0]
    split = split_attention(layer)
    split.attach(lambda: True)
    torch.testing.assert_close(layer(x, x, x, **options)[0], expected, rtol=1e-12, atol=1e-12)


def test_what_is_not_plain_self_attention_is_left_to_the_layer():
    layer, x = made()
    y = x.flip(0)
    calls = [
        ((x, y, y), {"need_weights": False}),
        ((x[:, 0], x[:, 0], x[:, 0]), {"need_weights": False}),
    ]
    expected = [layer(*args, **options) for args, options in calls]
    split = split_attention(layer)
    called, told = [], []
    split.attach(lambda: True, told.append)
    for part in split.projections:
        part.register_forward_hook(lambda *args: called.append(args))
    for (args, options), right in zip(calls, expected, strict=True):
        found = layer(*args, **options)
        torch.testing.assert_close(found[0], right[0])
        assert (found[1] is None) == (right[1] is None)
    assert called == []
    assert told == list(split.projections) * len(calls)


def test_it_leaves_the_layer_as_it_was():
    layer, x = made()
    before = dict(vars(layer))
    split = split_attention(layer)
    weight, bias = split.projections[0].parameters()
    assert weight is layer.in_proj_weight
    assert bias is layer.in_proj_bias
    split.attach(lambda: False)
    torch.testing.assert_close(layer(x, x, x)[1].sum(-1), torch.ones(3, 5, dtype=torch.float64))
    split.detach()
    assert vars(layer) == before
    assert layer.forward.__func__ is nn.MultiheadAttention.forward


class Own(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize(
    "layer",
    [
        nn.MultiheadAttention(8, 2, kdim=4),
        nn.MultiheadAttention(8, 2, add_bias_kv=True),
        nn.MultiheadAttention(8, 2, add_zero_attn=True),
        Own(8, 2),
        nn.Linear(8, 8),
    ],
    ids=["kdim", "bias_kv", "zero_attn", "subclass", "linear"],
)
def test_other_layers_are_not_taken_apart(layer):
    assert split_attention(layer) is None
