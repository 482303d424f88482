"""Servers with rare or missing classes, many images, few features, repeated and interrupted refits."""

import copy
import warnings

import pytest
import torch
from head_cases import CAMERA, CLASSES, MIX, SERVER, accuracy, changed, data, entries, loader, network
from torch import nn

from pl_personalize import HeadAdaptation, HeadReference, adapt_head, refit_head
from pl_personalize.heads import features
from pl_personalize.heads.reference import tail
from pl_personalize.models import TaskNetwork

LONG_TAIL = [0.8, 0.1, 0.05, 0.03, 0.02]


def refitted(train=SERVER[0], val=SERVER[1]):
    model = network()
    return model, refit_head(model, train, val)


@pytest.fixture(scope="module")
def long_tail():
    return refitted(loader(data(LONG_TAIL, 1200, 1)), loader(data(LONG_TAIL, 600, 2)))


def users(count, priors=None, images=80):
    """Images of users with class priors, by default random ones, and images to evaluate on."""
    generator = torch.Generator().manual_seed(0)
    for seed in range(count):
        own = priors or torch._sample_dirichlet(torch.full((CLASSES,), 0.5), generator).clamp_min(1e-3).tolist()
        yield loader(data(own, images + CLASSES, 100 + seed)[:1]), data(own, 1000, 200 + seed)


def test_users_of_a_server_with_rare_classes_gain(long_tail):
    model, reference = long_tail
    gains, shifts = [], []
    for images, test in users(12):
        adapted = copy.deepcopy(model)
        outcome = adapt_head(adapted, images, reference)
        shifts.append(outcome.shift)
        gains.append(accuracy(adapted, test) - accuracy(model, test))
        assert all(0 <= p <= 1 for p in outcome.evidence.values())
    assert shifts.count("label") >= 9
    assert sum(gains) / len(gains) > 0.02
    assert min(gains) > -0.02


def test_few_images_are_taken_for_the_servers_class_mix(long_tail):
    model, reference = long_tail
    inputs, labels = data(LONG_TAIL, 400, 5)
    images = inputs[labels == 0][:5]
    outcome = adapt_head(copy.deepcopy(model), [images], reference, shift="label")
    torch.testing.assert_close(outcome.class_priors, torch.tensor(LONG_TAIL, dtype=torch.float64), rtol=0, atol=0.2)


def test_without_a_shift_many_images_change_nothing():
    model, reference = refitted()
    shifts = [adapt_head(copy.deepcopy(model), images, reference).shift for images, _ in users(12, [0.2] * 5, 3000)]
    assert shifts.count("none") >= 11


def test_a_class_that_validation_lacks_costs_no_power():
    inputs, labels = data(count=400, seed=2)
    present = labels != 3
    model, reference = refitted(val=loader((inputs[present], labels[present])))
    mild = [0.5, 0.25, 0.13, 0.06, 0.06]
    shifts = [adapt_head(copy.deepcopy(model), images, reference).shift for images, _ in users(12, mild)]
    full = refitted()
    expected = [adapt_head(copy.deepcopy(full[0]), images, full[1]).shift for images, _ in users(12, mild)]
    assert shifts.count("label") >= expected.count("label") - 2 > 4


def test_without_directions_outside_the_class_means_nothing_is_found():
    """A camera would pass for class priors."""
    torch.manual_seed(0)
    model = TaskNetwork(nn.Linear(12, 4), nn.Linear(4, CLASSES))
    with pytest.warns(UserWarning, match=r"The 5 class means span the 4 features of the head 'head'"):
        reference = refit_head(model, *SERVER)
    before = entries(model)
    for images, _ in users(5, MIX):
        assert adapt_head(model, images, reference).shift == "none"
    assert changed(model, before) == set()
    assert adapt_head(model, images, reference, shift="label").class_priors[0] > 0.5


def test_an_impossible_null_proves_nothing():
    assert tail(5.0, -1.0, 2.0) == tail(float("nan"), 1.0, 1.0) == tail(5.0, 1.0, 0.0) == 1.0


def test_refitting_twice_is_refitting_once():
    model, reference = refitted()
    once = entries(model)
    again = refit_head(model, *SERVER)
    assert changed(model, once) == set()
    for name, value in reference.tensors.items():
        assert torch.equal(value, again.tensors[name]), name


