"""MASImportance and FisherImportance in three processes, against one process."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ranks
import torch
from filelock import FileLock
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from reference import relative_error
from small_runs import quiet_trainer
from torch import Tensor

from pl_personalize import Importance, estimate_importance
from pl_personalize.callbacks import FisherImportance, MASImportance, requirements

KINDS = {
    "mas": ("mas", {}),
    "expected": ("fisher", {"draws": "all"}),
    "empirical": ("empirical_fisher", {}),
}
PREDICT_CASES = [f"{run}-{kind}" for run in ranks.PREDICT_RUNS for kind in ranks.predicted_kinds(run)]
ALL_CASES = [*ranks.FIT_CASES, *ranks.SAMPLED_CASES, *PREDICT_CASES]

each_group = pytest.mark.parametrize("num_ranks", ranks.GROUPS)


class Group:
    """What the processes of one group have written."""

    def __init__(self, folder: Path, num_ranks: int) -> None:
        self.folder, self.num_ranks = folder / str(num_ranks), num_ranks
        self.ranks: list[dict[str, Any]] = [
            torch.load(self.folder / f"rank-{rank}.pt", weights_only=True) for rank in range(num_ranks)
        ]

    def result(self, case: str, rank: int = 0) -> dict[str, Any]:
        return self.ranks[rank]["results"][case]

    def fitted(self) -> ranks.Net:
        """With the weights of the end of the fit, and the first rank's statistics of batch norm."""
        net = ranks.Net()
        net.load_state_dict(self.ranks[0]["weights"])
        return net


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Group]:
    """All groups; run once, also where several workers share the tests."""
    parallel = "PYTEST_XDIST_WORKER" in os.environ
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if parallel else base) / "ranks"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            (folder / "failures.txt").write_text(str(ranks.main(folder)))
    assert (folder / "failures.txt").read_text() == "0"
    return {num_ranks: Group(folder, num_ranks) for num_ranks in ranks.GROUPS}


def one_process(net: LightningModule, rows: list[int], kind: str) -> Importance:
    data = ranks.Rows()
    name, options = KINDS[kind]
    return estimate_importance(net, [(data.x[rows], data.y[rows])], name, **options)


def kind_of(result: dict[str, Any]) -> str:
    return {"mas": "mas", "fisher": "expected", "empirical_fisher": "empirical"}[result["kind"]]


# The result


@pytest.mark.slow
@each_group
@pytest.mark.parametrize("case", ranks.FIT_CASES)
def test_after_a_fit_the_importances_are_those_of_one_process(
    groups: dict[int, Group], num_ranks: int, case: str
) -> None:
    group, rows = groups[num_ranks], list(ranks.FIT_CASES[case].rows)
    result = group.result(case)

    assert result["num_samples"] == len(rows)
    assert relative_error(result["values"], one_process(group.fitted(), rows, kind_of(result))) < 1e-6


@pytest.mark.slow
@each_group
@pytest.mark.parametrize("case", PREDICT_CASES)
def test_after_predict_the_importances_are_those_of_one_process(
    groups: dict[int, Group], num_ranks: int, case: str
) -> None:
    run, kind = case.rsplit("-", 1)
    rows = ranks.predicted_rows(run, num_ranks)
    result = groups[num_ranks].result(case)

    assert (result["num_samples"], kind_of(result)) == (len(rows), kind)
    assert relative_error(result["values"], one_process(ranks.Net(), rows, kind)) < 1e-6


@pytest.mark.slow
@each_group
@pytest.mark.parametrize("case", ALL_CASES)
def test_each_rank_ends_with_the_same(groups: dict[int, Group], num_ranks: int, case: str) -> None:
    first, *others = (groups[num_ranks].result(case, rank) for rank in range(num_ranks))

    for other in others:
        assert all(torch.equal(other["values"][name], value) for name, value in first["values"].items())
        assert {**other, "values": list(other["values"])} == {**first, "values": list(first["values"])}


@pytest.mark.slow
@each_group
@pytest.mark.parametrize("case", ALL_CASES)
def test_the_file_is_the_result(groups: dict[int, Group], num_ranks: int, case: str) -> None:
    group = groups[num_ranks]
    result = group.result(case)
    loaded = Importance.load(result["path"])

    assert Path(result["path"]) == group.folder / "importances" / f"{case}.safetensors"
    assert {n: v.tolist() for n, v in loaded.items()} == {n: v.tolist() for n, v in result["values"].items()}
    assert (loaded.kind, loaded.num_samples) == (result["kind"], result["num_samples"])


@pytest.mark.slow
@each_group
def test_each_file_is_written_once_and_by_rank_zero(groups: dict[int, Group], num_ranks: int) -> None:
    group = groups[num_ranks]
    saves = Counter((group.folder / "saves.txt").read_text().splitlines())

    assert saves == Counter({f"0 {group.result(case)['path']}": 1 for case in ALL_CASES})
    assert {path.stem for path in (group.folder / "importances").iterdir()} == set(ALL_CASES)


# Drawn labels


