"""Nothing but running statistics changes, whatever the caller's modes."""

import copy

import pytest
import torch
from adaptation_cases import (
    NETWORKS,
    OPTIONS,
    TINY,
    assert_close,
    assert_identical,
    assert_unchanged,
    draws_and,
    everything,
    made,
    mixed,
    state,
)
from torch import nn

from pl_personalize import adapt_batchnorm
from pl_personalize.adaptation import estimate_batchnorm


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", NETWORKS)
def test_only_running_statistics_change(name, options):
    model, x = mixed(name)
    before = everything(model)
    estimate_batchnorm(model, draws_and(x.split(4)), **options)
    assert_unchanged(model, before)
    found = adapt_batchnorm(model, draws_and(x.split(4)), **options)
    names = {n for n in before["state"] if "running" in n}
    assert_unchanged(model, before, but=names)
    assert set(found) == {n for n in names if not n.startswith("norm_b")}


class Again:
    """A loader that can be read several times, and fails in a certain pass."""

    def __init__(self, batches, error, fails_in=1):
        self.batches, self.error, self.fails_in, self.passes = batches, error, fails_in, 0

    def __iter__(self):
        self.passes += 1
        yield from draws_and(self.batches, self.error if self.passes >= self.fails_in else None)


@pytest.mark.parametrize("error", [RuntimeError("damaged image"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_loader_that_fails_leaves_all_as_it_was(options, error):
    model, x = mixed("images")
    before = everything(model)
    fails_in = 3 if options.get("max_scratch_mb") == TINY else 1
    with pytest.raises(type(error)):
        adapt_batchnorm(model, Again(list(x.split(4)), error, fails_in), **options)
    assert_unchanged(model, before)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_forward_that_fails_leaves_all_as_it_was(options):
    def forward(model, batch):
        model(batch)
        raise RuntimeError("out of memory")

    model, x = mixed("images")
    before = everything(model)
    with pytest.raises(RuntimeError, match="out of memory"):
        adapt_batchnorm(model, x.split(4), forward=forward, **options)
    assert_unchanged(model, before)


def test_other_buffers_that_the_forward_changes_are_put_back():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(6)
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("last", torch.zeros(6))

        def forward(self, x):
            self.calls += 1
            self.last = x[0]
            return self.norm(x)

    model, x = Counts(), torch.randn(5, 6)
    calls, last = model.calls, model.last
    adapt_batchnorm(model, [x])
    assert model.calls is calls
    assert model.last is last
    assert (calls.item(), last.tolist()) == (0, [0.0] * 6)
    torch.testing.assert_close(model.norm.running_mean, x.mean(0))


def test_batches_of_the_caller_are_left_alone():
    model, x = made("residual")
    batches, before = list(x.split(4)), x.clone()
    for options in OPTIONS.values():
        estimate_batchnorm(model, batches, **options)
    assert torch.equal(torch.cat(batches), before)


def test_frozen_parameters():
    model, x = made("images")
    expected = estimate_batchnorm(model, x.split(4))
    model.requires_grad_(False).eval()
    before = everything(model)
    assert_identical(adapt_batchnorm(model, x.split(4)), expected)
    assert_unchanged(model, before, but=set(expected))


@pytest.mark.parametrize("name", NETWORKS)
def test_training_goes_on_after_adaptation_in_inference_mode(name):
    model, x = made(name)
    expected = {key: estimate_batchnorm(model, x.split(4), **options) for key, options in OPTIONS.items()}
    for key, options in OPTIONS.items():
        copied = copy.deepcopy(model).train()
        with torch.inference_mode():
            found = adapt_batchnorm(copied, x.split(4), **options)
        assert_identical(found, expected[key])
        assert not any(t.is_inference() for t in (*copied.buffers(), *copied.parameters(), *found.values()))
        copied(x).square().sum().backward()
        before = state(copied)
        torch.optim.SGD(copied.parameters(), 0.1).step()
        assert any(not torch.equal(v, before[n]) for n, v in copied.named_parameters())


def test_data_made_in_inference_mode():
    model, x = made("images")
    with torch.inference_mode():
        batches = [part.clone() for part in x.split(4)]
        inside = estimate_batchnorm(model, batches)
    assert batches[0].is_inference()
    assert_identical(inside, estimate_batchnorm(model, batches))


@pytest.mark.parametrize("exact", [False, True])
def test_autocast_around_it_is_off(exact):
    model, x = made("images", dtype=torch.float32)
    expected = estimate_batchnorm(model, x.split(4), exact=exact)
    with torch.autocast("cpu", torch.bfloat16):
        assert_identical(adapt_batchnorm(model, x.split(4), exact=exact), expected)
    own = estimate_batchnorm(
        model, x.split(4), forward=lambda m, b: torch.autocast("cpu", torch.bfloat16)(m)(b), exact=exact
    )
    assert (own["4.running_mean"] - expected["4.running_mean"]).abs().max() > 1e-4
    assert_close(own, expected, 0.1)


def test_grad_mode_off_around_it():
    model, x = made("rows")
    with torch.no_grad():
        adapt_batchnorm(model, [x])
    assert model(x).requires_grad


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_a_compiled_model(how, options):
    model, x = made("images")
    expected = estimate_batchnorm(model, x.split(4), **options)
    if how == "wrapped":
        compiled = torch.compile(model, backend="eager")
    else:
        compiled = model
        compiled.compile(backend="eager")
    compiled.eval()
    with torch.no_grad():
        before = compiled(x)
    found = adapt_batchnorm(compiled, x.split(4), **options)
    assert_close({n.removeprefix("_orig_mod."): v for n, v in found.items()}, expected, 1e-9)
    torch.testing.assert_close(model[4].running_var, expected["4.running_var"])
    with torch.no_grad():
        after = compiled(x)
    torch._dynamo.reset()
    reference, _ = made("images")
    expected.apply(reference)
    torch.testing.assert_close(after, reference.eval()(x))
    assert not torch.allclose(after, before)