def test_a_head_that_is_not_finite_is_replaced():
    expected, model = refitted()[0], network()
    model.head.weight.data.fill_(torch.nan)
    refit_head(model, *SERVER)
    torch.testing.assert_close(model.head.weight, expected.head.weight)


def test_the_order_of_the_samples_does_not_matter():
    inputs, labels = data(seed=1)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(3))
    (model, reference), (other, shuffled) = refitted(), refitted(train=loader((inputs[order], labels[order]), 50))
    torch.testing.assert_close(other.head.weight, model.head.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(shuffled.prior_null, reference.prior_null, rtol=1e-3, atol=1e-3)
    assert torch.equal(shuffled.prior_settings, reference.prior_settings)


# Operations after the head


class Body(nn.Module):
    """A body and a head, with a forward pass of choice."""

    def __init__(self, forward):
        super().__init__()
        self.body, self.last = nn.Sequential(nn.Linear(12, 30), nn.Tanh()), nn.Linear(30, CLASSES)
        self._run = forward

    def forward(self, x):
        return self._run(self, x)


def zero_head():
    model = Body(lambda model, x: model.last(model.body(x)).relu())
    nn.init.zeros_(model.last.weight)
    nn.init.zeros_(model.last.bias)
    return model


def hooked():
    model = Body(lambda model, x: model.last(model.body(x)))
    model.last.register_forward_hook(lambda module, inputs, output: 2 * output)
    return model


@pytest.mark.parametrize(
    "model",
    [
        Body(lambda model, x: model.last(model.body(x)).relu_()),
        Body(lambda model, x: model.last(model.body(x)).mul_(0.05)),
        zero_head(),
        hooked(),
        nn.Sequential(nn.Unflatten(1, (3, 2, 2)), nn.Conv2d(3, CLASSES, 1), nn.ReLU(inplace=True), nn.Flatten()),
    ],
)
def test_an_operation_in_place_after_the_head_is_refused(model):
    with pytest.raises(ValueError, match="are not linear in the input"):
        refit_head(model, *SERVER)


def test_a_head_that_is_called_twice_is_refused_with_the_first_batch():
    model = Body(lambda model, x: model.last(model.body(x)) + model.last(model.body(x)))
    with pytest.raises(ValueError, match="must be called once in a forward pass, as the last layer; got 2"):
        refit_head(model, [data()], SERVER[1])


def test_features_that_are_overwritten_later_are_right():
    def forward(model, x):
        found = model.body(x)
        logits = model.last(found)
        found.zero_()
        return logits

    torch.manual_seed(0)
    model = Body(forward)
    plain = copy.deepcopy(model)
    plain._run = lambda model, x: model.last(model.body(x))
    refit_head(model, *SERVER)
    refit_head(plain, *SERVER)
    assert torch.equal(model.last.weight, plain.last.weight)


@pytest.mark.parametrize(
    "forward", [lambda model, x: model.last(input=model.body(x)), lambda model, x: model.last(model.body(x)).double()]
)
def test_other_calls_of_the_head(forward):
    model = Body(forward)
    refit_head(model, *SERVER)
    assert accuracy(model, data(count=1000, seed=3)) > 0.8


def test_logits_that_are_cast_after_a_head_in_half_precision():
    torch.manual_seed(0)
    model = Body(lambda model, x: model.last(model.body(x.bfloat16())).float()).bfloat16()
    refit_head(model, *SERVER)
    assert accuracy(model, data(count=1000, seed=3)) > 0.8


def test_a_compiled_network_has_the_names_of_the_plain_one():
    model, reference = refitted()
    compiled = torch.compile(model, backend="eager")
    outcome = adapt_head(compiled, [data(MIX, 200, 5)[0]], reference)
    assert outcome.head == "head"
    outcome.undo(model)


def test_the_body_of_a_reference_includes_parameters_that_are_not_called():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.last = nn.MultiheadAttention(12, 2, batch_first=True), nn.Linear(12, CLASSES)

        def forward(self, x):
            return self.last(self.attention(*[x.unsqueeze(1)] * 3)[0][:, 0])

    torch.manual_seed(0)
    model = Attention()
    reference = refit_head(model, *SERVER)
    model.attention.out_proj.weight.data.mul_(3)
    with pytest.raises(ValueError, match="another body"):
        adapt_head(model, [data()[0]], reference)


def test_labels_of_a_dict_are_no_argument_of_the_network():
    expected = refit_head(network(), *SERVER)
    dicts = [[{"x": x, "category": y} for x, y in split] for split in SERVER]
    reference = refit_head(network(), *dicts, labels="category")
    torch.testing.assert_close(reference.class_means, expected.class_means)


# Errors and interruptions


class Stopped(BaseException):
    pass


@pytest.mark.parametrize("what", ["refit", "not finite", "adapt", "several"])
def test_an_interruption_after_writing_puts_the_heads_back(what, monkeypatch):
    models, reference = [network(), network()], None
    if what == "not finite":
        models[0].head.weight.data.fill_(torch.nan)
    elif what != "refit":
        models[0], reference = refitted()
        models[1] = copy.deepcopy(models[0])
    before = [entries(model) for model in models]
    images, write = [data(MIX, 200, 5)[0]], features.HeadOf.write
    writes = []

    def counted(self, head):
        write(self, head)
        writes.append(self)
        if len(writes) == (2 if what == "several" else 1):
            raise Stopped

    monkeypatch.setattr(features.HeadOf, "write", counted)
    call, *given = {
        "refit": (refit_head, models[0], *SERVER),
        "not finite": (refit_head, models[0], *SERVER),
        "adapt": (adapt_head, models[0], images, reference),
        "several": (adapt_head, models, [images, images], [reference] * 2),
    }[what]
    with pytest.raises(Stopped):
        call(*given)
    for model, state in zip(models, before, strict=True):
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, state[name], rtol=0, atol=0, equal_nan=True)


