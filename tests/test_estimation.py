"""Importances equal a loop over single samples, whatever the network, the batches and the caller's state."""

import random
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from networks import NETWORKS, MixesSamples, batch_norm_network, make_network, mlp
from reference import naive_batch_importance, naive_importance, relative_error
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pl_personalize import estimate_importance

KINDS = {
    "mas": ("mas", {}),
    "fisher": ("expected_fisher", {"draws": "all"}),
    "empirical_fisher": ("empirical_fisher", {}),
}
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}


def _labels(x):
    return torch.arange(len(x)) * 2 % 3


def _batches(x, sizes):
    return list(zip(x.split(sizes), _labels(x).split(sizes), strict=True))


# Exactness


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_importances_equal_a_loop_over_samples(name, kind, dtype):
    model, x = make_network(name, 8, dtype)
    reference, options = KINDS[kind]
    right = naive_importance(model, x, reference, _labels(x))

    importance = estimate_importance(model.train(), _batches(x, [3, 1, 4]), kind, **options)

    assert relative_error(importance, right) <= TOLERANCES[dtype]
    assert {value.dtype for value in importance.values()} == {dtype}
    assert list(importance) == [parameter for parameter, _ in model.named_parameters()]
    assert (importance.kind, importance.num_samples, importance.reduction) == (kind, 8, "sample")
    assert set(importance.routes) == set(importance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mlp", "batch_norm", "twice_used", "attention", "data_dependent"])
@pytest.mark.parametrize(
    ("sizes", "options"),
    [([8], {}), ([1] * 8, {}), ([1, 7], {}), ([7, 1], {}), ([2, 2, 3, 1], {}), ([8], {"max_scratch_mb": 1e-6})],
    ids=["one batch", "single samples", "one first", "one last", "uneven", "tiny scratch"],
)
def test_batches_their_order_and_the_scratch_do_not_matter(name, kind, sizes, options):
    model, x = make_network(name, 8)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    batches = [(images[order.argsort()][order], labels) for images, labels in _batches(x, [8])]
    right = estimate_importance(model, batches, kind, **KINDS[kind][1])
    shuffled = list(zip(x[order].split(sizes), _labels(x)[order].split(sizes), strict=True))

    importance = estimate_importance(model, shuffled, kind, **KINDS[kind][1], **options)

    assert importance.num_samples == 8
    assert relative_error(importance, right) <= 1e-12


def test_a_dataloader_is_taken_as_it_is():
    model, x = make_network("mlp", 8, torch.float32)
    loader = DataLoader(TensorDataset(x, _labels(x)), batch_size=3, shuffle=True)

    importance = estimate_importance(model, loader, "empirical_fisher")

    assert relative_error(importance, naive_importance(model, x, "empirical_fisher", _labels(x))) <= 1e-5


def test_maps_as_outputs_of_mas():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GELU(), nn.Conv2d(4, 3, 1)).double()
    x = torch.randn(5, 2, 5, 6, dtype=torch.float64)

    assert relative_error(estimate_importance(model, [x], "mas"), naive_importance(model, x, "mas")) <= 1e-10


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_old_style_weight_norm_is_right_and_left_usable():
    """Its weight is an ordinary attribute, formed anew in each forward."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 5)), nn.ReLU(), nn.Linear(5, 3)).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    output, weight = model(x), model[0].weight.detach().clone()

    importance = estimate_importance(model, [x], "mas")

    assert relative_error(importance, naive_importance(model, x, "mas")) <= 1e-10
    importance = estimate_importance(model, [x], "mas")
    assert not torch._C._functorch.is_functorch_wrapped_tensor(model[0].weight)
    assert torch.equal(model[0].weight.detach(), weight)
    assert torch.equal(model(x), output)


def test_low_precision_networks_get_float32():
    model, x = make_network("mlp", 8)
    right = naive_importance(model, x, "mas")

    importance = estimate_importance(model.bfloat16(), [x.bfloat16()], "mas")

    assert {value.dtype for value in importance.values()} == {torch.float32}
    assert relative_error(importance, right) < 5e-2


# Which parameters


def test_frozen_parameters_are_absent_and_do_not_disturb():
    model, x = make_network("batch_norm", 5)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in ("0.weight", "1.bias", "8.weight"))
    right = naive_importance(model, x, "mas")

    importance = estimate_importance(model, [x], "mas")

    assert not {"0.weight", "1.bias", "8.weight"} & set(importance)
    assert relative_error(importance, right) <= 1e-10
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["0.weight", "1.bias", "8.weight"]


@pytest.mark.parametrize("reduction", ["sample", "batch"])
@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ((), ["1.weight", "1.bias", "3.weight", "3.bias", "5.weight", "5.bias"]),
        (("5",), ["1.weight", "1.bias", "3.weight", "3.bias"]),
        (("5.",), ["1.weight", "1.bias", "3.weight", "3.bias"]),
        (["5", "1.bias"], ["1.weight", "3.weight", "3.bias"]),
        (("1.weight", "3", "5"), ["1.bias"]),
    ],
)
def test_exclude_takes_names_and_modules(exclude, left, reduction):
    model, x = make_network("mlp", 4)
    right = estimate_importance(model, [x], "mas", reduction=reduction)

    importance = estimate_importance(model, [x], "mas", exclude=exclude, reduction=reduction)

    assert list(importance) == left
    assert relative_error(importance, {name: right[name] for name in left}) <= 1e-12


def test_a_prefix_is_a_whole_name():
    """`1` is not the beginning of `10`."""
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(11)))

    importance = estimate_importance(model, [torch.ones(3, 2)], "mas", exclude=("1",))

    assert "10.weight" in importance
    assert "1.weight" not in importance


@pytest.mark.parametrize("reduction", ["sample", "batch"])
@pytest.mark.parametrize("module", ["0", "0."])
def test_module_gives_names_relative_to_it(module, reduction):
    body, x = make_network("mlp", 4)
    model = nn.Sequential(body, nn.Linear(3, 2).double())
    right = estimate_importance(model, [x], "mas", reduction=reduction)

    importance = estimate_importance(model, [x], "mas", module=module, exclude=("0.3",), reduction=reduction)

    names = [name for name, _ in body.named_parameters() if not name.startswith("3.")]
    assert list(importance) == list(importance.routes) == names
    assert relative_error(importance, {name: right[f"0.{name}"] for name in names}) <= 1e-12


def test_module_with_a_parameter_that_has_its_name_elsewhere():
    """A tied weight is a parameter of the module as much as of the one that comes first."""
    model, x = make_network("tied", 4)
    right = naive_importance(model, x, "mas")

    importance = estimate_importance(model, [x], "mas", module="b")

    assert set(importance) == {"weight", "bias"}
    assert relative_error(importance, {"weight": right["a.weight"], "bias": right["b.bias"]}) <= 1e-10


# Sampled labels


def test_sampled_fisher_is_reproducible_by_its_generator():
    model, x = make_network("mlp", 6)

    first, again, other = (
        estimate_importance(model, [x], "fisher", generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )

    assert relative_error(first, again) == 0.0
    assert relative_error(first, other) > 1e-3


def test_sampled_fisher_uses_the_drawn_labels_batch_after_batch():
    model, x = make_network("residual", 7)
    generator, again = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    chances = model(x).detach().softmax(1)
    labels = torch.cat(
        [torch.multinomial(part, 1, replacement=True, generator=again)[:, 0] for part in chances.split([5, 2])]
    )

    importance = estimate_importance(model, x.split([5, 2]), "fisher", generator=generator)

    assert relative_error(importance, naive_importance(model, x, "sampled", labels)) <= 1e-10
    assert torch.equal(generator.get_state(), again.get_state())


def test_without_a_generator_calls_in_a_row_draw_the_same():
    model, x = make_network("mlp", 6)

    assert relative_error(estimate_importance(model, [x], "fisher"), estimate_importance(model, [x], "fisher")) == 0.0


@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_many_draws_approach_the_expectation(name):
    model, x = make_network(name, 4)
    right = estimate_importance(model, [x], "fisher", draws="all")

    few, many = (
        relative_error(
            estimate_importance(model, [x], "fisher", draws=draws, generator=torch.Generator().manual_seed(0)), right
        )
        for draws in (4, 400)
    )

    assert few > 0.1
    assert many < 0.1


# What a batch may be, and the state of the caller


class _Keywords(nn.Module):
    def __init__(self, network, wrap=lambda logits: logits):
        super().__init__()
        self.network, self.wrap = network, wrap

    def forward(self, pixels, shift=0.0):
        return self.wrap(self.network(pixels + shift))


@pytest.mark.parametrize("reduction", ["sample", "batch"])
@pytest.mark.parametrize(
    ("as_batch", "wrap", "forward"),
    [
        pytest.param(lambda x, y: [x, y], lambda z: z, None, id="list"),
        pytest.param(lambda x, y: {"pixels": x, "labels": y}, lambda z: z, None, id="dict"),
        pytest.param(lambda x, y: {"y": y, "shift": torch.zeros(1), "pixels": x}, lambda z: z, None, id="dict, more"),
        pytest.param(lambda x, y: (x, y), lambda z: SimpleNamespace(logits=z), None, id="logits"),
        pytest.param(lambda x, y: (x, y), lambda z: {"logits": z, "loss": 0}, None, id="logits in a dict"),
        pytest.param(lambda x, y: (x, y), lambda z: (0, z), lambda m, batch: m(batch[0])[1], id="forward"),
        pytest.param(lambda x, y: ({"i": x}, y), lambda z: z, lambda m, batch: m(batch[0]["i"]), id="nested"),
    ],
)
def test_batches_and_outputs_of_all_forms(as_batch, wrap, forward, reduction):
    network, x = make_network("mlp", 5)
    batches = _batches(x, [3, 2])
    right = estimate_importance(network, batches, "empirical_fisher", reduction=reduction)

    importance = estimate_importance(
        _Keywords(network, wrap),
        [as_batch(*batch) for batch in batches],
        "empirical_fisher",
        module="network",
        forward=forward,
        reduction=reduction,
    )

    assert relative_error(importance, right) <= 1e-12


@pytest.mark.parametrize("reduction", ["sample", "batch"])
@pytest.mark.parametrize("name", ["mlp", "batch_norm", "attention", "data_dependent"])
@pytest.mark.parametrize(
    "caller",
    [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16), torch.enable_grad],
    ids=["inference_mode", "no_grad", "autocast", "enable_grad"],
)
def test_the_callers_modes_do_not_matter(name, caller, reduction):
    model, x = make_network(name, 5, torch.float32)
    right = estimate_importance(model, x.split(3), "mas", reduction=reduction)

    with caller():
        importance = estimate_importance(model, x.split(3), "mas", reduction=reduction)

    assert relative_error(importance, right) == 0.0
    # Later a penalty trains with them, and autograd refuses tensors made in inference mode.
    assert not any(value.is_inference() or value.requires_grad for value in importance.values())
    weights = torch.ones_like(importance[next(iter(importance))], requires_grad=True)
    (importance[next(iter(importance))] * weights).sum().backward()


@pytest.mark.parametrize("reduction", ["sample", "batch"])
@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_batches_made_in_inference_mode_or_with_gradients(name, reduction):
    model, x = make_network(name, 5)
    right = estimate_importance(model, [x], "mas", reduction=reduction)
    with torch.inference_mode():
        made = x.clone()

    for batch in (made, x.clone().requires_grad_()):
        importance = estimate_importance(model, [{"input": batch}, batch][1:], "mas", reduction=reduction)
        assert relative_error({n: v.detach() for n, v in importance.items()}, right) <= 1e-12
        assert not any(value.requires_grad for value in importance.values())
    assert made.is_inference()


# The published code's estimate


@pytest.mark.parametrize("kind", ["mas", "fisher", "empirical_fisher"])
@pytest.mark.parametrize("sizes", [[3, 3, 2], [1, 7], [8]], ids=str)
@pytest.mark.parametrize("name", ["mlp", "batch_norm", "tied"])
def test_reduction_batch_equals_the_protocols_formulas(name, kind, sizes):
    model, x = make_network(name, 8)
    batches = _batches(x, sizes)
    generator = torch.Generator().manual_seed(5)
    labels = [batch_labels for _, batch_labels in batches]
    if kind == "fisher":
        chances = [model.eval()(images).softmax(1) for images, _ in batches]
        labels = [torch.multinomial(p, 1, replacement=True, generator=generator)[:, 0] for p in chances]
    right = naive_batch_importance(model, [images for images, _ in batches], kind, labels)

    importance = estimate_importance(
        model.train(), batches, kind, reduction="batch", generator=torch.Generator().manual_seed(5)
    )

    assert relative_error(importance, right) <= 1e-10
    assert (importance.kind, importance.num_samples, importance.reduction) == (kind, 8, "batch")
    assert set(importance.routes.values()) == {"batch"}


@pytest.mark.parametrize(("kind", "floor"), [("mas", 0.0), ("fisher", 1e-8), ("empirical_fisher", 0.0)])
def test_only_the_published_fisher_has_a_floor(kind, floor):
    model, x = make_network("mlp", 4)
    nn.init.zeros_(model[1].weight), nn.init.constant_(model[1].bias, -1.0)  # the first layer's units are dead

    importance = estimate_importance(model, [(x, _labels(x))], kind, reduction="batch")

    assert importance["1.weight"].unique().tolist() == [floor]
    assert estimate_importance(model, [(x, _labels(x))], kind)["1.weight"].unique().tolist() == [0.0]


def test_the_published_estimate_cancels_what_the_exact_one_does_not():
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    x = torch.tensor([[1.0], [3.0]])

    assert estimate_importance(model, [x], "mas")["weight"].item() == pytest.approx((2 + 18) / 2)
    assert estimate_importance(model, [x[:1], x[1:]], "mas", reduction="batch")["weight"].item() == pytest.approx(10)
    signed = nn.Sequential(nn.Linear(1, 1))
    nn.init.ones_(signed[0].weight), nn.init.zeros_(signed[0].bias)
    batch = torch.tensor([[1.0], [-1.0]])
    assert estimate_importance(signed, [batch], "mas", reduction="batch")["0.bias"].item() == 0.0
    assert estimate_importance(signed, [batch], "mas")["0.bias"].item() == 2.0


# The model is left as it was


class _Traced(nn.Module):
    """Counts its forwards in a buffer, in place or in a new tensor."""

    def __init__(self, network, in_place=True):
        super().__init__()
        self.network, self.in_place = network, in_place
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        if self.in_place:
            self.calls += 1
        else:
            self.calls = self.calls + 1
        return self.network(x)


def _model_with_a_state():
    torch.manual_seed(0)
    model = _Traced(nn.Sequential(batch_norm_network(), nn.Dropout(), nn.Linear(3, 3)))
    model.train()
    model.network[0][1].eval()
    model.network[1].eval()
    model.network[0][3].weight.requires_grad_(False)
    for k, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, float(k)) if k % 2 else None
    model.network[0][0].register_forward_hook(lambda module, args, output: None)
    model.network[2].register_forward_pre_hook(lambda module, args: None)
    return model


def _state(model):
    modules = list(model.modules())
    return {
        "parameters": [(name, id(p), p.detach().clone()) for name, p in model.named_parameters()],
        "gradients": [(id(p.grad), None if p.grad is None else p.grad.clone()) for p in model.parameters()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "buffers": [(name, id(b), b.clone()) for name, b in model.named_buffers()],
        "attributes": [(list(vars(m)), list(m._modules), list(m._parameters), list(m._buffers)) for m in modules],
        "modes": [m.training for m in modules],
        "hooks": [
            [len(getattr(m, name)) for name in vars(m) if "hook" in name and hasattr(getattr(m, name), "__len__")]
            for m in modules
        ],
        "torch": torch.get_rng_state(),
        "numpy": repr(np.random.get_state()),
        "python": random.getstate(),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
    }


def _equal(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(_equal, a, b))
    return a == b


def _changes(before, after):
    return [what for what in before if not _equal(before[what], after[what])]


def _random_batches(stop=None):
    for k in range(3):
        if k == 1 and stop is not None:
            raise stop
        np.random.rand(), random.random()
        yield torch.randn(4, 3, 14, 14), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize("stop", [None, RuntimeError("broken file"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("reduction", ["sample", "batch"])
@pytest.mark.parametrize("kind", ["mas", "fisher"])
def test_the_model_and_the_generators_are_left_as_they_were(kind, reduction, stop):
    model = _model_with_a_state()
    before = _state(model)

    if stop is None:
        estimate_importance(model, _random_batches(), kind, reduction=reduction)
    else:
        with pytest.raises(type(stop)):
            estimate_importance(model, _random_batches(stop), kind, reduction=reduction)

    assert _changes(before, _state(model)) == []


class _Centred(nn.Linear):
    """Mixes samples without failing on a single one."""

    def forward(self, x):
        y = super().forward(x)
        return y - y.mean(0)


class _Interrupted(nn.Module):
    """Fails at one of its forwards, wherever that is in the pass."""

    def __init__(self, network, failing_call):
        super().__init__()
        self.network, self.calls_left = network, iter(range(failing_call - 1, -1, -1))

    def forward(self, x):
        if next(self.calls_left, None) == 0:  # an attribute would be put back after each forward
            raise KeyboardInterrupt("in a forward")
        return self.network(x)


@pytest.mark.parametrize("failing_call", range(1, 9))
@pytest.mark.parametrize("network", ["mlp", "attention", "data_dependent", "mixes samples"])
def test_an_interrupt_in_any_forward_leaves_the_model_as_it_was(network, failing_call):
    inner, x = (_Centred(6, 3), torch.randn(4, 6)) if network == "mixes samples" else make_network(network, 4)
    model = _Interrupted(inner, failing_call)
    before = _state(model)

    with pytest.raises((KeyboardInterrupt, ValueError), match=r"in a forward|mixes"):
        estimate_importance(model, [x] * 10, "mas")

    assert _changes(before, _state(model)) == []


def test_training_goes_on_after_an_estimate_in_inference_mode():
    """A buffer that is an inference tensor afterwards would make the next fit crash."""
    model, x = _Traced(batch_norm_network()), torch.randn(4, 3, 14, 14)
    with torch.inference_mode():
        estimate_importance(model, [x.clone()], "mas")

    model.train()(x).square().sum().backward()

    assert not any(t.is_inference() for t in (*model.parameters(), *model.buffers()))
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.dim() == 4)


@pytest.mark.parametrize("reduction", ["sample", "batch"])
def test_a_buffer_that_forward_replaces_is_left_as_it_was(reduction):
    model, x = _Traced(mlp(), in_place=False), torch.randn(4, 12)
    before = _state(model)

    estimate_importance(model, [x, x], "mas", reduction=reduction)

    assert _changes(before, _state(model)) == []


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        pytest.param(MixesSamples(), torch.randn(4, 6), id="mixes samples"),
        pytest.param(mlp(), torch.full((4, 12), float("nan")), id="NaN"),
        pytest.param(mlp(), torch.randn(4, 11), id="wrong shape"),
        pytest.param(mlp(), (torch.randn(4, 12), torch.tensor([0, 1, 7, 2])), id="wrong label"),
    ],
)
@pytest.mark.parametrize("reduction", ["sample", "batch"])
def test_a_refused_model_is_left_as_it_was(model, batch, reduction):
    before = _state(model)

    if not (reduction == "batch" and isinstance(model, MixesSamples)):
        with pytest.raises((ValueError, RuntimeError)):
            estimate_importance(
                model, [batch], "empirical_fisher" if isinstance(batch, tuple) else "mas", reduction=reduction
            )
    else:
        estimate_importance(model, [batch], "mas", reduction=reduction)

    assert _changes(before, _state(model)) == []


# What is refused


def _untouched():
    pytest.fail("a batch was read before the options were checked")
    yield


def _frozen():
    return mlp().requires_grad_(False)


@pytest.mark.parametrize(
    ("model", "kind", "options", "message"),
    [
        (mlp(), "ewc", {}, "Unknown importance kind 'ewc'. Known: mas, fisher, empirical_fisher"),
        (mlp(), "mas", {"reduction": "mean"}, "reduction must be one of sample, batch; got 'mean'"),
        (mlp(), "fisher", {"draws": 0}, 'positive integer or "all"; got 0'),
        (mlp(), "fisher", {"draws": 1.5}, 'positive integer or "all"; got 1.5'),
        (mlp(), "fisher", {"draws": "every"}, "got 'every'"),
        (mlp(), "mas", {"draws": 3}, "kind='mas' takes no draws; got draws=3. It is for 'fisher'"),
        (mlp(), "fisher", {"draws": "all", "reduction": "batch"}, "draws='all' needs reduction='sample'"),
        (mlp(), "mas", {"max_scratch_mb": 0}, "max_scratch_mb must be positive and finite; got 0"),
        (mlp(), "mas", {"exclude": ("5.wieght",)}, r"'5\.wieght' is no parameter.*5\.weight"),
        (mlp(), "mas", {"exclude": ("1", "")}, "'' is no parameter"),
        (mlp(), "mas", {"exclude": "5.weight"}, "sequence of names; got the string '5.weight'"),
        (mlp(), "mas", {"module": "body"}, "no module 'body'"),
        (mlp(), "mas", {"module": "1.weight"}, r"no module '1\.weight'"),
        (mlp(), "mas", {"exclude": ("1", "3", "5")}, "No parameter needs a gradient"),
        (mlp(), "mas", {"module": "1", "exclude": ("1",)}, "No parameter needs a gradient"),
        (_frozen(), "mas", {}, "No parameter needs a gradient"),
        (nn.ReLU(), "mas", {}, "No parameter needs a gradient"),
    ],
)
def test_bad_options_are_refused_before_a_batch_is_read(model, kind, options, message):
    with pytest.raises(ValueError, match=message):
        estimate_importance(model, _untouched(), kind, **options)


class _Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 3)

    def forward(self, x):
        return self.layer(x).repeat_interleave(2, 0)


_X = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
_Y = torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize("reduction", ["sample", "batch"])
@pytest.mark.parametrize(
    ("model", "batches", "kind", "message"),
    [
        pytest.param(mlp(), [], "mas", "dataloader has no samples", id="empty loader"),
        pytest.param(mlp(), [_X[:0]], "mas", "dataloader has no samples", id="empty batch"),
        pytest.param(mlp(), [_X], "empirical_fisher", "true labels are needed.*Tensor", id="no labels"),
        pytest.param(
            mlp(), [{"input": _X}], "empirical_fisher", "true labels are needed.*dict", id="no labels in a dict"
        ),
        pytest.param(mlp(), [(_X, _Y[:3])], "empirical_fisher", "label", id="too few labels"),
        pytest.param(mlp(), [(_X, _Y[:1])], "empirical_fisher", "label", id="one label"),
        pytest.param(mlp(), [(_X, _Y + 1)], "empirical_fisher", "label", id="label out of range"),
        pytest.param(mlp(), [(_X, _Y + 0.5)], "empirical_fisher", "label", id="labels are no integers"),
        pytest.param(nn.Linear(12, 1), [(_X, _Y)], "fisher", r"at least two classes; got \(4, 1\)", id="one class"),
        pytest.param(nn.Linear(12, 1), [(_X, _Y)], "empirical_fisher", "at least two classes", id="one class, labels"),
        pytest.param(nn.Unflatten(1, (3, 4)), [_X], "mas", "No parameter needs a gradient", id="no parameters"),
        pytest.param(mlp(), [_X * float("nan")], "mas", "NaN", id="NaN"),
        pytest.param(mlp(), [_X, _X * float("nan")], "mas", "NaN", id="NaN later"),
        pytest.param(mlp(), [_X * float("nan")], "fisher", "NaN", id="NaN, fisher"),
        pytest.param(mlp(), [torch.tensor(1.0)], "mas", "batch dimension; got Tensor", id="no batch"),
        pytest.param(_Twice(), [_X], "mas", "rows", id="twice the rows"),
    ],
)
def test_bad_input_is_refused(model, batches, kind, message, reduction):
    with pytest.raises(ValueError, match=message):
        estimate_importance(model, batches, kind, reduction=reduction)


def test_a_model_that_mixes_samples_is_refused_by_the_modules_name():
    model = nn.Sequential(MixesSamples())

    with pytest.raises(ValueError, match=r"'0\.norm' \(BatchNorm1d\).* mix.* samples.*track_running_stats=False"):
        estimate_importance(model, [torch.randn(4, 6)], "mas")


def test_logits_that_no_parameter_can_change_are_refused():
    """All importances would be zero, and a merge would ignore the expert."""
    with pytest.raises(ValueError, match="gradient"):
        estimate_importance(mlp(), [_X], "mas", forward=lambda model, batch: model(batch).detach())


# Several processes, and progress


@pytest.mark.parametrize(
    ("kind", "reduction"), [("mas", "sample"), ("empirical_fisher", "sample"), ("mas", "batch"), ("fisher", "batch")]
)
def test_all_reduce_gives_the_importance_of_all_processes_data(kind, reduction):
    """Two processes of different size; what the other one sends is recorded first."""
    model, x = make_network("batch_norm", 8)
    batches = _batches(x, [3, 3, 2])
    if kind == "fisher":  # labels are drawn: make each batch draw the same on any process
        nn.init.zeros_(model[11].weight), nn.init.constant_(model[11].bias, 0.0)
        model[11].bias.data[1] = 100.0
    sent = []
    estimate_importance(
        model, batches[:1], kind, reduction=reduction, all_reduce=lambda total: (sent.append(total.clone()), total)[1]
    )
    received = iter(sent)

    importance = estimate_importance(
        model, batches[1:], kind, reduction=reduction, all_reduce=lambda total: total + next(received)
    )

    right = estimate_importance(model, batches, kind, reduction=reduction)
    assert next(received, None) is None
    assert importance.num_samples == 8
    assert relative_error(importance, right) <= 1e-10


def test_a_process_without_data_takes_part():
    model, x = make_network("mlp", 8)
    sent = []
    estimate_importance(model, [x], "mas", all_reduce=lambda total: (sent.append(total.clone()), total)[1])
    received = iter(sent)

    importance = estimate_importance(model, [], "mas", all_reduce=lambda total: total + next(received))

    assert importance.num_samples == 8
    assert relative_error(importance, estimate_importance(model, [x], "mas")) <= 1e-12


@pytest.mark.parametrize("progress", [True, False])
def test_progress_writes_nothing_for_a_short_pass(capfd, progress):
    model, x = make_network("mlp", 4)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimate_importance(model, [x], "mas", progress=progress)

    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("batches", [1, 2], ids=["one batch", "the next batch"])
def test_mixing_shows_although_the_first_samples_are_the_same(batches):
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(6, 3)

        def forward(self, x):
            return self.last(x - x.mean(0))

    same, different = torch.ones(3, 6), torch.randn(3, 6)
    data = [torch.cat([same, different])] if batches == 1 else [same, different]
    with pytest.raises(ValueError, match="mixes the samples"):
        estimate_importance(Centred(), data, "mas")


def test_a_model_that_fails_on_one_sample_gives_its_own_reason():
    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(6, 3)

        def forward(self, x):
            if len(x) < 2:
                raise RuntimeError("pairs only")
            return self.last(x)

    with pytest.raises(ValueError, match="fails on one of its samples alone: pairs only"):
        estimate_importance(Pairs(), [torch.randn(4, 6)], "mas")


def test_a_rule_may_be_of_parameters_of_any_name():
    from pl_personalize.per_sample import layer_rules

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.rand(6))

        def forward(self, x):
            return x * self.factor

    try:
        layer_rules.register_layer_rule(Scale)(lambda layer, x, grad: {"factor": x * grad})
        network, x = nn.Sequential(Scale(), nn.Linear(6, 3)), torch.randn(5, 6)
        importance = estimate_importance(network, [x], "mas")
    finally:
        layer_rules._RULES.pop(Scale.forward)
    assert importance.routes["0.factor"] == "closed form"
    assert relative_error(importance, naive_importance(network, x, "mas")) < 1e-5
