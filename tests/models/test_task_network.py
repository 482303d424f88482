"""Networks with a body and a head."""

import pytest
import torch
from torch import nn

from pl_personalize.models import MultiHeadNetwork, TaskNetwork, mlp


def test_the_logits_are_head_of_body():
    body, head = nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.Tanh()), nn.Linear(4, 3)
    x = torch.randn(5, 2, 3)
    assert torch.equal(TaskNetwork(body, head)(x), body(x) @ head.weight.T + head.bias)


def test_the_mlp_is_the_papers():
    network = mlp((3, 28, 28), num_classes=2)
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
    assert shapes == {
        "body.hidden1.weight": (100, 2352), "body.hidden1.bias": (100,),
        "body.hidden2.weight": (100, 100), "body.hidden2.bias": (100,),
        "head.weight": (2, 100), "head.bias": (2,),
    }  # fmt: skip


def test_the_mlp_computes_what_it_says():
    network, x = mlp((2, 3), num_classes=4, hidden=(5, 7)), torch.randn(6, 2, 3)
    w = dict(network.named_parameters())
    h = (x.flatten(1) @ w["body.hidden1.weight"].T + w["body.hidden1.bias"]).clamp_min(0)
    h = (h @ w["body.hidden2.weight"].T + w["body.hidden2.bias"]).clamp_min(0)
    torch.testing.assert_close(network(x), h @ w["head.weight"].T + w["head.bias"])


def test_the_mlp_without_hidden_layers_is_linear():
    network, x = mlp((2, 3), num_classes=4, hidden=()), torch.randn(6, 2, 3)
    torch.testing.assert_close(network(x), x.flatten(1) @ network.head.weight.T + network.head.bias)


@pytest.mark.parametrize("bias", [True, False])
def test_a_new_head_replaces_the_old_and_leaves_the_body(bias):
    torch.manual_seed(0)
    network = TaskNetwork(nn.Linear(6, 4), nn.Linear(4, 3, bias=bias))
    old, body = network.head, {name: p.clone() for name, p in network.body.named_parameters()}
    head = network.new_head(5)

    assert head is network.head
    assert (head.in_features, head.out_features, head.bias is not None) == (4, 5, bias)
    assert not torch.equal(head.weight[:3], old.weight)
    assert all(torch.equal(p, body[name]) for name, p in network.body.named_parameters())
    assert network(torch.randn(2, 6)).shape == (2, 5)


def test_a_new_head_goes_where_the_network_is():
    network = mlp((2,), num_classes=2, hidden=(4,)).double()
    network.new_head(3)
    assert network.head.weight.dtype == torch.float64
    assert network(torch.randn(2, 2, dtype=torch.float64)).shape == (2, 3)


def test_each_task_has_its_head():
    body, heads = nn.Linear(6, 4), [nn.Linear(4, classes) for classes in (2, 5)]
    network, x = MultiHeadNetwork(body, heads), torch.randn(3, 6)
    for task, head in enumerate(heads):
        assert torch.equal(network(x, task), head(body(x)))
    assert sorted(network.state_dict()) == [
        "body.bias", "body.weight", "heads.0.bias", "heads.0.weight", "heads.1.bias", "heads.1.weight",
    ]  # fmt: skip
