"""Heads adapted on a device: which shift is found, what is corrected, and what is refused."""

import copy
from dataclasses import replace

import pytest
import torch
from head_cases import CAMERA, MIX, SERVER, accuracy, changed, data, entries, loader, network
from torch import nn

from pl_personalize import HeadAdaptation, adapt_head, refit_head
from pl_personalize.functional.label_shift import em_priors
from pl_personalize.heads.features import HeadOf
from pl_personalize.heads.reference import head_fingerprint


@pytest.fixture(scope="module")
def server():
    model = network()
    return model, refit_head(model, *SERVER)


@pytest.fixture
def refitted(server):
    return copy.deepcopy(server[0]), server[1]


def unlabelled(*args, count=80, **options):
    return loader(data(*args, count=count, **options)[:1])


def test_without_a_shift_nothing_changes(refitted):
    model, reference = refitted
    before, found = entries(model), []
    for seed in range(20, 40):
        found.append(adapt_head(model, unlabelled(seed=seed), reference).shift)
        if found[-1] == "none":
            assert changed(model, before) == set()
        model.load_state_dict(before)
    assert found.count("none") >= 17


def test_class_priors_are_found_and_go_to_the_bias(refitted):
    model, reference = refitted
    before, test = entries(model), data(MIX, count=3000, seed=4)
    was = accuracy(model, test)
    outcome = adapt_head(model, unlabelled(MIX, count=300, seed=5), reference)
    assert outcome.shift == "label"
    torch.testing.assert_close(outcome.class_priors, torch.tensor(MIX, dtype=torch.float64), rtol=0, atol=0.08)
    assert changed(model, before) == {"head.bias"}
    ratio = (outcome.class_priors / reference.class_priors).log()
    torch.testing.assert_close(model.head.bias - before["head.bias"], ratio.float())
    assert accuracy(model, test) > was + 0.02
    assert outcome.evidence["label"] < 0.05 < outcome.evidence["covariate"]


def test_class_priors_by_black_box_shift_estimation(refitted):
    model, reference = refitted
    test = data(MIX, count=3000, seed=4)
    was = accuracy(model, test)
    outcome = adapt_head(model, unlabelled(MIX, count=300, seed=5), reference, shift="label", estimator="bbse")
    torch.testing.assert_close(outcome.class_priors, torch.tensor(MIX, dtype=torch.float64), rtol=0, atol=0.1)
    assert accuracy(model, test) > was + 0.02
    with pytest.raises(ValueError, match="estimator must be one of em, bbse; got 'rlls'"):
        adapt_head(model, unlabelled(seed=5), reference, estimator="rlls")


