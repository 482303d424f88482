"""Learned merging: finds the coefficients that are right, starts from the merge, and changes nothing else."""

import copy

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from pl_personalize import BatchNormStatistics, merge
from pl_personalize.learned_merging import learn_merge
from pl_personalize.models import MultiHeadNetwork, TaskNetwork, cnn_bn, mlp

LOSSES = ("kl", "mse")


def _linear(weight, head=None):
    network = TaskNetwork(nn.Linear(2, 2, bias=False), nn.Linear(2, 2))
    with torch.no_grad():
        network.body.weight.copy_(torch.tensor(weight))
        if head is not None:
            network.head.weight.copy_(torch.tensor(head))
    return network


def _images(*shape, tasks=2, batches=2):
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(*shape, generator=generator) for _ in range(batches)] for _ in range(tasks)]


def _experts(factory, count=2):
    states = []
    for k in range(count):
        torch.manual_seed(k)
        states.append(factory(k + 2).state_dict())
    return states


def _error(network, state, experts, images):
    """Mean squared error of the merged network to the experts' logits."""
    errors = []
    for task, expert in enumerate(experts):
        own = copy.deepcopy(network).eval()
        own.new_head(len(expert["head.weight"]))
        logits = []
        for head, body in (("head.", expert), (f"heads.{task}.", state)):
            entries = {n: v for n, v in body.items() if n.startswith("body.")}
            entries |= {f"head.{n.removeprefix(head)}": v for n, v in body.items() if n.startswith(head)}
            own.load_state_dict(entries)
            with torch.no_grad():
                logits.append(own(torch.cat(images[task])))
        errors.append((logits[0] - logits[1]).square().sum(1).mean())
    return float(torch.stack(errors).mean())


@pytest.mark.parametrize("per", ["tensor", "channel"])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_coefficient_of_an_expert_that_is_right_for_all_tasks_tends_to_1(loss, per):
    right, wrong = [[1.0, -2.0], [0.5, 1.0]], [[1.0, 1.0], [0.5, -2.0]]
    head = [[1.0, 0.5], [-0.5, 1.0]]
    images = _images(16, 2, batches=1)
    for batch in images[1]:
        batch[:, 1] = 0  # in task 2 the experts' bodies are the same

    experts = [_linear(weight, head).state_dict() for weight in (right, wrong)]
    state = learn_merge(_linear(right), experts, images, per=per, loss=loss, epochs=200)

    torch.testing.assert_close(state["body.weight"], torch.tensor(right), rtol=0, atol=0.02)


def test_channels_come_from_the_experts_whose_heads_read_them():
    a, b = [[1.0, -2.0], [0.5, 1.0]], [[2.0, 1.0], [1.0, -1.5]]
    experts = [_linear(a, [[1.0, 0.0], [-1.0, 0.0]]).state_dict(), _linear(b, [[0.0, 1.0], [0.0, -1.0]]).state_dict()]
    images, options = _images(16, 2, batches=1), {"loss": "mse", "epochs": 200}

    channels = learn_merge(_linear(a), experts, images, per="channel", **options)["body.weight"]
    tensors = learn_merge(_linear(a), experts, images, per="tensor", **options)["body.weight"]

    torch.testing.assert_close(channels, torch.tensor([a[0], b[1]]), rtol=0, atol=0.02)
    assert (tensors - channels).abs().max() > 0.2


@pytest.mark.parametrize("parameters", ["coefficients", "heads", "all"])
def test_identical_experts_stay_as_they_are(parameters):
    (expert,) = _experts(lambda k: mlp((3,), k, [4]), 1)

    state = learn_merge(mlp((3,), 2, [4]), [expert] * 2, _images(8, 3), parameters=parameters, loss="mse", epochs=2)

    for name, value in expert.items():
        names = [name] if name.startswith("body.") else [name.replace("head", f"heads.{task}") for task in range(2)]
        assert all(torch.equal(state[other], value) for other in names), name


def test_a_start_that_is_right_stays():
    right, wrong = [[1.0, -2.0], [0.5, 1.0]], [[1.0, 1.0], [0.5, -2.0]]
    images = _images(16, 2)
    for batch in images[1]:
        batch[:, 1] = 0
    experts = [_linear(weight).state_dict() for weight in (right, wrong)]
    start = merge(experts, [{"body.weight": torch.full((2, 2), value)} for value in (1.0, 0.0)])

    state = learn_merge(_linear(right), experts, images, start, loss="mse", epochs=2)

    assert torch.equal(state["body.weight"], torch.tensor(right))


