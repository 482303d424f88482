"""The ten distortions against their formulas, written a second time with loops, colorsys and scipy."""

import colorsys

import cv2
import numpy as np
import pytest
from scipy import ndimage

from pl_personalize.datamodules.distortions import distort

SEVERITIES = range(1, 6)
WATER_COLOUR, MUD_COLOUR = np.array([175, 238, 238]), np.array([63, 42, 20])
# Of severity 1 to 5: mean, deviation, sigma, threshold, and the strength of water or the sigma of mud's edge.
SPATTER = [
    (0.62, 0.1, 0.7, 0.7, 0.6),
    (0.65, 0.1, 0.8, 0.7, 0.6),
    (0.65, 0.3, 1, 0.69, 0.6),
    (0.65, 0.1, 0.7, 0.68, 0.6),
    (0.65, 0.1, 0.5, 0.67, 0.6),
]
ELASTIC = [(0, 0, 5.12), (3.2, 19.2, 3.84), (6.4, 5.12, 3.84), (6.4, 1.92, 1.92), (10.24, 1.92, 1.28)]


@pytest.fixture(scope="module")
def image():
    """Smooth colours with a few hard edges, higher than wide."""
    y, x = np.mgrid[:53, :41]
    waves = [np.sin(x / 5 + y / 8), np.cos(x / 9 - y / 4), np.sin(y / 6)]
    levels = np.stack([128 + 90 * wave for wave in waves], axis=2)
    levels[10:20, 5:30] = (250, 20, 60)
    return levels.round().astype(np.uint8)


@pytest.fixture(scope="module")
def colours():
    """Black, white, greys, pure and random colours."""
    levels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    levels[0, :8] = [[r, g, b] for r in (0, 255) for g in (0, 255) for b in (0, 255)]
    levels[1] = np.arange(0, 256, 17)[:, None]
    levels[2, :3] = np.eye(3, dtype=np.uint8)
    return levels


def assert_is_rounding_of(distorted, expected, slack=1e-6):
    """Values may be anything before they are clipped; a value at .5 may go either way."""
    assert distorted.dtype == np.uint8
    off = np.abs(distorted - expected.clip(0, 255)).max()
    assert off <= 0.5 + slack, off


def through_hsv(image, change):
    levels = np.empty(image.shape)
    for row, column in np.ndindex(image.shape[:2]):
        hsv = colorsys.rgb_to_hsv(*(image[row, column] / 255))
        levels[row, column] = 255 * np.array(colorsys.hsv_to_rgb(*change(*hsv)))
    return levels


def clip(value):
    return min(max(value, 0.0), 1.0)


@pytest.mark.parametrize(
    ("severity", "factor", "offset"), [(1, 0.3, 0), (2, 0.1, 0), (3, 2, 0), (4, 5, 0.1), (5, 30, 0.2)]
)
def test_saturation(colours, severity, factor, offset):
    expected = through_hsv(colours, lambda h, s, v: (h, clip(factor * s + offset), v))
    assert_is_rounding_of(distort(colours, "saturation", severity=severity, seed=0), expected)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_brightness(colours, severity):
    expected = through_hsv(colours, lambda h, s, v: (h, s, clip(v + severity / 10)))
    assert_is_rounding_of(distort(colours, "brightness", severity=severity, seed=0), expected)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_brightness_keeps_grey_levels_apart(severity):
    """Where 255 times the offset ends in .5, rounding to the nearest even level would make two levels one."""
    ramp = np.arange(256, dtype=np.uint8)[:, None, None].repeat(3, 2)
    darker = ramp[ramp[:, 0, 0] + 255 * severity / 10 < 255]
    brighter = distort(darker, "brightness", severity=severity, seed=0)
    assert len(np.unique(brighter)) == len(darker)


@pytest.mark.parametrize(("severity", "factor"), [(1, 0.4), (2, 0.3), (3, 0.2), (4, 0.1), (5, 0.05)])
def test_contrast(image, severity, factor):
    expected = np.empty(image.shape)
    for channel in range(3):
        values = [int(value) for value in image[..., channel].flat]
        mean = sum(values) / len(values)
        expected[..., channel].flat = [(value - mean) * factor + mean for value in values]
    assert_is_rounding_of(distort(image, "contrast", severity=severity, seed=0), expected)


def test_values_are_rounded_not_truncated():
    image = np.array([[[0, 0, 0], [1, 9, 99]]], dtype=np.uint8)  # means 0.5, 4.5 and 49.5
    assert distort(image, "contrast", seed=0).tolist() == [
        [[0, 4, 40], [1, 5, 59]]
    ]  # of 0.4, 3.6, 39.6, 0.6, 5.4, 59.4