def test_a_camera_is_found_and_features_are_standardized(refitted):
    model, reference = refitted
    before, test = entries(model), data(count=3000, seed=4, camera=CAMERA)
    was = accuracy(model, test)
    seen = data(count=300, seed=5, camera=CAMERA)[0]
    outcome = adapt_head(model, loader((seen,)), reference)
    assert outcome.shift == "covariate"
    assert outcome.class_priors is None
    assert outcome.evidence["covariate"] < 1e-5
    assert accuracy(model, test) > was + 0.1
    with torch.no_grad():
        features = model.body(seen)
        standard = (features - features.mean(0)) / features.std(0, correction=0) * reference.std + reference.mean
        expected = standard @ before["head.weight"].T + before["head.bias"]
        torch.testing.assert_close(model(seen), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shift", ["none", "label", "covariate"])
def test_a_known_shift_is_not_tested(refitted, shift):
    model, reference = refitted
    outcome = adapt_head(model, unlabelled(seed=5), reference, shift=shift)
    assert (outcome.shift, outcome.evidence) == (shift, {})
    assert (outcome.class_priors is not None) == (shift == "label")


def test_a_user_with_one_of_the_servers_cameras_has_no_other_camera():
    halves = [(data(count=n, seed=s), data(count=n, seed=s + 10, camera=CAMERA)) for n, s in ((400, 1), (300, 2))]
    splits = [loader(tuple(torch.cat(parts) for parts in zip(*half, strict=True))) for half in halves]
    model = network()
    reference = refit_head(model, *splits)
    for camera in (None, CAMERA):
        outcome = adapt_head(copy.deepcopy(model), unlabelled(count=300, seed=5, camera=camera), reference)
        assert outcome.shift != "covariate"


def test_tasks_of_a_user_are_judged_together(server):
    model, reference = server
    camera = 0.25 * CAMERA
    alone = [
        adapt_head(copy.deepcopy(model), unlabelled(count=40, seed=seed, camera=camera), reference)
        for seed in (5, 6, 7)
    ]
    models = [copy.deepcopy(model) for _ in range(3)]
    images = [unlabelled(count=40, seed=seed, camera=camera) for seed in (5, 6, 7)]
    together = adapt_head(models, images, [reference] * 3)
    assert {outcome.shift for outcome in together} == {"covariate"}
    pooled = together[0].evidence["covariate"]
    assert {outcome.evidence["covariate"] for outcome in together} == {pooled}
    assert all(pooled < outcome.evidence["covariate"] for outcome in alone)


def test_batch_sizes_and_labels_in_the_batches_do_not_matter(server):
    model, reference = server
    images, labels = data(MIX, count=81, seed=5)
    outcomes = [
        adapt_head(copy.deepcopy(model), batches, reference)
        for batches in (loader((images,), 81), loader((images,), 1), loader((images, labels), 20), [images])
    ]
    for outcome in outcomes[1:]:
        torch.testing.assert_close(outcome.class_priors, outcomes[0].class_priors, rtol=1e-4, atol=1e-5)


def test_every_number_comes_from_the_server(server):
    model, reference = server
    images, labels = data(MIX, count=200, seed=5)
    found = adapt_head(copy.deepcopy(model), loader((images, labels)), reference)
    wrong = adapt_head(copy.deepcopy(model), loader((images, labels.flip(0))), reference)
    assert torch.equal(found.after.bias, wrong.after.bias)
    alpha, scale, _ = reference.at("prior_settings", 200)
    with torch.no_grad():
        expected = em_priors(model(images).double(), reference.class_priors.double(), alpha=alpha, scale=scale)
    torch.testing.assert_close(found.class_priors, expected, rtol=1e-4, atol=1e-5)


def test_an_adaptation_is_undone_applied_again_and_kept_in_a_file(refitted, tmp_path):
    model, reference = refitted
    before = entries(model)
    outcome = adapt_head(model, unlabelled(MIX, seed=5), reference)
    after = entries(model)
    outcome.save(tmp_path / "mine.safetensors")
    loaded = HeadAdaptation.load(tmp_path / "mine.safetensors")
    assert (loaded.shift, loaded.evidence, loaded.num_images) == (outcome.shift, outcome.evidence, 80)
    assert torch.equal(loaded.class_priors, outcome.class_priors)
    assert loaded.is_applied(model)
    loaded.undo(model)
    assert changed(model, before) == set()
    assert not loaded.is_applied(model)
    loaded.apply(model)
    assert changed(model, after) == set()
    with pytest.raises(ValueError, match="'head' of the model is not the one"):
        loaded.undo(network(1))
    assert repr(outcome).startswith("HeadAdaptation('label', 80 images, covariate ")


def test_low_precision(server):
    model = copy.deepcopy(server[0]).bfloat16()
    reference = refit_head(model, *(loader((s.dataset.tensors[0].bfloat16(), s.dataset.tensors[1])) for s in SERVER))
    images = data(MIX, count=80, seed=5)[0].bfloat16()
    outcome = adapt_head(model, [images], reference)
    outcome.undo(model)
    outcome.apply(model)
    assert outcome.shift == "label"


def test_few_images_change_little(refitted):
    model, reference = refitted
    before = entries(model)
    for count in (1, 2, 5):
        outcome = adapt_head(model, [data(MIX, seed=5)[0][:count]], reference, shift="label")
        assert outcome.num_images == count
        assert float((model.head.bias - before["head.bias"]).abs().max()) < 1.5
        outcome.undo(model)
        assert adapt_head(model, [data(seed=5)[0][:count]], reference).shift == "none"


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no images"),
        ([torch.full((4, 12), float("nan"))], "NaN or infinite"),
        ([torch.zeros(4, 7)], "shapes cannot be multiplied"),
    ],
)
def test_images_that_cannot_be_used_change_nothing(refitted, batches, message):
    model, reference = refitted
    before = entries(model)
    with pytest.raises((ValueError, RuntimeError), match=message):
        adapt_head(model, batches, reference)
    assert changed(model, before) == set()


def test_a_reference_of_another_model_is_refused(refitted):
    model, reference = refitted
    other = network(1)
    with pytest.raises(ValueError, match="belongs to another head than that of this TaskNetwork with the head 'head'"):
        adapt_head(other, unlabelled(seed=5), reference)
    trained = copy.deepcopy(model)
    trained.body[0].weight.data[0, 0] += 1
    with pytest.raises(ValueError, match="belongs to another body than that of this TaskNetwork"):
        adapt_head(trained, unlabelled(seed=5), reference)
    with pytest.raises(ValueError, match="one reference per task; got 2, 2 and 1"):
        adapt_head([model, model], [[], []], [reference])
    with pytest.raises(ValueError, match="another head"):
        adapt_head([model, other], [unlabelled(seed=5)] * 2, [reference] * 2)


def test_a_reference_fits_other_batchnorm_statistics_and_a_larger_model():
    model = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 5))
    reference = refit_head(model, *SERVER)
    model[1].running_mean += 0.1
    larger = nn.ModuleDict({"network": model, "unused": nn.Linear(3, 3)})
    outcome = adapt_head(
        larger, unlabelled(seed=5), reference, head="network.2", forward=lambda m, x: m["network"](x[0])
    )
    assert outcome.num_images == 80