@pytest.mark.parametrize("parameters", ["coefficients", "all"])
def test_batch_norm_statistics_of_the_start_stay(parameters):
    experts = _experts(lambda k: cnn_bn((1, 8, 8), k, [2, 2]))
    start = cnn_bn((1, 8, 8), 2, [2, 2]).state_dict()
    start = {name: value + 0.25 if "running" in name else value for name, value in start.items()}

    state = learn_merge(cnn_bn((1, 8, 8), 2, [2, 2]), experts, _images(6, 1, 8, 8), start, parameters=parameters)

    assert all(torch.equal(state[name], value) for name, value in start.items() if "running" in name)


def test_more_learned_parameters_come_closer_to_the_experts():
    network, images = mlp((3,), 2, [8]), _images(16, 3, batches=1)
    experts = _experts(lambda k: mlp((3,), k, [8]))
    body = merge([{n: v for n, v in expert.items() if n.startswith("body.")} for expert in experts])
    heads = [{f"heads.{task}.{n}": experts[task][f"head.{n}"] for n in ("weight", "bias")} for task in range(2)]
    states = [body | heads[0] | heads[1]]

    for parameters in ("coefficients", "heads", "all"):
        options = {"parameters": parameters, "loss": "mse", "epochs": 40, "lr": 1e-3}
        states.append(learn_merge(network, experts, images, per="tensor", **options))

    errors = [_error(network, state, experts, images) for state in states]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.7 * errors[0]
    for name, value in states[1].items():
        assert torch.equal(value, states[2][name]) == name.startswith("body.")  # the heads only
        if not name.startswith("body."):
            assert torch.equal(value, states[0][name])


def test_the_state_dict_fits_a_network_with_all_heads():
    experts = _experts(lambda k: mlp((3,), k, [4]), 3)

    state = learn_merge(mlp((3,), 2, [4]), experts, _images(8, 3, tasks=3), epochs=1)

    network = MultiHeadNetwork(mlp((3,), 2, [4]).body, [nn.Linear(4, classes) for classes in (2, 3, 4)])
    network.load_state_dict(state)
    assert network(torch.zeros(1, 3), 2).shape == (1, 4)


@pytest.mark.parametrize("parameters", ["coefficients", "all"])
def test_batch_norm_statistics_are_averaged_and_not_learned(parameters):
    experts = _experts(lambda k: cnn_bn((1, 8, 8), k, [2, 2]))
    for expert in experts:
        for name, value in expert.items():
            if "running" in name:
                value.add_(0.1 * torch.rand_like(value))
    network = cnn_bn((1, 8, 8), 2, [2, 2])
    names = [name for name in experts[0] if "running" in name]
    average = BatchNormStatistics.average([{name: expert[name] for name in names} for expert in experts])

    state = learn_merge(network, experts, _images(6, 1, 8, 8), parameters=parameters, epochs=2)

    assert all(torch.equal(state[name], average[name]) for name in names)
    gamma = "body.block1.norm.weight"
    assert not torch.equal(state[gamma], (experts[0][gamma] + experts[1][gamma]) / 2)


class _Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x).tanh())


@pytest.mark.parametrize("parameters", ["coefficients", "all"])
def test_tied_weights_stay_tied(parameters):
    def factory(classes):
        return TaskNetwork(_Tied(), nn.Linear(3, classes))

    experts, images = _experts(factory), _images(16, 3, batches=1)

    state = learn_merge(factory(2), experts, images, parameters=parameters, loss="mse", epochs=40)

    assert torch.equal(state["body.a.weight"], state["body.b.weight"])
    start = merge([{n: v for n, v in expert.items() if n.startswith("body.")} for expert in experts])
    start |= {f"heads.{task}.{n}": experts[task][f"head.{n}"] for task in range(2) for n in ("weight", "bias")}
    assert _error(factory(2), state, experts, images) < _error(factory(2), start, experts, images)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_nothing_else_changes(context):
    network = cnn_bn((1, 8, 8), 2, [2, 2]).train()
    network.body.block1.eval()
    experts, images = _experts(lambda k: cnn_bn((1, 8, 8), k, [2, 2])), _images(6, 1, 8, 8)
    before = copy.deepcopy((network.state_dict(), experts, images))
    modes = [module.training for module in network.modules()]
    random_state = torch.get_rng_state()

    with context():
        learn_merge(network, experts, images, parameters="all", epochs=1)

    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in network.modules()] == modes
    assert all(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())
    torch.testing.assert_close((network.state_dict(), experts, images), before, rtol=0, atol=0)


