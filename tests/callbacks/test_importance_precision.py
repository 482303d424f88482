"""Importances in Trainers of every precision, and on a CUDA device: those of the same weights in full precision."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from networks import Transformer, make_network
from reference import naive_importance, relative_error
from small_runs import quiet_trainer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from pl_personalize import Importance, estimate_importance
from pl_personalize.callbacks import FisherImportance, MASImportance
from pl_personalize.callbacks.importance_callback import ImportanceCallback
from pl_personalize.functional.batches import call_model
from pl_personalize.functional.objectives import mas_cotangent
from pl_personalize.per_sample.power_sums import PerSamplePowerSums

NUM_ROWS, NUM_CLASSES = 11, 3
MakeCallback = Callable[..., ImportanceCallback]
# Of each kind: the callback, the kind and the options of the function, the kind of the naive reference.
KINDS: dict[str, tuple[MakeCallback, str, dict[str, Any], str]] = {
    "mas": (MASImportance, "mas", {}, "mas"),
    "expected": (lambda **o: FisherImportance(draws="all", **o), "fisher", {"draws": "all"}, "expected_fisher"),
    "empirical": (lambda **o: FisherImportance(labels="true", **o), "empirical_fisher", {}, "empirical_fisher"),
}
each_kind = pytest.mark.parametrize("kind", KINDS)
each_run = pytest.mark.parametrize("run", ["fit", "predict"])
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Net(LightningModule):
    """A small convolutional network; notes of each step whether autocast was on."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(64, NUM_CLASSES)
            )
        self.autocast_in_steps: set[bool] = set()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.autocast_in_steps.add(torch.is_autocast_enabled(self.device.type))
        return F.cross_entropy(self(batch[0]), batch[1])

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.autocast_in_steps.add(torch.is_autocast_enabled(self.device.type))
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05)


class Calls:
    """The forward of a callback; notes whether autocast was on, and the types of the output."""

    def __init__(self) -> None:
        self.autocast: set[bool] = set()
        self.dtypes: set[torch.dtype] = set()

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        logits: Tensor = model(batch[0])
        self.autocast.add(torch.is_autocast_enabled(logits.device.type))
        self.dtypes.add(logits.dtype)
        return logits


