"""Importances of random small networks equal a loop over single samples."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import KINDS, naive_importance
from torch import nn

from pl_personalize import estimate_importance

TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-10}
NORMS = (nn.BatchNorm2d, nn.GroupNorm, nn.InstanceNorm2d)
ACTIVATIONS = (nn.ReLU, nn.Tanh, nn.PReLU, nn.GELU, lambda: nn.ReLU(inplace=True))


@st.composite
def convolutions(draw, image):
    """One with options that an image of this size allows."""
    channels, size = image.shape[1], min(image.shape[2:])
    width, groups = draw(st.sampled_from([2, 4])), draw(st.sampled_from([1, 2]))
    stride = draw(st.sampled_from([1, 2]))
    if draw(st.booleans()):
        return nn.ConvTranspose2d(channels, width, draw(st.sampled_from([1, 2, 3])), stride=stride, groups=groups)
    padding = draw(st.sampled_from([1, min(2, size)]))  # a circular one goes around once at most
    dilation = draw(st.sampled_from([1, 2]))
    kernels = [kernel for kernel in (1, 2, 3) if dilation * (kernel - 1) < size + 2 * padding]
    return nn.Conv2d(
        channels,
        width,
        draw(st.sampled_from(kernels)),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "replicate", "circular"])),
    )


@st.composite
def image_networks(draw):
    """Convolutions with all that they may have, norms, pooling, a head."""
    shape, layers = (2, 6, 5), []
    image = torch.zeros(1, *shape)
    for _ in range(draw(st.integers(1, 3))):
        layers.append(draw(convolutions(image)))
        image = layers[-1](image)
        # Of a single position, PyTorch refuses to take these statistics.
        norms = [None, nn.BatchNorm2d] + [lambda c: nn.GroupNorm(2, c), nn.InstanceNorm2d] * (image[0, 0].numel() > 1)
        norm = draw(st.sampled_from(norms))
        layers += [] if norm is None else [norm(image.shape[1])]
        layers.append(draw(st.sampled_from(ACTIVATIONS))())
    layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.5), nn.Linear(4 * image.shape[1], 3)]
    return nn.Sequential(*layers), shape


class Sequence(nn.Module):
    """A transformer encoder over embedded entries, with a class token."""

    def __init__(self, layers, activation, norm_first, batch_first):
        super().__init__()
        self.embed, self.token = nn.Embedding(7, 8, padding_idx=0), nn.Parameter(torch.randn(1, 1, 8))
        block = nn.TransformerEncoderLayer(
            8, 2, 6, activation=activation, norm_first=norm_first, batch_first=batch_first
        )
        self.encoder = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.batch_first, self.head = batch_first, nn.Linear(8, 3)

    def forward(self, x):
        entries = (x[..., 0].abs() * 3).long().clamp_max(6)
        x = torch.cat([self.token.expand(len(x), -1, -1), self.embed(entries)], 1)
        if not self.batch_first:
            return self.head(self.encoder(x.transpose(0, 1))[0])
        return self.head(self.encoder(x)[:, 0])


@st.composite
def sequence_networks(draw):
    network = Sequence(
        draw(st.integers(1, 2)), draw(st.sampled_from(["relu", "gelu"])), draw(st.booleans()), draw(st.booleans())
    )
    return network, (draw(st.integers(1, 5)), 1)


@st.composite
def settings_of(draw, networks):
    torch.manual_seed(draw(st.integers(0, 10_000)))
    dtype = draw(st.sampled_from(list(TOLERANCES)))
    network, shape = draw(networks)
    if any(isinstance(layer, NORMS) for layer in network.modules()):
        dtype = torch.float64  # a norm behind a layer cancels most of its gradient, and with it float32's digits
    network = network.to(dtype)
    for name, value in [*network.named_parameters(), *network.named_buffers()]:
        if value.is_floating_point():
            nn.init.uniform_(value, 0.3, 1.5) if "running_var" in name else nn.init.normal_(value, std=0.5)
    x = torch.randn(draw(st.integers(1, 6)), *shape, dtype=dtype)
    return network, x, dtype, draw(st.sampled_from(list(KINDS))), draw(st.integers(1, 6))


def check(case):
    """Compare with the reference; returns what has a gradient and no closed form."""
    network, x, dtype, kind, size = case
    labels = torch.arange(len(x)) % 3
    reference, options = KINDS[kind]
    right = naive_importance(network.eval(), x, reference, labels)
    batches = list(zip(x.split(size), labels.split(size), strict=True))
    found = estimate_importance(network, batches, kind, **options)
    # A bias before a norm has no gradient: what is left is rounding, to be measured by the other parameters' gradients.
    floor = 1e-2 * max(float(value.norm()) for value in right.values())
    assert set(found) == set(right)
    for name, value in right.items():
        error = float((found[name].double() - value).norm())
        assert error <= TOLERANCES[dtype] * max(float(value.norm()), floor), name
    # Where a sample's gradient is rounding and nothing else, as that of a norm's weight behind a dead ReLU, its layer
    # may be slow. Of a bias that a norm takes away, it is known how much rounding leaves.
    slow, vague = {name for name, path in found.routes.items() if path != "closed form"}, set()
    for sample, label in zip(x, labels, strict=True) if slow else ():
        gradients = naive_importance(network, sample[None], reference, label[None])
        sizes = {name: float(value.norm()) ** (1.0 if kind == "mas" else 0.5) for name, value in gradients.items()}
        least = 1e-8 * max(sizes.values())
        vague |= {name.rpartition(".")[0] for name in slow if sizes[name] <= least and not name.endswith("bias")}
    return {name for name in slow if name.rpartition(".")[0] not in vague}


@settings(max_examples=60)
@given(settings_of(image_networks()))
def test_convolutional_networks(case):
    assert not check(case)


@settings(max_examples=30)
@given(settings_of(sequence_networks()))
def test_transformers(case):
    slow = check(case)
    if case[0].batch_first:  # else linear layers and norms see the batch in their second dimension
        assert not slow