def test_the_seed_determines_the_result():
    network, experts, images = mlp((3,), 2, [4]), _experts(lambda k: mlp((3,), k, [4])), _images(4, 3, batches=5)

    def weight(seed):
        return learn_merge(network, experts, images, epochs=2, seed=seed)["body.hidden1.weight"]

    torch.manual_seed(1)
    first = weight(1)
    torch.manual_seed(2)
    assert torch.equal(weight(1), first)
    assert not torch.equal(weight(2), first)


def test_labels_are_ignored_and_empty_batches_skipped():
    network, experts, images = mlp((3,), 2, [4]), _experts(lambda k: mlp((3,), k, [4])), _images(4, 3)
    labelled = [[(x, torch.zeros(len(x), dtype=torch.long)) for x in [*task, task[0][:0]]] for task in images]

    expected = learn_merge(network, experts, images, epochs=2)
    state = learn_merge(network, experts, [iter(task) for task in labelled], epochs=2)

    assert all(torch.equal(state[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": _images(4, 3, tasks=3)}, ValueError, "2 experts and the images of 3 tasks"),
        ({"experts": [], "images": []}, ValueError, "0 experts"),
        ({"images": torch.zeros(2, 4, 3)}, ValueError, "images must be a sequence .* got a Tensor"),
        ({"images": [torch.zeros(4, 3)] * 2}, ValueError, "images of task 1 are one tensor"),
        ({"images": [_images(4, 3)[0], []]}, ValueError, "no images of task 2"),
        ({"images": [_images(4, 3)[0], [torch.full((4, 3), torch.nan)]]}, ValueError, "logits of expert 2 are NaN"),
        ({"experts": [mlp((3,), 2, [4]), {}]}, ValueError, "Expert 1 is no state dict .* it is a TaskNetwork"),
        ({"experts": _experts(lambda k: mlp((3,), k, [5]))}, ValueError, "(?s)Expert 1 does not fit .*hidden1.weight"),
        ({"start": {"body.hidden1.weight": torch.ones(4, 2)}}, ValueError, "start has no .* for body.hidden1.weight"),
        ({"start": mlp((3,), 2, [4]).body.state_dict()}, ValueError, "for body.hidden1.weight, body.hidden1.bias"),
        ({"parameters": "body"}, MisconfigurationException, "parameters must be one of .* got 'body'"),
        ({"per": "layer"}, MisconfigurationException, "per must be one of tensor, channel; got 'layer'"),
        ({"loss": "l1"}, MisconfigurationException, "loss must be one of kl, mse; got 'l1'"),
        ({"epochs": 0}, MisconfigurationException, "epochs must be 1 or more; got 0"),
        ({"lr": 0.0}, MisconfigurationException, "lr must be positive; got 0.0"),
        ({"parameters": "all", "lr": 1e30, "loss": "mse"}, ValueError, "The loss is .* try a smaller lr"),
    ],
)
def test_misuse_is_refused(change, error, message):
    arguments = {"experts": _experts(lambda k: mlp((3,), k, [4])), "images": _images(4, 3)}

    with pytest.raises(error, match=message):
        learn_merge(mlp((3,), 2, [4]), **{**arguments, **change})


def test_half_precision_is_learned_in_float32():
    experts = [{n: v.half() for n, v in state.items()} for state in _experts(lambda k: mlp((3,), k, [16]))]
    images = [[batch.half() for batch in task] for task in _images(16, 3)]
    state = learn_merge(mlp((3,), 2, [16]).half(), experts, images, epochs=2)
    full = [{n: v.float() for n, v in expert.items()} for expert in experts]
    expected = learn_merge(mlp((3,), 2, [16]), full, [[b.float() for b in task] for task in images], epochs=2)
    assert {value.dtype for value in state.values()} == {torch.float16}
    for name, value in state.items():
        assert torch.equal(value, expected[name].half())