@pytest.mark.parametrize(("severity", "sigma"), [(1, 0.5), (2, 0.75), (3, 1), (4, 1.25), (5, 1.5)])
def test_gaussian_blur(image, severity, sigma):
    expected = ndimage.gaussian_filter(image.astype(float), sigma, mode="nearest", truncate=4, axes=(0, 1))
    assert_is_rounding_of(distort(image, "gaussian_blur", severity=severity, seed=0), expected)


@pytest.mark.parametrize(
    ("severity", "radius", "edge_sigma"), [(1, 0.5, 0.6), (2, 1, 0.1), (3, 1.5, 0.1), (4, 2.5, 0.01), (5, 3, 0.1)]
)
@pytest.mark.parametrize("shape", [(53, 41), (5, 3), (1, 1), (1, 12)], ids=str)
def test_defocus_blur(image, shape, severity, radius, edge_sigma):
    image = image[: shape[0], : shape[1]]
    disk = np.array([[float(y * y + x * x <= radius * radius) for x in range(-8, 9)] for y in range(-8, 9)])
    edge = [np.exp(-(offset**2) / (2 * edge_sigma**2)) for offset in (-1, 0, 1)]
    edge = np.outer(edge, edge) / sum(edge) ** 2
    kernel = ndimage.correlate(disk / disk.sum(), edge, mode="constant")
    padded = np.pad(image.astype(float), ((8, 8), (8, 8), (0, 0)), mode="reflect")
    expected = np.zeros(image.shape)
    for y, x in np.argwhere(kernel > 0):
        expected += kernel[y, x] * padded[y : y + shape[0], x : x + shape[1]]
    assert_is_rounding_of(distort(image, "defocus_blur", severity=severity, seed=0), expected)


@pytest.mark.parametrize(("severity", "quality"), [(1, 65), (2, 58), (3, 50), (4, 40), (5, 25)])
def test_jpeg(image, severity, quality):
    def through_opencv(quality):
        encoded = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
        return cv2.imdecode(encoded, cv2.IMREAD_COLOR)[..., ::-1].astype(int)

    distorted = distort(image, "jpeg", severity=severity, seed=0).astype(int)
    off = {other: np.abs(distorted - through_opencv(other)).mean() for other in range(quality - 3, quality + 4)}
    assert min(off, key=off.get) == quality, off
    assert off[quality] < 0.2, off


@pytest.mark.parametrize(("severity", "deviation"), [(1, 0.04), (2, 0.08), (3, 0.12), (4, 0.15), (5, 0.18)])
def test_gaussian_noise(severity, deviation):
    grey = np.full((200, 200, 3), 128, dtype=np.uint8)
    noise = distort(grey, "gaussian_noise", severity=severity, seed=0).astype(float) - 128
    sigma, count = 255 * deviation, noise.size
    if severity <= 3:  # of the others more is clipped
        assert abs(noise.mean()) < 5 * sigma / count**0.5
        assert abs(noise.std() / np.hypot(sigma, 12**-0.5) - 1) < 5 / (2 * count) ** 0.5
    assert abs((np.abs(noise) < sigma).mean() - 0.6827) < 0.02
    neighbours = [(noise[..., 0], noise[..., 1]), (noise[1:], noise[:-1]), (noise[:, 1:], noise[:, :-1])]
    for first, second in neighbours:
        assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 5 / first.size**0.5


