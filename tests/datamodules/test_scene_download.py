"""Download of a small archive from a server on localhost."""

import hashlib
import io
import shutil
import socket
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from filelock import FileLock
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from scene_files import COUNTS, SIZE, TABLE, catprior, write_scenes, write_table

from pl_personalize.datamodules import scene_download
from pl_personalize.datamodules import scenes as scenes_module
from pl_personalize.datamodules.scene_download import MIT_INDOOR, SceneArchive, fetch

LINES = {"TrainImages.txt": COUNTS["train"] * len(TABLE), "TestImages.txt": COUNTS["test"] * len(TABLE)}


class Quiet(SimpleHTTPRequestHandler):
    requests: list[str] = []  # noqa: RUF012 - of all instances

    def do_GET(self):
        self.requests.append(self.path)
        super().do_GET()

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A folder on a server, with the archive and the lists."""
    folder = tmp_path_factory.mktemp("served")
    whole = write_scenes(folder / "whole")
    with tarfile.open(folder / "scenes.tar", "w") as tar:
        tar.add(whole / "Images", "Images")
    for name in LINES:
        shutil.copy(whole / name, folder / name)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield folder, f"http://127.0.0.1:{http.server_address[1]}"
        http.shutdown()
        thread.join()


@pytest.fixture
def archive(served, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    Quiet.requests.clear()
    _, url = served
    lists = {name: (f"{url}/{name}", lines) for name, lines in LINES.items()}
    return SceneArchive(f"{url}/scenes.tar", sum(COUNTS.values()) * len(TABLE), lists)


def pack(path, members: dict[str, bytes]):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_the_addresses_and_counts_of_mit_indoor():
    assert MIT_INDOOR.url.endswith("/indoorCVPR_09.tar")
    assert MIT_INDOOR.images == 15_620
    assert {name: lines for name, (_, lines) in MIT_INDOOR.lists.items()} == {
        "TrainImages.txt": 5360, "TestImages.txt": 1340,
    }  # fmt: skip


def test_a_datamodule_fetches_what_it_needs(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(scenes_module, "MIT_INDOOR", archive)
    write_table(tmp_path / "supercategories.csv", TABLE)
    data = catprior(tmp_path, download=True)
    data.prepare_data()
    assert data.user_split(0, 0)[0].images.shape[1:] == (3, SIZE, SIZE)
    assert not (tmp_path / ".download").exists()
    assert set(Quiet.requests) == {"/TestImages.txt", "/TrainImages.txt", "/scenes.tar"}
    Quiet.requests.clear()
    data.prepare_data()
    catprior(tmp_path, download=True).prepare_data()
    assert Quiet.requests == []  # what is there is not fetched again


def test_the_folder_is_made(archive, served, tmp_path):
    fetch(archive, tmp_path / "new" / "place")
    found = sorted(p.relative_to(tmp_path / "new/place") for p in (tmp_path / "new/place/Images").rglob("*.png"))
    there = sorted(p.relative_to(served[0] / "whole") for p in (served[0] / "whole/Images").rglob("*.png"))
    assert found == there


def test_only_what_is_missing_is_fetched(archive, served, tmp_path):
    shutil.copytree(served[0] / "whole" / "Images", tmp_path / "Images")
    fetch(archive, tmp_path)
    assert set(Quiet.requests) == {"/TestImages.txt", "/TrainImages.txt"}


def test_an_archive_that_is_there_is_unpacked(archive, served, tmp_path):
    shutil.copy(served[0] / "scenes.tar", tmp_path)
    fetch(archive, tmp_path)
    assert "/scenes.tar" not in Quiet.requests
    assert (tmp_path / "Images" / "gym").is_dir()


def test_a_checksum_is_checked_if_it_is_given(archive, served, tmp_path):
    md5 = hashlib.md5((served[0] / "scenes.tar").read_bytes()).hexdigest()
    with pytest.raises(MisconfigurationException, match=r"Cannot download .*scenes\.tar \(") as caught:
        fetch(archive, tmp_path / "a", "0" * 32)
    assert f"scenes.tar ({caught.value.__cause__}). Download it" in str(caught.value)
    assert not (tmp_path / "a" / "scenes.tar").exists()
    fetch(archive, tmp_path / "b", md5)
    shutil.rmtree(tmp_path / "b" / "Images")
    with pytest.raises(
        MisconfigurationException, match=r"scenes\.tar .*does not have the MD5 checksum 0+\)\. Delete it"
    ):
        fetch(archive, tmp_path / "b", "0" * 32)


def test_a_datamodule_checks_the_checksum(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(scenes_module, "MIT_INDOOR", archive)
    write_table(tmp_path / "supercategories.csv", TABLE)
    with pytest.raises(MisconfigurationException, match=r"Cannot download .*scenes\.tar"):
        catprior(tmp_path, download=True, archive_md5="0" * 32).prepare_data()


def test_two_processes_do_not_fetch_at_once(archive, tmp_path, monkeypatch):
    held = []

    class Lock(FileLock):
        def acquire(self, *args, **kwargs):
            held.append(self.lock_file)
            return super().acquire(*args, **kwargs)

    monkeypatch.setattr(scene_download, "FileLock", Lock)
    fetch(archive, tmp_path)
    assert held


def test_an_address_without_an_answer_is_named(archive, tmp_path):
    with pytest.raises(
        MisconfigurationException, match=r"/none\.tar \(.*404.* Download it by other means to .*/a/none\.tar"
    ) as caught:
        fetch(archive._replace(url=archive.url.replace("scenes.tar", "none.tar")), tmp_path / "a")
    assert caught.value.__cause__.code == 404
    assert not (tmp_path / "a" / "Images").exists()
    assert not (tmp_path / "a" / ".download").exists()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_archive_is_not_unpacked(archive, served, tmp_path, share):
    whole = (served[0] / "scenes.tar").read_bytes()
    (served[0] / "short.tar").write_bytes(whole[: int(share * len(whole))])
    short = archive._replace(url=archive.url.replace("scenes.tar", "short.tar"))
    with pytest.raises(MisconfigurationException, match=r"short\.tar cannot be used .* Delete it to download it"):
        fetch(short, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} - {".download.lock"} == {"short.tar"}
    (tmp_path / "short.tar").unlink()
    (served[0] / "short.tar").write_bytes(whole)
    fetch(short, tmp_path)
    assert (tmp_path / "Images").is_dir()


def test_an_archive_that_ends_early_between_two_files_is_refused(archive, served, tmp_path):
    pack(served[0] / "few.tar", {"Images/gym/a.png": b"1", "Images/bar/b.png": b"2"})
    with pytest.raises(MisconfigurationException, match=r"has 2 images Images/<class>/<file>, not 364\)\."):
        fetch(archive._replace(url=archive.url.replace("scenes.tar", "few.tar")), tmp_path)


@pytest.mark.parametrize("name", ["../outside.png", "{tmp_path}/outside.png", "Images/../../outside.png"])
def test_members_outside_the_folder_are_refused(archive, served, tmp_path, name):
    name = name.format(tmp_path=tmp_path)
    pack(served[0] / "evil.tar", {"Images/gym/a.png": b"1", name: b"2"})
    place = tmp_path / "deep" / "place"
    with pytest.raises(MisconfigurationException, match=r"evil\.tar cannot be used"):
        fetch(archive._replace(url=archive.url.replace("scenes.tar", "evil.tar")), place)
    assert not list(tmp_path.rglob("*.png"))


def test_links_to_the_outside_are_refused(archive, served, tmp_path):
    with tarfile.open(served[0] / "link.tar", "w") as tar:
        member = tarfile.TarInfo("Images/gym")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc"
        tar.addfile(member)
    with pytest.raises(MisconfigurationException, match=r"link\.tar cannot be used"):
        fetch(archive._replace(url=archive.url.replace("scenes.tar", "link.tar")), tmp_path)


def test_a_list_of_another_length_is_refused(archive, tmp_path):
    lists = archive.lists | {"TestImages.txt": (archive.lists["TestImages.txt"][0], 1340)}
    with pytest.raises(
        MisconfigurationException, match=r"TestImages\.txt should have 1340 lines, .*, but has 98\. Download it"
    ):
        fetch(archive._replace(lists=lists), tmp_path)
    assert not (tmp_path / "TestImages.txt").exists()


def test_a_list_that_was_cut_in_its_last_line_is_refused(archive, served, tmp_path):
    whole = (served[0] / "TestImages.txt").read_bytes()
    (served[0] / "cut.txt").write_bytes(whole[:-4])
    lists = archive.lists | {"TestImages.txt": (f"{archive.url.rpartition('/')[0]}/cut.txt", LINES["TestImages.txt"])}
    with pytest.raises(MisconfigurationException, match=r"cut\.txt should have .* names 'tram/.*', which is not in"):
        fetch(archive._replace(lists=lists), tmp_path)
    assert not (tmp_path / "TestImages.txt").exists()
    fetch(archive, tmp_path)
    assert (tmp_path / "TestImages.txt").read_bytes() == whole


def test_a_file_too_many_does_not_matter(archive, served, tmp_path):
    with tarfile.open(served[0] / "more.tar", "w") as tar:
        tar.add(served[0] / "whole" / "Images", "Images")
        for name in ("Images/attic/._hidden.png", "Images/attic/another.png"):
            tar.addfile(tarfile.TarInfo(name))
    fetch(archive._replace(url=archive.url.replace("scenes.tar", "more.tar")), tmp_path)
    assert (tmp_path / "Images" / "attic" / "another.png").exists()


def test_a_server_that_falls_silent_is_given_up(archive, tmp_path, monkeypatch):
    monkeypatch.setattr("pl_personalize.datamodules.scene_download._TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"http://127.0.0.1:{mute.getsockname()[1]}/scenes.tar"
        with pytest.raises(MisconfigurationException, match=r"Cannot download ") as caught:
            fetch(archive._replace(url=address), tmp_path)
    assert isinstance(caught.value.__cause__, TimeoutError)
    assert socket.getdefaulttimeout() is None


def test_an_interruption_leaves_nothing_half_done(archive, tmp_path, monkeypatch):
    extract, done = tarfile.TarFile._extract_one, []

    def interrupted(self, member, *args, **options):
        done.append(member)
        if len(done) == 20:
            raise KeyboardInterrupt
        extract(self, member, *args, **options)

    monkeypatch.setattr(tarfile.TarFile, "_extract_one", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch(archive, tmp_path)
    assert not (tmp_path / "Images").exists()
    monkeypatch.setattr(tarfile.TarFile, "_extract_one", extract)
    Quiet.requests.clear()
    fetch(archive, tmp_path)
    assert len(list((tmp_path / "Images").rglob("*.png"))) == archive.images
    assert "/scenes.tar" not in Quiet.requests  # the archive was complete


def test_what_a_killed_download_left_is_not_taken_for_complete(archive, tmp_path):
    (tmp_path / ".download" / "Images").mkdir(parents=True)
    (tmp_path / ".download" / "scenes.tar").write_bytes(b"half")
    fetch(archive, tmp_path)
    assert len(list((tmp_path / "Images").rglob("*.png"))) == archive.images