def moments_of_a_draw(net: LightningModule, rows: list[int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Expectation of the mean over the rows for one draw each, and its variance if the draws are independent."""
    data, net = ranks.Rows(), net.double().eval()
    parameters = dict(net.named_parameters())
    means = {name: torch.zeros_like(p) for name, p in parameters.items()}
    variances = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for row in rows:
        log_chances = net(data.x[row : row + 1].double()).log_softmax(1)[0]
        second = {name: torch.zeros_like(p) for name, p in parameters.items()}
        fourth = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for label in range(ranks.NUM_CLASSES):
            gradients = torch.autograd.grad(log_chances[label], list(parameters.values()), retain_graph=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                second[name] += log_chances[label].exp().detach() * gradient**2
                fourth[name] += log_chances[label].exp().detach() * gradient**4
        for name in parameters:
            means[name] += second[name] / len(rows)
            variances[name] += (fourth[name] - second[name] ** 2) / len(rows) ** 2
    return means, variances


@pytest.mark.slow
@each_group
@pytest.mark.parametrize("case", ["sampled", "sampled-generator"])
def test_sampled_labels_are_right_in_expectation(groups: dict[int, Group], num_ranks: int, case: str) -> None:
    """Within six standard deviations, entry by entry; draws that ranks have in common add at most their number."""
    group = groups[num_ranks]
    draws, rows = ranks.SAMPLED_CASES[case].options["draws"], list(ranks.SAMPLED_CASES[case].rows)
    found = group.result(case)["values"]
    means, variances = moments_of_a_draw(group.fitted(), rows)

    assert relative_error(found, means) > 1e-4  # they are drawn
    for name, mean in means.items():
        deviation = 6 * (num_ranks * variances[name].clamp_min(0) / draws).sqrt()
        assert deviation.norm() < 0.4 * mean.norm(), name  # so that a wrong factor shows
        assert ((found[name] - mean).abs() <= deviation + 1e-6 * mean.norm()).all(), name


@pytest.mark.slow
@each_group
def test_ranks_draw_labels_of_their_own(groups: dict[int, Group], num_ranks: int) -> None:
    """Of rows that are all the same; the last bias tells how often each label was drawn.

    Ranks that draw the same draw each label a multiple of their number of times, and their samples say nothing new.
    Ranks that draw independently may do so by chance, two of them once in four: hence many draws.
    """
    group = groups[num_ranks]
    net = group.fitted().eval()
    chances = net(ranks.Rows(1, alike=True).x).detach().softmax(1)[0]
    found = torch.stack([group.result(case)["values"]["net.4.bias"] for case in ranks.ALIKE_CASES])
    counts = ranks.NUM_ALIKE * (found - chances**2) / (1 - 2 * chances)

    torch.testing.assert_close(counts, counts.round(), atol=0.05, rtol=0)
    assert (counts.sum(1).round() == ranks.NUM_ALIKE).all()
    assert (counts.round() % num_ranks != 0).any(1).sum() > len(counts) // 4


# What is refused


@pytest.mark.slow
@each_group
@pytest.mark.parametrize("data", ranks.REFUSED)
@pytest.mark.parametrize("run", ["fit", "predict"])
def test_data_that_cannot_be_divided_are_refused_on_each_rank(
    groups: dict[int, Group], num_ranks: int, run: str, data: str
) -> None:
    messages = {rank["refusals"][f"{run}-{data}"]["message"] for rank in groups[num_ranks].ranks}

    assert len(messages) == 1
    assert f"cannot be divided among {num_ranks} processes" in str(messages)


@pytest.mark.slow
@each_group
@pytest.mark.parametrize("data", [*ranks.REFUSED])
@pytest.mark.parametrize("run", ["fit", "predict"])
def test_data_that_cannot_be_divided_are_refused_before_the_first_step(
    groups: dict[int, Group], num_ranks: int, run: str, data: str
) -> None:
    assert {rank["refusals"][f"{run}-{data}"]["steps"] for rank in groups[num_ranks].ranks} == {0}


@pytest.mark.parametrize("stage", ["fit", "predict"])
@pytest.mark.parametrize("callback", [MASImportance, FisherImportance])
@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy])
def test_a_users_own_kind_of_a_strategy_that_shards_is_refused(
    strategy: type, callback: type[Callback], stage: str
) -> None:
    own = object.__new__(type("Own", (strategy,), {}))

    with pytest.raises(MisconfigurationException, match=rf"{callback.__name__} needs whole parameters .* Own shards"):
        callback().setup(SimpleNamespace(strategy=own, callbacks=[]), ranks.Net(), stage)


@pytest.mark.parametrize("run", ["fit", "predict"])
@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"])
@pytest.mark.parametrize("callback", [MASImportance, FisherImportance])
def test_a_trainer_whose_strategy_shards_is_stopped_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, callback: type[Callback], name: str, run: str
) -> None:
    monkeypatch.setattr(requirements, name, SingleDeviceStrategy)
    steps = ranks.Steps()
    trainer = quiet_trainer(tmp_path, callback(), steps)

    with pytest.raises(MisconfigurationException, match=f"{callback.__name__} needs whole .* SingleDeviceStrategy"):
        getattr(trainer, run)(ranks.Net(), ranks.loader_of(ranks.NUM_ROWS, batch_size=5)())

    assert steps.count == 0


@pytest.mark.parametrize("strategy", [DDPStrategy, SingleDeviceStrategy])
@pytest.mark.parametrize("callback", [MASImportance, FisherImportance])
def test_strategies_that_keep_whole_parameters_are_accepted(callback: type[Callback], strategy: type) -> None:
    trainer = SimpleNamespace(strategy=object.__new__(strategy), callbacks=[], limit_train_batches=1.0)
    callback().setup(trainer, ranks.Net(), "fit")
