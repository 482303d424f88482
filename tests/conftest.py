"""What every test can rely on: no network, one thread, no writing into the home folder, and no state left behind."""

import os
import random
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Before anything imports wandb or matplotlib: both read these when they are imported. Inherited by subprocesses.
_SESSION_DIR = tempfile.TemporaryDirectory(prefix="pl-personalize-tests-", ignore_cleanup_errors=True)
for _variable in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR", "MPLCONFIGDIR"):
    if _variable not in os.environ:
        os.environ[_variable] = str(Path(_SESSION_DIR.name, _variable.lower()))
    Path(os.environ[_variable]).mkdir(parents=True, exist_ok=True)
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ["MPLBACKEND"] = "Agg"

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

torch.set_num_threads(1)

# The first call of an operator takes far longer than the rest, so a deadline for each example measures nothing.
settings.register_profile("pl_personalize", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("pl_personalize")

_SEED_VARIABLES = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")
# wandb keeps the address of its service process here, for as long as the process lives.
_WANDB_SERVICE_VARIABLE = "WANDB_SERVICE"
# Contexts entered to undo a leaked one: inference mode ends when its context is collected.
_KEPT_CONTEXTS: list[torch.inference_mode] = []


def _is_guarded(variable: str) -> bool:
    if variable == _WANDB_SERVICE_VARIABLE:
        return False
    return variable in _SEED_VARIABLES or variable.startswith("WANDB_")


def _meaning(variable: str, value: str) -> str:
    """WandbLogger(offline=True) rewrites WANDB_MODE into its old name for the same thing."""
    return "offline" if (variable, value) == ("WANDB_MODE", "dryrun") else value


@dataclass(frozen=True)
class _GlobalState:
    """The state of the process that a test must leave as it found it."""

    dtype: torch.dtype
    grad: bool
    inference: bool
    deterministic: bool
    deterministic_warn_only: bool
    environment: dict[str, str]

    @classmethod
    def now(cls) -> "_GlobalState":
        return cls(
            dtype=torch.get_default_dtype(),
            grad=torch.is_grad_enabled(),
            inference=torch.is_inference_mode_enabled(),
            deterministic=torch.are_deterministic_algorithms_enabled(),
            deterministic_warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
            environment={name: _meaning(name, value) for name, value in os.environ.items() if _is_guarded(name)},
        )

    def restore(self) -> None:
        if self.inference != torch.is_inference_mode_enabled():
            context = torch.inference_mode(self.inference)
            context.__enter__()
            _KEPT_CONTEXTS.append(context)
        torch.set_default_dtype(self.dtype)
        torch.set_grad_enabled(self.grad)
        torch.use_deterministic_algorithms(self.deterministic, warn_only=self.deterministic_warn_only)
        for name in [name for name in os.environ if _is_guarded(name)]:
            if name not in self.environment:
                del os.environ[name]
        os.environ.update(self.environment)

    def changes_in(self, later: "_GlobalState") -> list[str]:
        named = {
            "torch's default dtype": (self.dtype, later.dtype),
            "torch's grad mode": (self.grad, later.grad),
            "torch's inference mode": (self.inference, later.inference),
            "torch's deterministic algorithms": (self.deterministic, later.deterministic),
            "torch's deterministic warn_only": (self.deterministic_warn_only, later.deterministic_warn_only),
        }
        for name in sorted(self.environment.keys() | later.environment.keys()):
            named[f"environment variable {name}"] = (self.environment.get(name), later.environment.get(name))
        return [f"{what}: {before} -> {after}" for what, (before, after) in named.items() if before != after]


def _finish_wandb() -> list[str]:
    wandb = sys.modules.get("wandb")
    run = getattr(wandb, "run", None)
    if wandb is None or run is None:
        return []
    wandb.finish()
    return [f"wandb.run: {run.id} was still open"]


@pytest.fixture(autouse=True)
def leak_guard() -> Iterator[None]:
    """Fails a test that changes the state of the process and puts it back for the next one."""
    before = _GlobalState.now()
    yield
    changes = [*_finish_wandb(), *before.changes_in(_GlobalState.now())]
    before.restore()
    if changes:
        pytest.fail(
            "the test left global state behind (ask for the fixture `global_state` if it has to change it):\n  "
            + "\n  ".join(changes),
            pytrace=False,
        )


@pytest.fixture(autouse=True)
def own_draws(leak_guard: None) -> None:
    """What a test itself draws depends on no other test, in whichever order and process they run."""
    seed = int(os.environ.get("PL_PERSONALIZE_TEST_SEED", "0"))
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture
def global_state(leak_guard: None) -> Iterator[None]:
    """Lets a test change what the leak guard watches: `seed_everything`, a deterministic Trainer, a W&B run."""
    before = _GlobalState.now()
    yield
    _finish_wandb()
    before.restore()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the real data sets; tests that need it are skipped where it is missing."""
    default = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    folder = Path(os.environ.get("PL_PERSONALIZE_DATA") or default)
    if not folder.is_dir():
        pytest.skip(f"no data sets at {folder}; set PL_PERSONALIZE_DATA to the folder that has them")
    return folder
