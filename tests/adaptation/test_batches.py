"""Forms of batches and dataloaders."""

import pytest
import torch
from adaptation_cases import TINY, assert_close, assert_identical, made, one_train_batch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from pl_personalize import adapt_batchnorm
from pl_personalize.adaptation import estimate_batchnorm

# What a batch and a dataloader may be


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = made("rows")[0]

    def forward(self, left, right, scale=1.0):
        return self.net(scale * left + right)


@pytest.mark.parametrize("scratch", [256, TINY])
@pytest.mark.parametrize("exact", [False, True])
def test_kinds_of_batches(exact, scratch):
    """Labels are garbage, of any shape: they are not looked at."""
    model, x = made("rows")
    parts = x.split([4, 4, 3])
    expected = estimate_batchnorm(model, parts, exact=exact)
    nan = torch.full((11,), float("nan")).split([4, 4, 3])
    garbage = {
        "labels": list(zip(parts, nan, strict=True)),
        "list": [[part, None] for part in parts],
        "text": [(part, ["cat"] * len(part)) for part in parts],
        "scalar": [(part, torch.tensor(-1)) for part in parts],
        "ragged": [(part, torch.zeros(k, 2)) for k, part in enumerate(parts)],
        "boxes": [(part, [{"boxes": torch.zeros(2, 4)}] * len(part)) for part in parts],
    }
    for kind, batches in garbage.items():
        found = estimate_batchnorm(model, batches, exact=exact, max_scratch_mb=scratch)
        assert_close(found, expected, 1e-9)
        assert found.num_samples == 11, kind
    both = TwoInputs()
    dicts = [{"left": part / 2, "right": part / 2, "labels": label} for part, label in zip(parts, nan, strict=True)]
    found = estimate_batchnorm(both, dicts, exact=exact, max_scratch_mb=scratch)
    assert_close({n.removeprefix("net."): v for n, v in found.items()}, expected, 1e-9)
    own = estimate_batchnorm(
        model, [{"image": part} for part in parts], exact=exact, forward=lambda m, b: m(b["image"])
    )
    assert_close(own, expected, 1e-9)


def test_what_belongs_to_one_batch_stays_with_it():
    """A number beside the tensors, other in each batch: batches with these cannot be joined."""
    model, x = TwoInputs(), made("rows")[1]
    batches = [{"left": x[:5], "right": x[:5], "scale": 3.0}, {"left": x[5:], "right": x[5:], "scale": -1.0}]
    joined = torch.cat([4 * x[:5], 0 * x[5:]])
    expected = one_train_batch(model.net, joined)
    for scratch in (TINY, 256):
        found = estimate_batchnorm(model, batches, exact=True, max_scratch_mb=scratch)
        assert_close({n.removeprefix("net."): v for n, v in found.items()}, expected, 1e-9)


def test_dicts_in_which_the_entries_come_in_another_order():
    model, x = made("rows")
    batches = [{"left": x[:5], "right": 0 * x[:5]}, {"right": 0 * x[5:], "left": x[5:]}]
    expected = one_train_batch(model, 2 * x)
    for scratch in (TINY, 256):
        found = estimate_batchnorm(
            model, batches, exact=True, max_scratch_mb=scratch, forward=lambda m, b: m(2 * b["left"] + b["right"])
        )
        assert_close(found, expected, 1e-9)


@pytest.mark.parametrize("scratch", [256, TINY])
@pytest.mark.parametrize("exact", [False, True])
def test_kinds_of_dataloaders(exact, scratch):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(x)

    model, x = made("rows", 12)
    sources = {
        "generator": (part for part in x.split(4)),
        "iterator": iter(x.split(4)),
        "map": map(torch.clone, x.split(4)),
        "tuple": x.split(4),
        "loader": DataLoader(TensorDataset(x, torch.full((12,), -1)), batch_size=4),
        "iterator of a loader": iter(DataLoader(x, batch_size=4)),
        "stream": DataLoader(Stream(), batch_size=4),
    }
    expected = estimate_batchnorm(model, x.split(4), exact=exact)
    for kind, source in sources.items():
        found = estimate_batchnorm(model, source, exact=exact, max_scratch_mb=scratch)
        assert found.num_samples == 12, kind
        assert_close(found, expected, 1e-9)


def test_exact_with_a_loader_that_shuffles_anew_in_each_pass():
    model, x = made("images")
    loader = DataLoader(TensorDataset(x), batch_size=4, shuffle=True)
    found = estimate_batchnorm(model, loader, exact=True, max_scratch_mb=TINY)
    assert_close(found, one_train_batch(model, x), 1e-9)


def test_a_batch_without_tensors_is_refused():
    with pytest.raises(ValueError, match="at least one tensor"):
        adapt_batchnorm(made("rows")[0], ["images"])


def test_the_progress_bar_changes_nothing():
    model, x = made("rows")
    assert_identical(estimate_batchnorm(model, x.split(4), progress=True), estimate_batchnorm(model, x.split(4)))