@pytest.mark.parametrize(("severity", "share"), [(1, 0.01), (2, 0.02), (3, 0.05), (4, 0.08), (5, 0.14)])
def test_impulse_noise(severity, share):
    grey = np.full((200, 200, 3), 128, dtype=np.uint8)
    noisy = distort(grey, "impulse_noise", severity=severity, seed=0)
    assert set(np.unique(noisy)) == {0, 128, 255}

    def is_share(found, expected):
        return abs(found.mean() - expected) < 5 * (expected / found.size) ** 0.5

    assert is_share(noisy == 0, share / 2)
    assert is_share(noisy == 255, share / 2)
    hit = noisy != 128
    assert is_share(hit[..., 0] & hit[..., 1], share**2)  # each channel on its own
    assert is_share(hit[1:] & hit[:-1], share**2)


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_elastic(image, severity, seed):
    amplitude, sigma, jitter = ELASTIC[severity - 1]
    height, width = image.shape[:2]
    rng = np.random.default_rng(seed)
    q = min(height, width) // 3
    centre = np.array([height // 2, width // 2])
    points = np.array([centre + q, centre + np.array([q, -q]), centre - q])  # row, column
    moved = points + rng.uniform(-jitter, jitter, (3, 2))[:, ::-1]
    ones = np.ones((3, 1))
    back = np.linalg.solve(np.hstack([moved, ones]), points)  # from where a pixel comes
    rows, columns = np.mgrid[:height, :width].astype(float)
    came_from = np.stack([rows, columns, np.ones_like(rows)], axis=-1) @ back
    levels = image.astype(float)

    def sample(levels, rows, columns, mode):
        channels = [ndimage.map_coordinates(levels[..., k], [rows, columns], order=1, mode=mode) for k in range(3)]
        return np.stack(channels, axis=2)

    levels = sample(levels, came_from[..., 0], came_from[..., 1], "mirror")
    if amplitude:
        dx, dy = (
            amplitude * ndimage.gaussian_filter(rng.uniform(-1, 1, (height, width)), sigma, mode="reflect", truncate=3)
            for _ in range(2)
        )
        levels = sample(levels, rows + dy, columns + dx, "reflect")
    # OpenCV 4 rounds places to 1/32 of a pixel, and neighbours differ by up to 240 levels here.
    slack = 8 if cv2.__version__.startswith("4.") else 0.01
    assert_is_rounding_of(distort(image, "elastic", severity=severity, seed=seed), levels, slack)


def liquid_on(image, severity, seed):
    mean, deviation, sigma, threshold, _ = SPATTER[severity - 1]
    noise = np.random.default_rng(seed).normal(mean, deviation, image.shape[:2])
    liquid = ndimage.gaussian_filter(noise, sigma, mode="nearest", truncate=4)
    return np.where(liquid < threshold, 0, liquid), threshold


def equalise(levels):
    """The share of pixels that are darker, without the darkest, becomes the level."""
    values, counts = np.unique(levels, return_counts=True)
    if len(values) == 1:
        return levels
    darker = np.cumsum(counts) - counts[0]
    table = np.zeros(256)
    table[values] = np.rint(255 * darker / darker[-1])
    return table[levels]


@pytest.mark.parametrize(
    ("severity", "seed", "far"),
    [(1, 0, False), (1, 37, True), (2, 0, False), (2, 1, False), (3, 16, False), (3, 28, False)],
)
def test_water(image, severity, seed, far):
    image = np.tile(image, (3, 5, 1)) if not far else np.resize(image, (400, 400, 3))
    liquid, _ = liquid_on(image, severity, seed)
    assert (liquid.max() > 1) == (severity == 3)  # where 8 bits would wrap round
    depth = np.floor(255 * np.minimum(liquid, 1)).astype(np.uint8)
    to_edge = cv2.distanceTransform(255 - cv2.Canny(depth, 50, 150), cv2.DIST_L2, 5).astype(float)
    assert (to_edge.max() > 20) == far
    relief = ndimage.uniform_filter(to_edge.clip(0, 20), 3, mode="mirror").astype(np.float32)
    kernel = [[-2, -1, 0], [-1, 1, 1], [0, 1, 2]]
    relief = ndimage.correlate(equalise(relief.astype(np.uint8)), kernel, mode="mirror").clip(0, 255)
    mask = depth * ndimage.uniform_filter(relief, 3, mode="mirror")
    mask = 0.6 * mask / mask.max()
    expected = image + mask[..., None] * WATER_COLOUR
    assert_is_rounding_of(distort(image, "spatter", severity=severity, seed=seed), expected)


@pytest.mark.parametrize("severity", [4, 5])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_mud(image, severity, seed):
    liquid, threshold = liquid_on(image, severity, seed)
    mask = ndimage.gaussian_filter((liquid > threshold).astype(float), 0.6, mode="nearest", truncate=4)
    mask = np.where(mask < 0.8, 0, mask)[..., None]
    expected = image * (1 - mask) + mask * MUD_COLOUR
    assert_is_rounding_of(distort(image, "spatter", severity=severity, seed=seed), expected)


def test_water_adds_the_same_light_to_every_image(image):
    black = distort(np.zeros_like(image), "spatter", seed=4).astype(int)
    assert black.reshape(-1, 3).max(0).tolist() == [105, 143, 143]  # 0.6 times the colour
    np.testing.assert_allclose(black, black[..., 1:2] * WATER_COLOUR / 238, atol=1)
    np.testing.assert_allclose(distort(image, "spatter", seed=4), np.minimum(image + black, 255), atol=1)
    assert 0.05 < (black > 0).mean() < 0.6


def test_where_no_drop_falls_the_image_is_left():
    image = np.full((1, 1, 3), 100, dtype=np.uint8)
    outcomes = {tuple(distort(image, "spatter", seed=seed)[0, 0].tolist()) for seed in range(40)}
    assert outcomes == {(100, 100, 100), (205, 243, 243)}  # all or nothing: the only pixel is the brightest


def test_mud_is_brown_where_it_is_opaque():
    white = np.full((64, 64, 3), 255, dtype=np.uint8)
    for severity in (4, 5):
        muddy = distort(white, "spatter", severity=severity, seed=0)
        covered = (muddy != 255).any(axis=2)
        assert 0.01 < covered.mean() < 0.6
        lighter = 255 - 0.8 * (255 - MUD_COLOUR)  # what is less than 0.8 opaque is not there
        assert (muddy[covered] <= np.ceil(lighter)).all()
