"""distort: what holds for all ten distortions. Their formulas are tested in test_distortion_formulas.py."""

import hashlib
import json
import subprocess
import sys
from itertools import pairwise
from textwrap import dedent

import cv2
import numpy as np
import pytest

from pl_personalize.datamodules import distortions
from pl_personalize.datamodules.distortions import DISTORTIONS, distort

SEVERITIES = range(1, 6)
RANDOM = ("spatter", "elastic", "gaussian_noise", "impulse_noise")
SIZES = [(1, 1), (1, 2), (2, 1), (2, 2), (1, 40), (40, 1), (3, 3), (3, 40), (4, 2), (7, 5), (17, 16), (31, 130)]
WITHOUT_OPENCV = ("saturation", "gaussian_noise", "brightness", "jpeg", "contrast", "impulse_noise")


def smooth_image(height=64, width=64):
    """Waves of different length and direction in the three channels."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 7 + y / 11), np.cos(x / 13 - y / 6), np.sin(y / 9)]
    return np.stack([128 + 80 * wave for wave in waves], axis=2).round().astype(np.uint8)


def random_image(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def distance(image, name, severity):
    changed = [distort(image, name, severity=severity, seed=seed).astype(float) - image for seed in range(5)]
    return float(np.abs(changed).mean())


def digests():
    image = smooth_image(241, 320)  # enough rows for threads to share
    return {
        f"{name} {severity}": hashlib.sha256(distort(image, name, severity=severity, seed=11).tobytes()).hexdigest()
        for name in DISTORTIONS
        for severity in SEVERITIES
    }


def test_the_names_are_in_the_order_of_the_users():
    assert DISTORTIONS == (
        "spatter",
        "elastic",
        "saturation",
        "defocus_blur",
        "gaussian_noise",
        "brightness",
        "gaussian_blur",
        "jpeg",
        "contrast",
        "impulse_noise",
    )


@pytest.mark.parametrize("name", DISTORTIONS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_images_of_any_size_keep_it(name, size):
    image = random_image(*size)
    for severity in SEVERITIES:
        for seed in range(5):
            distorted = distort(image, name, severity=severity, seed=seed)
            assert distorted.shape == image.shape
            assert distorted.dtype == np.uint8
            assert distorted.flags.c_contiguous
            assert distorted.flags.writeable
            if name in ("elastic", "defocus_blur", "gaussian_blur", "contrast"):  # means of values that are there
                assert (distorted.min((0, 1)) >= image.min((0, 1))).all()
                assert (distorted.max((0, 1)) <= image.max((0, 1))).all()


@pytest.mark.parametrize("name", ["elastic", "defocus_blur", "gaussian_blur", "contrast"])
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 9), (48, 40)], ids=str)
def test_what_moves_or_averages_pixels_leaves_a_constant_image(name, size):
    for colour in ((0, 0, 0), (255, 255, 255), (3, 77, 200)):
        image = np.full((*size, 3), colour, dtype=np.uint8)
        for severity in SEVERITIES:
            np.testing.assert_array_equal(distort(image, name, severity=severity, seed=2), image)


@pytest.mark.parametrize("name", DISTORTIONS)
def test_the_image_is_not_changed_and_its_memory_not_shared(name):
    image = smooth_image()
    before = image.copy()
    image.flags.writeable = False
    distorted = distort(image, name, seed=0)
    np.testing.assert_array_equal(image, before)
    assert not np.shares_memory(distorted, image)
    assert not np.array_equal(distorted, image)


@pytest.mark.parametrize("name", DISTORTIONS)
def test_the_layout_in_memory_does_not_matter(name):
    image = random_image(20, 24)
    expected = distort(image, name, seed=1)
    views = (np.asfortranarray(image), image[::-1].copy()[::-1], np.repeat(image, 2, axis=1)[:, ::2])
    for view in views:
        distorted = distort(view, name, seed=1)
        np.testing.assert_array_equal(distorted, expected)
        assert distorted.flags.c_contiguous


@pytest.mark.parametrize("name", DISTORTIONS)
def test_a_seed_decides_everything_that_is_random(name):
    image = smooth_image()
    first, again, other = (distort(image, name, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.array_equal(first, other) == (name not in RANDOM)


def test_severity_three_is_the_default():
    image = smooth_image()
    for name in DISTORTIONS:
        np.testing.assert_array_equal(distort(image, name, seed=5), distort(image, name, severity=3, seed=5))


def test_no_other_generator_is_used_or_moved():
    expected = digests()
    np.random.seed(3)
    cv2.setRNGSeed(3)
    before = np.random.get_state()[1].copy()
    assert digests() == expected
    np.testing.assert_array_equal(np.random.get_state()[1], before)


def test_the_result_is_the_same_in_another_process_and_with_other_threads(tmp_path):
    """The process loads the module by its path, as importing the package would take seconds."""
    np.save(tmp_path / "image.npy", smooth_image(241, 320))
    script = f"""
        import hashlib, importlib.util, json, sys
        import numpy as np
        spec = importlib.util.spec_from_file_location("distortions", {distortions.__file__!r})
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert "cv2" not in sys.modules
        import cv2
        image, results = np.load({str(tmp_path / "image.npy")!r}), []
        for threads in (1, 4):
            cv2.setNumThreads(threads)
            results.append({{
                f"{{name}} {{severity}}": hashlib.sha256(
                    module.distort(image, name, severity=severity, seed=11).tobytes()
                ).hexdigest()
                for name in module.DISTORTIONS for severity in {list(SEVERITIES)}
            }})
        print(json.dumps(results))
    """
    run = subprocess.run([sys.executable, "-c", dedent(script)], capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    one, four = json.loads(run.stdout)
    assert one == four == digests()


@pytest.mark.parametrize(
    "name", ["defocus_blur", "gaussian_noise", "brightness", "gaussian_blur", "jpeg", "contrast", "impulse_noise"]
)
def test_the_image_moves_away_as_severity_grows(name):
    distances = [distance(smooth_image(), name, severity) for severity in SEVERITIES]
    assert all(nearer < farther for nearer, farther in pairwise(distances)), distances


@pytest.mark.parametrize("name", ["blur", "", None, "Spatter"])
def test_an_unknown_name_is_refused_with_the_choices(name):
    with pytest.raises(ValueError, match=rf"no distortion {name!r}; there are spatter, .*impulse_noise"):
        distort(smooth_image(), name, seed=0)


@pytest.mark.parametrize("severity", [0, 6, -1, 2.5, "3", None])
def test_an_unknown_severity_is_refused_with_the_choices(severity):
    with pytest.raises(ValueError, match=rf"severity must be 1, 2, 3, 4 or 5; got {severity!r}"):
        distort(smooth_image(), "jpeg", severity=severity, seed=0)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 3)), "uint8; got float64"),
        (np.zeros((4, 4, 3), dtype=np.int8), "uint8; got int8"),
        ([[[0, 0, 0]]], "uint8; got list"),
        (np.zeros((4, 4), dtype=np.uint8), r"got \(4, 4\)"),
        (np.zeros((3, 4, 4), dtype=np.uint8), r"got \(3, 4, 4\)"),
        (np.zeros((4, 4, 4), dtype=np.uint8), r"got \(4, 4, 4\)"),
        (np.zeros((2, 4, 4, 3), dtype=np.uint8), r"got \(2, 4, 4, 3\)"),
        (np.zeros((0, 4, 3), dtype=np.uint8), r"got \(0, 4, 3\)"),
    ],
    ids=str,
)
def test_another_type_or_shape_is_refused(image, message):
    with pytest.raises(ValueError, match=message):
        distort(image, "contrast", seed=0)


@pytest.mark.parametrize("severity", [1, 3])
def test_elastic_refuses_an_image_that_is_too_large_for_opencv(severity):
    assert distort(np.zeros((32_766, 3, 3), np.uint8), "elastic", severity=1, seed=0).shape == (32_766, 3, 3)
    with pytest.raises(ValueError, match=r"elastic takes images of up to 32766 pixels .*; got 3×32767"):
        distort(np.zeros((3, 32_767, 3), np.uint8), "elastic", severity=severity, seed=0)


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="seed must not be negative; got -1"):
        distort(smooth_image(), "contrast", seed=-1)


@pytest.mark.parametrize("name", DISTORTIONS)
def test_without_opencv_the_message_says_what_to_install(name, monkeypatch):
    expected = distort(smooth_image(), name, seed=0)
    monkeypatch.setitem(sys.modules, "cv2", None)
    if name in WITHOUT_OPENCV:
        np.testing.assert_array_equal(distort(smooth_image(), name, seed=0), expected)
    else:
        with pytest.raises(ModuleNotFoundError, match=r"OpenCV.*pip install 'pl-personalize\[transprior\]'"):
            distort(smooth_image(), name, seed=0)