def test_files_of_another_release_are_refused(tmp_path, monkeypatch):
    model, reference = refitted()
    tensors = {name: value for name, value in reference.tensors.items() if name != "confusion"}
    monkeypatch.setattr(HeadReference, "tensors", property(lambda self: tensors))
    reference.save(tmp_path / "reference.safetensors")
    with pytest.raises(ValueError, match=r"confusion.*another release"):
        HeadReference.load(tmp_path / "reference.safetensors")
    outcome = adapt_head(model, [data(MIX, 200, 5)[0]], reference)
    outcome.save(tmp_path / "outcome.safetensors")
    assert (tmp_path / "outcome.safetensors").stat().st_mode & 0o777 == 0o600
    assert HeadAdaptation.load(tmp_path / "outcome.safetensors").shift == "label"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cameras": -1}, "cameras must be an integer of 0 or more; got -1"),
        ({"cameras": 2.5}, "cameras must be an integer"),
        ({"cameras": True}, "cameras must be an integer"),
        ({"directions": 0}, "directions must be an integer of 1 or more; got 0"),
        ({"camera_images": 0}, "camera_images must be"),
        ({"cameras": ["contrast"]}, "cameras must be a number or functions of images"),
    ],
)
def test_numbers_that_are_none_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        refit_head(network(), *SERVER, **options)


def test_references_that_are_none_are_refused():
    model, reference = refitted()
    images = [data()[0]]
    with pytest.raises(TypeError, match="must be a HeadReference"):
        adapt_head(model, images, "reference.safetensors")
    with pytest.raises(ValueError, match="one reference per task; got 2, 2 and 1"):
        adapt_head([model, network()], [images, images], reference)
    with pytest.raises(ValueError, match="shift='both' needs a reference with cameras"):
        adapt_head(model, images, reference, shift="both")


def test_a_network_with_enough_directions_is_refitted_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        refitted()


def test_many_images_do_not_hide_a_camera():
    """The tolerance of the test grows as far as its statistic, which the server's sample limits."""
    model, reference = refitted()
    images = data(count=8000, seed=5, camera=0.3 * CAMERA)[0]
    found = [adapt_head(copy.deepcopy(model), [images[:n]], reference).evidence["covariate"] for n in (40, 160, 8000)]
    assert found[0] > found[1] > found[2] < 1e-6
