"""TransPrior on small scenes: the same images for all, each user's distorted in one way for ever."""

import numpy as np
import PIL
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from scene_files import SIZE, names_of, transprior, write_scenes
from torchvision.transforms.v2.functional import center_crop, pil_to_tensor, resize

from pl_personalize.datamodules import TransPriorDataModule, distortions
from pl_personalize.datamodules.distortions import DISTORTIONS
from pl_personalize.functional.seeding import derive_seed


def of(names, kind):
    return {name for name in names if name.endswith(f"_{kind}.png")}


def test_the_paper_is_the_default():
    data = TransPriorDataModule()
    assert len(data.users) == len(DISTORTIONS) == 10
    assert [data.distortion_of(user) for user in data.users] == list(DISTORTIONS)
    assert (data.extra_images, data.severity, data.distort_at) == (1000, 3, "resized")


def test_all_users_have_the_same_images(scenes):
    data = transprior(scenes)
    for task in range(4):
        first = data.user_files(0, task)
        assert all(data.user_files(user, task) == first for user in (1, 2))
        assert (len(of(first.eval, "test")), len(of(first.adapt, "test"))) == (3 * 3, 3 * 4)
        assert (len(of(first.eval, "extra")), len(of(first.adapt, "extra"))) == (5, 6)
        assert not set(first.eval) & set(first.adapt)


def test_test_images_are_divided_in_sorted_order(scenes):
    files = transprior(scenes).user_files(0, "home")
    first = sorted(name for name in of((*files.eval, *files.adapt), "test") if name.startswith("attic/"))
    assert {name for name in of(files.eval, "test") if name.startswith("attic/")} == set(first[:3])


