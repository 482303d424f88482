"""The package as it is installed: what is in it, how it is imported, and which of its rooms imports which."""

import ast
import configparser
import doctest
import importlib
import importlib.metadata
import importlib.resources
import importlib.util
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
# How the top-level folders are imported.
FOLDERS = {
    "pl_personalize": "pl_personalize",
    "callbacks": "pl_personalize.callbacks",
    "datamodules": "pl_personalize.datamodules",
}

# A room imports from rooms of a lower rank only; of its own rank, only what PEERS says.
RANKS = {
    "registry": 0,
    "checks": 0,
    "functional": 1,
    "per_sample": 2,
    "artifacts": 2,
    "batchnorm": 3,
    "adaptation": 3,
    "importance": 3,
    "estimation": 3,
    "merging": 3,
    "metrics": 3,
    "models": 3,
    "heads": 4,
    "learned_merging": 4,
    "device_merging": 4,
    "callbacks": 5,
    "datamodules": 5,
    "adaptations": 6,
    "modules": 7,
    "stages": 8,
    "methods": 9,
    "runner": 10,
    "cli": 11,
}
PEERS = {("estimation", "importance"), ("adaptation", "batchnorm")}


def _modules_below(folder: Path, package: str) -> dict[str, Path]:
    """Every module of a package, found as files: a module that does not import is in the list too."""
    modules = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        modules[".".join([package, *parts])] = path
    return modules


def _installed_modules() -> dict[str, Path]:
    modules = {}
    for package in FOLDERS.values():
        spec = importlib.util.find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            modules.update(_modules_below(Path(folder), package))
    return modules


MODULES = _installed_modules()
PACKAGES = [name for name, path in MODULES.items() if path.name == "__init__.py"]


def _imports(source: str, module: str, is_package: bool) -> set[str]:
    """What a module imports, anywhere in it and for typing too, as absolute names; `from a import b` gives a.b."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                drop = node.level - is_package
                parents = module.split(".")
                origin = ".".join(filter(None, [*parents[: len(parents) - drop], origin]))
            names.update(f"{origin}.{alias.name}" for alias in node.names)
    return names


def _room(name: str) -> str | None:
    """The room of a dotted name: `pl_personalize.modules.merge` is in `modules`; None is another package."""
    head, _, rest = name.partition(".")
    return rest.partition(".")[0] if head == "pl_personalize" else None


def _forbidden(room: str, imported: set[str]) -> list[str]:
    rank = RANKS[room]
    wrong = []
    for name in sorted(imported):
        target = _room(name)
        if target is None or target == room or (target.startswith("__") and target.endswith("__")):
            continue
        if not (RANKS.get(target, len(RANKS)) < rank or (room, target) in PEERS):
            wrong.append(name)
    return wrong


@pytest.fixture
def setup_cfg() -> configparser.ConfigParser:
    path = CHECKOUT / "setup.cfg"
    if not path.is_file():
        pytest.skip("setup.cfg is not beside the tests: they run against an installed wheel")
    config = configparser.ConfigParser()
    config.read(path, encoding="utf-8")
    return config


def test_setup_cfg_lists_every_package_of_the_tree(setup_cfg):
    in_tree = [
        name
        for folder, package in FOLDERS.items()
        for name, path in _modules_below(CHECKOUT / folder, package).items()
        if path.name == "__init__.py"
    ]
    listed = setup_cfg["options"]["packages"].split()

    assert sorted(listed) == sorted(in_tree)


def test_setup_cfg_lists_all_files_that_are_no_code(setup_cfg):
    data = setup_cfg["options.package_data"]
    packages = {package: CHECKOUT / folder for folder, package in FOLDERS.items()}
    packages["pl_personalize.runner"] = packages["pl_personalize"] / "runner"
    listed = {
        path for name, patterns in data.items() for glob in patterns.split() for path in packages[name].glob(glob)
    }
    in_tree = {path for folder in FOLDERS for path in (CHECKOUT / folder).rglob("*") if path.is_file()}

    assert listed == {path for path in in_tree if path.suffix != ".py" and "__pycache__" not in path.parts}


def test_setup_cfg_maps_the_folders(setup_cfg):
    lines = setup_cfg["options"]["package_dir"].strip().splitlines()
    mapped = {name.strip(): folder.strip() for name, _, folder in (line.partition("=") for line in lines)}

    assert mapped == {package: folder for folder, package in FOLDERS.items()}


def test_setup_cfg_has_no_upper_bound(setup_cfg):
    extras = setup_cfg["options.extras_require"]
    requirements = [setup_cfg["options"]["install_requires"], *(extras[extra] for extra in extras)]

    assert not [line for text in requirements for line in text.splitlines() if "<" in line or "~=" in line]


def test_the_folders_are_packages():
    assert set(FOLDERS.values()) <= set(PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_package_imports(package):
    assert importlib.import_module(package).__name__ == package


def test_nothing_is_imported_by_its_folder_name():
    for module in MODULES:
        importlib.import_module(module)

    assert not [name for name in sys.modules if name.partition(".")[0] in ("callbacks", "datamodules")]


def test_type_information_is_shipped():
    assert importlib.resources.files("pl_personalize").joinpath("py.typed").is_file()


def test_version_is_the_distributions():
    assert importlib.import_module("pl_personalize").__version__ == importlib.metadata.version("pl-personalize")


@pytest.mark.parametrize("module", [name for name in MODULES if name != "pl_personalize"])
def test_rooms_import_upward_only(module):
    path = MODULES[module]
    room = _room(module)
    assert room in RANKS, f"{module} is in no room of RANKS"
    imported = _imports(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")

    assert _forbidden(room, imported) == []
    assert not [name for name in imported if name.partition(".")[0] in ("callbacks", "datamodules", "experiments")]


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("pl_personalize.functional.merge", "import pl_personalize.artifacts", ["pl_personalize.artifacts"]),
        ("pl_personalize.artifacts", "from pl_personalize.functional import merge", []),
        ("pl_personalize.artifacts", "from .importance import Importance", ["pl_personalize.importance.Importance"]),
        ("pl_personalize.metrics", "from .models import mlp", ["pl_personalize.models.mlp"]),
        ("pl_personalize.modules.merge", "from pl_personalize.callbacks import AdaBN", []),
        ("pl_personalize.modules.merge", "from ..callbacks.adabn import AdaBN", []),
        ("pl_personalize.modules.merge", "from .task import TaskLearner", []),
        ("pl_personalize.callbacks.adabn", "from pl_personalize import modules", ["pl_personalize.modules"]),
        ("pl_personalize.callbacks.adabn", "from ..datamodules import x", ["pl_personalize.datamodules.x"]),
        ("pl_personalize.callbacks.adabn", "from pl_personalize import merge", ["pl_personalize.merge"]),
        ("pl_personalize.callbacks.adabn", "from pl_personalize import __version__", []),
        ("pl_personalize.runner.run", "import torch, pl_personalize.modules", []),
        ("pl_personalize.runner.run", "def f():\n    import pl_personalize.cli", ["pl_personalize.cli"]),
    ],
)
def test_the_import_check_sees_what_is_wrong(module, source, wrong):
    assert _forbidden(_room(module), _imports(source, module, is_package=False)) == wrong


@pytest.mark.parametrize("module", MODULES)
def test_doctests(module, tmp_path, monkeypatch, global_state):
    monkeypatch.chdir(tmp_path)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    result = doctest.testmod(importlib.import_module(module), optionflags=flags)

    assert result.failed == 0, f"{result.failed} of {result.attempted} examples failed; see the captured output"
