"""CameraPrior on small scenes: CatPrior's images, seen through TransPrior's cameras."""

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from scene_files import cameraprior, catprior, transprior

from pl_personalize.datamodules import CameraPriorDataModule
from pl_personalize.datamodules.distortions import DISTORTIONS
from pl_personalize.functional.seeding import derive_seed


def test_every_combination_of_preferences_and_cameras_is_a_user():
    data = CameraPriorDataModule()
    assert data.users == tuple(f"user{k}-{camera}" for k in range(1, 6) for camera in DISTORTIONS)
    assert [data.distortion_of(user) for user in data.users] == [*DISTORTIONS] * 5
    assert [data.preferences_of(user) for user in data.users] == [data.preferences()[k // 10] for k in range(50)]


def test_users_have_catpriors_images_of_their_preferences(scenes):
    data, plain = (make(scenes, allocation_seeds=[1, 2]) for make in (cameraprior, catprior))
    for task in data.tasks:
        assert data.server_files(task) == plain.server_files(task)
        for k in (1, 2, 3):
            for seed in (1, 2):
                for camera in data.cameras:
                    user, its = f"user{k}-{camera}-seed{seed}", f"user{k}-seed{seed}"
                    assert data.user_files(user, task) == plain.user_files(its, task)
    assert len(data.users) == 2 * len(plain.users)


def test_users_see_their_images_through_their_camera(scenes, plain_distortions):
    data = cameraprior(scenes, cameras=["contrast", "elastic"], severity=4)
    for user in data.users:
        rank = DISTORTIONS.index(data.distortion_of(user))
        for split, names in zip(data.user_split(user, 0), data.user_files(user, 0), strict=True):
            for image, name in zip(split.images[:], names, strict=True):
                red = Image.open(scenes / "Images" / name).getpixel((0, 0))[0]
                assert image[:, 2, 3].tolist() == [red, derive_seed(27, rank, *name.split("/")) % 251, 40 + rank]
    assert {severity for *_, severity, _ in plain_distortions} == {4}


@pytest.mark.parametrize("distort_at", ["resized", "reference"])
def test_a_camera_shows_an_image_as_in_transprior(textured_scenes, distort_at):
    data, other = (make(textured_scenes, distort_at=distort_at) for make in (cameraprior, transprior))
    names, images = data.user_files("user2-saturation", 1).eval, data.user_split("user2-saturation", 1)[1].images[:]
    for image, name in zip(images, names, strict=True):
        seen = other.read_distorted(textured_scenes / "Images" / name, DISTORTIONS.index("saturation"))
        assert torch.equal(image, torch.tensor(seen).permute(2, 0, 1))


def test_users_with_one_camera_share_the_images(scenes, tmp_path, plain_distortions):
    def load(**options):
        data = cameraprior(scenes, cache_dir=tmp_path, **options)
        pools = {user: data.user_split(user, 0)[0].images.pools[0].data_ptr() for user in data.users}
        return pools, {path.name.rpartition("-")[0] for path in tmp_path.glob("*.bin")}, len(plain_distortions)

    pools, stored, decoded = load()
    assert len(set(pools.values())) == 2
    assert len({pools[f"user{k}-jpeg"] for k in (1, 2, 3)}) == 1
    assert stored == {"jpeg-home", "saturation-home"}
    _, stored, more = load(cameras=["contrast", "jpeg", "saturation"])
    assert stored == {"jpeg-home", "saturation-home", "contrast-home"}
    assert more == decoded + decoded // 2  # only those of the third camera


def test_what_makes_a_user_different(scenes):
    data = cameraprior(scenes, tasks=["home", "store"], allocation_seeds=[1, 2])
    chosen = catprior(scenes).preferences()[1]
    expected = f"saturation; home: {', '.join(chosen['home'])}; store: {', '.join(chosen['store'])}"
    assert data.about_user("user2-saturation-seed2") == expected
    assert data.view(user="user2-saturation-seed2").user == "user2-saturation-seed2"


@pytest.mark.parametrize(
    ("cameras", "message"),
    [
        ([], r"cameras must be different distortions out of spatter, .*; got \[\]"),
        (["jpeg", "jpeg"], r"got \['jpeg', 'jpeg'\]"),
        ("fog", r"got \['fog'\]"),
    ],
)
def test_cameras_that_do_not_exist_are_refused(scenes, cameras, message):
    with pytest.raises(MisconfigurationException, match=message):
        cameraprior(scenes, cameras=cameras)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_users": 0}, "num_users must be at least 1; got 0"),
        ({"severity": 6}, "severity must be 1, 2, 3, 4 or 5; got 6"),
        ({"extra_images": -1}, "extra_images must be at least 0; got -1"),
        ({"preferred_classes": 0}, "preferred_classes must be at least 1; got 0"),
    ],
)
def test_options_of_both_are_checked(scenes, options, message):
    with pytest.raises(MisconfigurationException, match=message):
        cameraprior(scenes, **options)


def test_too_few_extra_images_are_refused(scenes):
    with pytest.raises(MisconfigurationException, match="Cannot sample preferences"):
        cameraprior(scenes, preferred_classes=3, extra_images=4).prepare_data()


def test_only_the_chosen_cameras_need_their_packages(scenes, monkeypatch):
    def distort(image, name, **options):
        if name == "elastic":
            raise ModuleNotFoundError("No module named 'cv2': pip install x")
        return image

    monkeypatch.setattr("pl_personalize.datamodules.distortions.distort", distort)
    cameraprior(scenes).prepare_data()
    with pytest.raises(MisconfigurationException, match=r"'elastic' is not available: .*pip install x"):
        cameraprior(scenes, cameras=["jpeg", "elastic"]).prepare_data()