def test_no_process_goes_on_if_another_fails(refitted):
    model, reference = refitted
    before = entries(model)
    with pytest.raises(ValueError, match="1 of 2 processes could not read their data"):
        adapt_head(model, unlabelled(MIX, seed=5), reference, gather=lambda rows: torch.cat([rows, 1 - rows]))
    sent = []
    with pytest.raises(ValueError, match="no images"):
        adapt_head(model, [], reference, gather=lambda rows: sent.append(rows) or torch.cat([rows, 1 - rows]))
    assert [rows.tolist() for rows in sent] == [[1]]
    assert changed(model, before) == set()


def test_nothing_is_written_unless_every_head_fits(server):
    model, reference = copy.deepcopy(server[0]), server[1]
    half = copy.deepcopy(model).half()
    half.head.weight.data.fill_(60_000.0)
    before = entries(model)
    images = [unlabelled(seed=5), [0.01 * data(count=80, seed=6)[0].half()]]
    layer = HeadOf(half, "head")
    list(layer.read(images[1]))
    half_reference = replace(
        reference, fingerprint=head_fingerprint(layer.linear), body_fingerprint=layer.body_fingerprint
    )
    wide = replace(reference, std=10 * reference.std)
    with pytest.raises(ValueError, match=r"not finite in torch\.float16"):
        adapt_head([model, half], images, [wide, half_reference], shift="covariate")
    assert changed(model, before) == set()


def test_one_head_for_two_tasks_is_refused(server):
    model, reference = copy.deepcopy(server[0]), server[1]
    with pytest.raises(ValueError, match="Two tasks have the same head"):
        adapt_head([model, model], [unlabelled(seed=5), unlabelled(seed=6)], [reference] * 2)


@pytest.mark.parametrize(
    ("images", "shift", "message"),
    [
        ([data()[0]], "lable", "shift must be one of none, label, covariate, both, or None to test; got 'lable'"),
        (data()[0], None, "iterable of batches"),
    ],
)
def test_other_arguments_are_refused(server, images, shift, message):
    with pytest.raises(ValueError, match=message):
        adapt_head(copy.deepcopy(server[0]), images, server[1], shift=shift)
    with pytest.raises(ValueError, match="got 0, 0 and 0"):
        adapt_head([], [], [])


# Cameras

PATTERNS = 0.06 * torch.randn(12, 3, 4, 4, generator=torch.Generator().manual_seed(7))
OWN_CAMERAS = [lambda images, k=k: images + PATTERNS[k] for k in range(12)]
MIXED = [0.8, 0.1, 0.1]


def pictures(count, seed, priors=(1.0, 1.0, 1.0), offset=0.0):
    """Noisy pictures of three classes in [0, 1], 4×4 pixels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(torch.tensor(priors), count, replacement=True, generator=generator)
    labels[:3] = torch.arange(3)
    centers = 0.05 * torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return 0.5 + centers[labels] + 0.1 * torch.randn(count, 3, 4, 4, generator=generator) + offset, labels


def picture_network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(48, 40), nn.Tanh(), nn.Linear(40, 3))


def test_a_camera_and_a_class_mix_at_once():
    model = picture_network()
    reference = refit_head(model, loader(pictures(600, 1)), loader(pictures(300, 2)), cameras=OWN_CAMERAS)
    assert reference.camera_shifts.shape == (12, 40)
    offset = 0.5 * (PATTERNS[2] + PATTERNS[9])
    test, images = pictures(2000, 4, MIXED, offset), loader(pictures(300, 5, MIXED, offset)[:1])
    scores = {"none": accuracy(model, test)}
    for shift in ("label", "covariate", None):
        adapted = copy.deepcopy(model)
        outcome = adapt_head(adapted, images, reference, shift=shift)
        scores[outcome.shift] = accuracy(adapted, test)
    assert outcome.shift == "both"
    assert scores["both"] > scores["covariate"] > scores["none"]
    assert scores["both"] > scores["label"]
    torch.testing.assert_close(outcome.class_priors, torch.tensor(MIXED, dtype=torch.float64), rtol=0, atol=0.1)


def test_a_camera_alone_is_told_from_a_class_mix():
    model = picture_network()
    reference = refit_head(model, loader(pictures(600, 1)), loader(pictures(300, 2)), cameras=OWN_CAMERAS)
    images = loader(pictures(300, 5, offset=PATTERNS[4])[:1])
    assert adapt_head(model, images, reference).shift == "covariate"


def test_random_cameras():
    model = picture_network()
    reference = refit_head(model, loader(pictures(90, 1)), loader(pictures(60, 2)), cameras=10, camera_images=4)
    assert reference.camera_shifts.shape == reference.camera_ratios.shape == (10, 40)
    assert torch.isfinite(reference.camera_shifts).all()


def test_cameras_need_images(server):
    with pytest.raises(ValueError, match="cameras= needs float images"):
        refit_head(copy.deepcopy(server[0]), *SERVER, cameras=3)