def test_allocation_seeds_draw_other_extra_images(scenes):
    data = transprior(scenes, allocation_seeds=[1, 2], num_users=1)
    one, two = (data.user_files(f"user1-seed{j}", "home") for j in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert of(a, "test") == of(b, "test")
        assert of(a, "extra") != of(b, "extra")


def test_users_see_their_distortion_of_the_resized_image(scenes, plain_distortions):
    data = transprior(scenes, severity=4)
    for user in range(3):
        for split, names in zip(data.user_split(user, 0), data.user_files(user, 0), strict=True):
            for image, name in zip(split.images[:], names, strict=True):
                seed = derive_seed(27, user, *name.split("/"))
                red = Image.open(scenes / "Images" / name).getpixel((0, 0))[0]
                assert image[:, 2, 3].tolist() == [red, seed % 251, 40 + user]
    shapes, names, severities, _ = zip(*plain_distortions, strict=True)
    assert {min(shape[:2]) for shape in shapes} == {SIZE}
    assert max(max(shape) for shape in shapes) > SIZE  # it is cropped afterwards
    assert set(names) == set(DISTORTIONS[:3])
    assert set(severities) == {4}


def test_an_image_is_distorted_once_and_looks_the_same_in_every_iteration(scenes, plain_distortions):
    data = transprior(scenes, num_users=1, allocation_seeds=[1, 2])
    looks = {}
    for user in data.users:
        for split, names in zip(data.user_split(user, 0), data.user_files(user, 0), strict=True):
            for image, name in zip(split.images[:], names, strict=True):
                assert torch.equal(looks.setdefault(name, image), image)
    assert len(plain_distortions) == len(looks)
    alone = transprior(scenes, num_users=3, allocation_seeds=[2])
    for image, name in zip(alone.user_split(0, 0)[1].images[:], alone.user_files(0, 0).eval, strict=True):
        assert torch.equal(image, looks[name])


def test_seeds_depend_on_split_seed_user_and_name(scenes, plain_distortions):
    transprior(scenes).user_split(0, 0)
    first = {seed for *_, seed in plain_distortions}
    assert len(first) == len(plain_distortions)
    plain_distortions.clear()
    transprior(scenes).user_split(1, 0)
    assert not first & {seed for *_, seed in plain_distortions}
    plain_distortions.clear()
    transprior(scenes, split_seed=1).user_split(0, 0)
    assert not first & {seed for *_, seed in plain_distortions}


def test_the_reference_distorts_the_original_and_does_not_resize(scenes, plain_distortions):
    data = transprior(scenes, distort_at="reference", image_size=14, num_users=1)
    adapt, files = data.user_split(0, 0)[0], data.user_files(0, 0).adapt
    for image, name in zip(adapt.images[:], files, strict=True):
        original = np.asarray(Image.open(scenes / "Images" / name)).copy()
        original[..., 2], original[..., 1] = 30, derive_seed(27, 0, *name.split("/")) % 251
        assert torch.equal(image, center_crop(torch.from_numpy(original).permute(2, 0, 1), [14, 14]))
    assert {shape[:2] for shape, *_ in plain_distortions} == {(12, 12), (14, 20), (31, 13), (16, 40)}
    assert bool((adapt.images[:][:, :, 0, 0] == 0).all(1).any())  # 12 pixels: black around


def test_without_distortion_users_see_what_the_server_sees(textured_scenes, monkeypatch):
    monkeypatch.setattr("pl_personalize.datamodules.distortions.distort", lambda image, name, **_: image)
    data = transprior(textured_scenes)
    for image, name in zip(data.user_split(1, 1)[1].images[:], data.user_files(1, 1).eval, strict=True):
        original = Image.open(textured_scenes / "Images" / name)
        assert torch.equal(image, pil_to_tensor(center_crop(resize(original, [SIZE], antialias=True), [SIZE, SIZE])))


def test_the_server_sees_no_distortion(scenes, scene_names, plain_distortions):
    data = transprior(scenes)
    assert names_of(data.server_split(0)[0].images[:], scene_names) == list(data.server_files(0).train)
    assert not plain_distortions


def test_distorted_images_are_kept_apart_on_disk(scenes, tmp_path, plain_distortions):
    def load(**options):
        transprior(scenes, cache_dir=tmp_path / "cache", **options).user_split(1, 0)
        return len(list((tmp_path / "cache").glob("*.bin")))

    assert load() == 1
    decoded = len(plain_distortions)
    assert load() == 1
    assert len(plain_distortions) == decoded
    counts = [load(severity=2), load(distort_at="reference"), load(split_seed=3), load(image_size=9)]
    assert counts == [2, 3, 4, 5]


def test_what_makes_a_user_different(scenes):
    assert transprior(scenes, allocation_seeds=[1, 2]).about_user("user2-seed1") == "elastic"


def test_other_versions_decode_again(scenes, tmp_path, plain_distortions, monkeypatch):
    def load():
        transprior(scenes, cache_dir=tmp_path / "cache").user_split(1, 0)
        return len(list((tmp_path / "cache").glob("*.bin")))

    counts = [load()]
    for module, name in ((np, "__version__"), (PIL, "__version__")):
        monkeypatch.setattr(module, name, "0.0")
        counts.append(load())
    monkeypatch.setattr(distortions, "opencv_version", lambda: "0.0")
    counts.append(load())
    assert counts == [1, 2, 3, 4]


def test_all_ten_distortions_work_on_small_images(tmp_path):
    counts = {"train": 2, "test": 4, "extra": 0}
    folder = write_scenes(tmp_path, {"attic": "home", "bath": "home"}, counts, textured=True)
    options = {"tasks": ["home"], "num_users": 10, "extra_images": 0, "image_size": 16}
    data, again = (transprior(folder, **options) for _ in range(2))
    seen = [data.user_split(user, 0)[1].images[:] for user in data.users]
    for user, images in enumerate(seen):
        assert torch.equal(images, again.user_split(user, 0)[1].images[:])
        assert sum(torch.equal(images, other) for other in seen) == 1
    assert all(data.user_split(user, 0)[0].images.shape == (4, 3, 16, 16) for user in data.users)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_users": 11}, "num_users=11 is not supported: there are 10"),
        ({"severity": 0}, "severity must be 1, 2, 3, 4 or 5; got 0"),
        ({"severity": 6}, "severity must be 1, 2"),
        ({"severity": 2.5}, r"severity must be an integer; got 2\.5"),
        ({"distort_at": "cropped"}, "must be 'resized' or 'reference'; got 'cropped'"),
    ],
)
def test_options_out_of_range_are_refused(scenes, options, message):
    with pytest.raises(MisconfigurationException, match=message):
        transprior(scenes, **options)


def test_an_image_that_cannot_be_distorted_is_named(scenes, monkeypatch):
    def broken(image, name, **options):
        raise ValueError("too long")

    data = transprior(scenes)
    data.prepare_data()
    monkeypatch.setattr(distortions, "distort", broken)
    with pytest.raises(MisconfigurationException, match=r"\.png cannot be distorted \(spatter\): too long"):
        data.user_split(0, 0)


def test_too_few_extra_images_are_refused(scenes):
    transprior(scenes, extra_images=27).prepare_data()
    with pytest.raises(MisconfigurationException, match=r"28 of each task, and 'home' has 27.*\(at most 27\)"):
        transprior(scenes, extra_images=28).prepare_data()


def test_a_package_that_distortions_need_is_asked_for_at_the_start(scenes, monkeypatch):
    def distort(image, name, **options):
        if name == DISTORTIONS[1]:
            raise ModuleNotFoundError("No module named 'cv2': pip install x")
        return image

    monkeypatch.setattr("pl_personalize.datamodules.distortions.distort", distort)
    transprior(scenes, num_users=1).prepare_data()
    with pytest.raises(MisconfigurationException, match=f"'{DISTORTIONS[1]}' is not available: .*pip install x"):
        transprior(scenes).prepare_data()
