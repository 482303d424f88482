"""Importances agree with what BackPACK and nngeometry, written by others, make of the same network."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from networks import mlp
from reference import relative_error
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pl_personalize import estimate_importance

# From BackPACK: the first layer's input needs no gradient.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")

NUM_SAMPLES, NUM_CLASSES = 7, 3


def small_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 5, 3),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(5, NUM_CLASSES),
    )


NETWORKS = {"mlp": (mlp, (12,)), "cnn": (small_cnn, (2, 8, 8))}
each_network = pytest.mark.parametrize("name", NETWORKS)
each_loss_reduction = pytest.mark.parametrize("loss_reduction", ["sum", "mean"])


@pytest.fixture(autouse=True)
def double_precision(global_state: None) -> None:
    """Both make constants in the default dtype."""
    torch.set_default_dtype(torch.float64)


def network_and_data(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    factory, shape = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(4)
        network = factory().double().eval()
        return network, torch.randn(NUM_SAMPLES, *shape, dtype=torch.float64), torch.arange(NUM_SAMPLES) % NUM_CLASSES


# BackPACK: its sums are of gradients of the loss as it is, so with "mean" each sample's gradient is divided by their
# number, and the sum of squares by its square.


def backpack_values(
    network: nn.Module, x: Tensor, target: Tensor, loss: nn.Module, extension: str
) -> dict[str, Tensor]:
    """What one of BackPACK's extensions finds for each parameter."""
    backpack = pytest.importorskip("backpack")
    extensions = pytest.importorskip("backpack.extensions")
    network, loss = backpack.extend(network), backpack.extend(loss)
    quantity = getattr(extensions, extension)()
    with backpack.backpack(quantity):
        loss(network(x), target).backward()
    return {name: getattr(p, quantity.savefield).detach() for name, p in network.named_parameters()}


@each_loss_reduction
@each_network
def test_empirical_fisher_is_backpacks_sum_of_squared_gradients(name: str, loss_reduction: str) -> None:
    network, x, y = network_and_data(name)
    importance = estimate_importance(network, [(x[:4], y[:4]), (x[4:], y[4:])], "empirical_fisher")

    sums = backpack_values(network, x, y, nn.CrossEntropyLoss(reduction=loss_reduction), "SumGradSquared")

    scale = 1 / NUM_SAMPLES if loss_reduction == "sum" else NUM_SAMPLES
    assert relative_error(importance, {n: value * scale for n, value in sums.items()}) <= 1e-10


@each_network
def test_sampled_fisher_is_backpacks_sum_of_squared_gradients_for_the_drawn_labels(name: str) -> None:
    network, x, _ = network_and_data(name)
    importance = estimate_importance(network, [x], "fisher", generator=torch.Generator().manual_seed(5))
    drawn = torch.multinomial(network(x).softmax(1), 1, generator=torch.Generator().manual_seed(5))[:, 0]

    sums = backpack_values(network, x, drawn, nn.CrossEntropyLoss(reduction="sum"), "SumGradSquared")

    assert relative_error(importance, {n: value / NUM_SAMPLES for n, value in sums.items()}) <= 1e-10


@each_loss_reduction
@each_network
def test_expected_fisher_is_the_diagonal_of_backpacks_exact_gauss_newton_matrix(name: str, loss_reduction: str) -> None:
    """For a cross-entropy of a softmax the two matrices are one, and linear in the loss."""
    network, x, y = network_and_data(name)
    importance = estimate_importance(network, [x[:5], x[5:]], "fisher", draws="all")

    diagonal = backpack_values(network, x, y, nn.CrossEntropyLoss(reduction=loss_reduction), "DiagGGNExact")

    scale = 1 / NUM_SAMPLES if loss_reduction == "sum" else 1
    assert relative_error(importance, {n: value * scale for n, value in diagonal.items()}) <= 1e-10


@each_loss_reduction
@each_network
def test_mas_is_the_mean_absolute_value_of_backpacks_single_gradients(name: str, loss_reduction: str) -> None:
    """A squared error to zero is the squared norm; its mean is over the entries of all outputs."""
    network, x, _ = network_and_data(name)
    importance = estimate_importance(network, [x], "mas")

    single = backpack_values(
        network, x, torch.zeros(NUM_SAMPLES, NUM_CLASSES).double(), nn.MSELoss(reduction=loss_reduction), "BatchGrad"
    )

    scale = 1 if loss_reduction == "sum" else NUM_SAMPLES * NUM_CLASSES
    assert relative_error(importance, {n: value.abs().mean(0) * scale for n, value in single.items()}) <= 1e-10


# nngeometry: means over the samples.


def nngeometry_diagonal(network: nn.Module, x: Tensor, y: Tensor, make: str, **options: object) -> Mapping[str, Tensor]:
    """The diagonal of nngeometry's Fisher information, by the names of the parameters."""
    metrics = pytest.importorskip("nngeometry.metrics")
    objects = pytest.importorskip("nngeometry.object")
    layers = pytest.importorskip("nngeometry.layercollection").LayerCollection.from_model(network)
    # A loader that has no generator of its own draws from the global one.
    loader = DataLoader(TensorDataset(x, y), batch_size=3, generator=torch.Generator())
    matrix = getattr(metrics, make)(
        network, loader, objects.PMatDiag, variant="classif_logits", layer_collection=layers, **options
    )
    names = {id(p): name for name, p in network.named_parameters()}
    modules, _ = layers.get_layerid_module_maps(network)
    values = objects.PVector(layers, vector_repr=matrix.get_diag()).to_dict()
    return {
        names[id(p)]: value.detach()
        for layer, parts in values.items()
        for p, value in zip((modules[layer].weight, modules[layer].bias), parts, strict=True)
    }


@each_network
def test_expected_fisher_is_nngeometrys_closed_form(name: str) -> None:
    network, x, y = network_and_data(name)

    importance = estimate_importance(network, x.split(3), "fisher", draws="all")

    assert relative_error(importance, nngeometry_diagonal(network, x, y, "FIM")) <= 1e-8


@pytest.mark.parametrize("draws", [1, 5])
@each_network
def test_sampled_fisher_is_nngeometrys_for_the_same_draws(name: str, draws: int) -> None:
    """Both draw from the softmax by ``torch.multinomial``, batch after batch."""
    network, x, y = network_and_data(name)
    with torch.random.fork_rng():
        torch.manual_seed(8)
        theirs = nngeometry_diagonal(network, x, y, "FIM_MonteCarlo", trials=draws)

    importance = estimate_importance(
        network, x.split(3), "fisher", draws=draws, generator=torch.Generator().manual_seed(8)
    )

    assert relative_error(importance, theirs) <= 1e-10
