"""Small scenes, made once."""

import pytest
from scene_files import names_by_colour, write_scenes


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """A folder in MIT Indoor's layout; not to be changed."""
    return write_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="session")
def scene_names(scenes):
    """The name of the image that has a colour."""
    return names_by_colour(scenes)


@pytest.fixture(scope="session")
def textured_scenes(tmp_path_factory):
    """The same with random images."""
    return write_scenes(tmp_path_factory.mktemp("textured"), textured=True)


@pytest.fixture
def plain_distortions(monkeypatch):
    """Distortions that say what they were asked for: the image's colour goes by user and seed."""
    from pl_personalize.datamodules import distortions

    calls = []

    def distort(image, name, *, severity=3, seed):
        calls.append((image.shape, name, severity, seed))
        distorted = image.copy()
        distorted[..., 2] = 10 * severity + distortions.DISTORTIONS.index(name)
        distorted[..., 1] = seed % 251
        return distorted

    monkeypatch.setattr(distortions, "distort", distort)
    return calls