def data() -> tuple[Tensor, Tensor]:
    x = torch.randn(NUM_ROWS, 2, 6, 6, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(NUM_ROWS) % NUM_CLASSES


def estimated(
    folder: Path, kind: str, run: str, precision: str, accelerator: str = "cpu"
) -> tuple[Importance, Net, Calls]:
    """What the callback finds; the weights it was of (the last ones); the calls of its forward."""
    net, calls = Net(), Calls()
    callback = KINDS[kind][0](weights="last", forward=calls)
    trainer = quiet_trainer(folder, callback, accelerator=accelerator, devices=1, precision=precision)
    getattr(trainer, run)(net, DataLoader(TensorDataset(*data()), batch_size=4))
    assert callback.importance is not None
    return callback.importance, net, calls


def in_precision(net: Net, kind: str, dtype: torch.dtype) -> Importance:
    """Of the same weights, with the data, in a precision."""
    x, y = data()
    _, name, options, _ = KINDS[kind]
    weights = copy.deepcopy(net).cpu().to(dtype)
    batches = list(zip(x.to(dtype).split(4), y.split(4), strict=True))
    return estimate_importance(weights, batches, name, **options)


def dtypes(values: Importance) -> set[torch.dtype]:
    return {value.dtype for value in values.values()}


@each_run
@each_kind
def test_bf16_mixed_is_full_precision_without_autocast(tmp_path: Path, kind: str, run: str) -> None:
    importance, net, calls = estimated(tmp_path, kind, run, "bf16-mixed")

    assert net.autocast_in_steps == {True}
    assert (calls.autocast, calls.dtypes, dtypes(importance)) == ({False}, {torch.float32}, {torch.float32})
    assert relative_error(importance, in_precision(net, kind, torch.float32)) < 1e-6


@each_run
@each_kind
def test_a_run_inside_autocast_is_full_precision(tmp_path: Path, kind: str, run: str) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        importance, net, calls = estimated(tmp_path, kind, run, "32-true")

    assert net.autocast_in_steps == {True}
    assert (calls.autocast, calls.dtypes, dtypes(importance)) == ({False}, {torch.float32}, {torch.float32})
    assert relative_error(importance, in_precision(net, kind, torch.float32)) < 1e-6


@pytest.mark.filterwarnings("ignore::UserWarning")  # Lightning says which precision it takes
def test_16_mixed_on_a_cpu_is_bf16_mixed(tmp_path: Path) -> None:
    importance, net, calls = estimated(tmp_path, "mas", "fit", "16-mixed")

    assert (net.autocast_in_steps, calls.autocast, dtypes(importance)) == ({True}, {False}, {torch.float32})
    assert relative_error(importance, in_precision(net, "mas", torch.float32)) < 1e-6


@each_run
@each_kind
def test_64_true_is_the_loop_over_samples(tmp_path: Path, kind: str, run: str) -> None:
    importance, net, calls = estimated(tmp_path, kind, run, "64-true")
    x, y = data()

    assert (calls.dtypes, dtypes(importance)) == ({torch.float64}, {torch.float64})
    assert relative_error(importance, naive_importance(net, x.double(), KINDS[kind][3], y)) < 1e-10


@each_run
@each_kind
@pytest.mark.parametrize(
    ("precision", "dtype", "rounding"), [("bf16-true", torch.bfloat16, 5e-2), ("16-true", torch.float16, 1e-2)]
)
def test_half_precision_weights_sum_in_float32(
    tmp_path: Path, precision: str, dtype: torch.dtype, rounding: float, kind: str, run: str
) -> None:
    """As near to the same weights' in full precision as the rounding of a pass allows."""
    importance, net, calls = estimated(tmp_path, kind, run, precision)

    assert next(net.parameters()).dtype == dtype
    assert (calls.autocast, calls.dtypes, dtypes(importance)) == ({False}, {dtype}, {torch.float32})
    assert relative_error(importance, in_precision(net, kind, dtype)) < 1e-6
    assert relative_error(importance, in_precision(net, kind, torch.float32)) < rounding


# Reading a number from a tensor: on a CUDA device the program waits for it. Here counted on a CPU, below on the device.


def mlp(depth: int) -> tuple[nn.Module, Tensor]:
    hidden = [layer for _ in range(depth) for layer in (nn.Linear(6, 6), nn.ReLU(inplace=True))]
    return nn.Sequential(*hidden, nn.Linear(6, NUM_CLASSES)), torch.randn(5, 6)


def conv_net(depth: int) -> tuple[nn.Module, Tensor]:
    hidden = [layer for _ in range(depth) for layer in (nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Flatten(), nn.Linear(32, NUM_CLASSES)), torch.randn(5, 2, 4, 4)


def transformer(depth: int) -> tuple[nn.Module, Tensor]:
    network = Transformer()
    block = nn.TransformerEncoderLayer(8, 2, 12, activation="gelu", norm_first=True, batch_first=True)
    network.encoder = nn.TransformerEncoder(block, depth, enable_nested_tensor=False)
    return network, torch.randn(5, 5, 4)


def vjp_net(depth: int) -> tuple[nn.Module, Tensor]:
    """Layers without closed form."""
    hidden = [layer for _ in range(depth) for layer in (nn.Linear(6, 6), nn.PReLU(6))]
    return nn.Sequential(*hidden, nn.Linear(6, NUM_CLASSES)), torch.randn(5, 6)


DEEP = {"mlp": mlp, "conv": conv_net, "transformer": transformer, "vjp": vjp_net}


class ReadNumbers(TorchDispatchMode):
    """Counts the operators that bring a value from a tensor to Python."""

    OPERATORS = ("_local_scalar_dense", "equal", "nonzero", "is_nonzero", "unique", "_unique2", "item")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in self.OPERATORS
        return func(*args, **(kwargs or {}))


def reads_of_a_later_batch(network: nn.Module, x: Tensor, count: Callable[[Callable[[], None]], int]) -> int:
    """How many numbers the engine reads for a batch when the first one, with its check, is done."""
    engine = PerSamplePowerSums(
        network, dict(network.named_parameters()), power=1, forward=call_model, max_scratch_bytes=2**20
    )

    def add() -> None:
        engine.add(x, len(x), lambda logits: [mas_cotangent(logits)])

    with engine:
        add()
        return count(add)


def count_reads(call: Callable[[], None]) -> int:
    with ReadNumbers() as reads:
        call()
    return reads.count


def count_synchronisations(call: Callable[[], None]) -> int:
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            call()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("name", DEEP)
def test_a_later_batch_reads_as_many_numbers_however_many_layers_there_are(name: str) -> None:
    shallow, deep = (reads_of_a_later_batch(*DEEP[name](depth), count_reads) for depth in (2, 7))

    assert shallow == deep
    assert 1 <= shallow <= 2  # whether the logits are finite


# On a CUDA device


@pytest.fixture
def exact_matrix_products() -> Iterator[None]:
    """Without TensorFloat-32, which rounds to ten bits."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@needs_cuda
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-4)])
@each_kind
@pytest.mark.parametrize("name", ["mlp", "batch_norm", "transformer", "residual", "parametrised"])
def test_on_cuda_the_numbers_are_those_of_the_cpu(
    name: str, kind: str, dtype: torch.dtype, tolerance: float, exact_matrix_products: None
) -> None:
    network, x = make_network(name, 7)
    labels = torch.arange(7) % 3
    _, function_kind, options, naive_kind = KINDS[kind]
    right = naive_importance(network, x, naive_kind, labels)
    batches = list(zip(x.to(dtype).split([3, 4]), labels.split([3, 4]), strict=True))

    importance = estimate_importance(network.to("cuda", dtype), batches, function_kind, **options)

    assert {value.device.type for value in importance.values()} == {"cuda"}
    assert relative_error({n: value.cpu() for n, value in importance.items()}, right) < tolerance


@needs_cuda
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "32-true"])
@each_run
@each_kind
def test_a_trainer_on_cuda_gives_full_precision(
    tmp_path: Path, kind: str, run: str, precision: str, exact_matrix_products: None
) -> None:
    importance, net, calls = estimated(tmp_path, kind, run, precision, accelerator="gpu")

    assert net.autocast_in_steps == {precision != "32-true"}
    assert (calls.autocast, calls.dtypes, dtypes(importance)) == ({False}, {torch.float32}, {torch.float32})
    values = {name: value.cpu() for name, value in importance.items()}
    assert relative_error(values, in_precision(net, kind, torch.float32)) < 1e-4


@needs_cuda
@pytest.mark.parametrize("name", DEEP)
def test_on_cuda_a_later_batch_waits_as_often_however_many_layers_there_are(name: str) -> None:
    shallow, deep = (
        reads_of_a_later_batch(network.cuda(), x.cuda(), count_synchronisations)
        for network, x in (DEEP[name](depth) for depth in (2, 7))
    )

    assert shallow == deep
    assert shallow >= 1  # whether the logits are finite
