"""Importances equal a loop over single samples, whatever the network, the batches and the parameters."""

import pytest
import torch
from networks import NETWORKS, labelled_batches, labels_of, make_network
from reference import KINDS, naive_importance, relative_error
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pl_personalize import estimate_importance

TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}


# Exactness


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_importances_equal_a_loop_over_samples(name, kind, dtype):
    model, x = make_network(name, 8, dtype)
    reference, options = KINDS[kind]
    right = naive_importance(model, x, reference, labels_of(x))

    importance = estimate_importance(model.train(), labelled_batches(x, [3, 1, 4]), kind, **options)

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
    batches = [(images[order.argsort()][order], labels) for images, labels in labelled_batches(x, [8])]
    right = estimate_importance(model, batches, kind, **KINDS[kind][1])
    shuffled = list(zip(x[order].split(sizes), labels_of(x)[order].split(sizes), strict=True))

    importance = estimate_importance(model, shuffled, kind, **KINDS[kind][1], **options)

    assert importance.num_samples == 8
    assert relative_error(importance, right) <= 1e-12


def test_a_dataloader_is_taken_as_it_is():
    model, x = make_network("mlp", 8, torch.float32)
    loader = DataLoader(TensorDataset(x, labels_of(x)), batch_size=3, shuffle=True)

    importance = estimate_importance(model, loader, "empirical_fisher")

    assert relative_error(importance, naive_importance(model, x, "empirical_fisher", labels_of(x))) <= 1e-5


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
