"""SequenceEvaluator: the accuracy matrix against a loop over models and tasks."""

import copy

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from pl_personalize.datamodules import DigitsDataModule, tensor_loader
from pl_personalize.datamodules.digits import IMAGE_SHAPE
from pl_personalize.metrics import TaskAccuracyMatrix
from pl_personalize.models import TaskNetwork, mlp
from pl_personalize.modules import SequenceEvaluator

CLASSES, ROWS = (2, 4, 3), (11, 9, 14)


def network(seed, classes=2) -> TaskNetwork:
    """With batch norm, whose statistics belong to the body that is swapped in."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5))
        nn.init.normal_(body[1].running_mean)
        nn.init.uniform_(body[1].running_var, 0.5, 2)
        return TaskNetwork(body, nn.Linear(8, classes))


MODELS = [network(seed, classes) for seed, classes in enumerate(CLASSES)]
BODIES = [model.body.state_dict() for model in MODELS]
HEADS = [model.head.state_dict() for model in MODELS]


def rows(task):
    generator = torch.Generator().manual_seed(100 + task)
    count = ROWS[task]
    return torch.randn(count, 6, generator=generator), torch.randint(CLASSES[task], (count,), generator=generator)


def loaders(tasks=3):
    return [tensor_loader(*rows(task), batch_size=4) for task in range(tasks)]


def plain_matrix(bodies=BODIES) -> list[list[float]]:
    """Row by row, example by example."""
    matrix = []
    for t, body in enumerate(bodies):
        matrix.append([])
        for i in range(t + 1):
            model = network(0, CLASSES[i]).eval()
            model.body.load_state_dict(body)
            model.head.load_state_dict(HEADS[i])
            right = sum(int(model(x[None]).argmax()) == int(y) for x, y in zip(*rows(i), strict=True))
            matrix[-1].append(right / ROWS[i])
    return matrix


def evaluated(evaluator, tmp_path, given=None, **options):
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, **options,
    )  # fmt: skip
    (first, *rest) = trainer.test(evaluator, given or loaders(), verbose=False)  # Lightning gives one for each loader
    assert all(other == first for other in rest)
    return first


def test_the_matrix_is_that_of_a_plain_loop(tmp_path):
    evaluator = SequenceEvaluator(network(9), BODIES, HEADS)
    results = evaluated(evaluator, tmp_path)
    wanted = plain_matrix()

    values = [value for row in wanted for value in row]
    assert len(set(values)) > 3  # else the test could not tell entries apart
    for t in range(3):
        assert evaluator.matrix[t, : t + 1].tolist() == pytest.approx(wanted[t])
        assert evaluator.matrix[t, t + 1 :].isnan().all()

    lost = [wanted[i][i] - wanted[2][i] for i in range(2)]
    assert results == pytest.approx(
        {f"test/acc/t{t + 1}/task{i + 1}": wanted[t][i] for t in range(3) for i in range(t + 1)}
        | {
            "test/avg_acc": sum(wanted[2]) / 3,
            "test/forgetting": sum(lost) / 3,
            "test/forgetting_cl": sum(lost) / 2,
        }
    )
    assert sum(lost) != 0


def test_only_the_last_model(tmp_path):
    evaluator = SequenceEvaluator(network(9), BODIES, HEADS, models="last")
    results = evaluated(evaluator, tmp_path)
    wanted = plain_matrix()[2]

    assert results == pytest.approx(
        {f"test/acc/t3/task{i + 1}": wanted[i] for i in range(3)} | {"test/avg_acc": sum(wanted) / 3}
    )
    assert evaluator.matrix[:2].isnan().all()


def test_each_model_on_its_own_task_and_nothing_else(tmp_path, monkeypatch):
    seen = set()
    update = TaskAccuracyMatrix.update
    monkeypatch.setattr(
        TaskAccuracyMatrix, "update", lambda self, *a, **k: (seen.add((k["model"], k["task"])), update(self, *a, **k))
    )
    evaluator = SequenceEvaluator(network(9), BODIES, HEADS, models="own")
    results = evaluated(evaluator, tmp_path)
    wanted = [row[-1] for row in plain_matrix()]

    assert results == pytest.approx(
        {f"test/acc/t{t + 1}/task{t + 1}": wanted[t] for t in range(3)} | {"test/avg_acc": sum(wanted) / 3}
    )
    assert evaluator.matrix[~torch.eye(3, dtype=torch.bool)].isnan().all()
    assert seen == {(0, 0), (1, 1), (2, 2)}


def test_models_are_tested_in_the_precision_of_the_trainer(tmp_path):
    evaluator = SequenceEvaluator(network(9), BODIES, HEADS)
    evaluated(evaluator, tmp_path, precision="64-true")
    for t, row in enumerate(plain_matrix()):
        assert evaluator.matrix[t, : t + 1].tolist() == pytest.approx(row)


def test_a_single_task(tmp_path):
    evaluator = SequenceEvaluator(network(9), BODIES[:1], HEADS[:1])
    accuracy = plain_matrix()[0][0]
    wanted = {
        "test/acc/t1/task1": accuracy,
        "test/avg_acc": accuracy,
        "test/forgetting": 0.0,
        "test/forgetting_cl": 0.0,
    }
    assert evaluated(evaluator, tmp_path, loaders(1)) == pytest.approx(wanted)
    assert evaluated(evaluator, tmp_path, loaders(1)[0]) == pytest.approx(wanted)


def test_a_second_test_begins_anew(tmp_path):
    evaluator = SequenceEvaluator(network(9), BODIES, HEADS)
    first = evaluated(evaluator, tmp_path)
    assert evaluated(evaluator, tmp_path) == first


def test_models_are_left_as_they_were(tmp_path):
    given, bodies = network(9), copy.deepcopy(BODIES)
    before = copy.deepcopy(given.state_dict())
    evaluated(SequenceEvaluator(given, BODIES, HEADS), tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in given.state_dict().items())
    for body, same in zip(BODIES, bodies, strict=True):
        assert all(torch.equal(body[name], same[name]) for name in same)


def test_the_network_that_was_given_can_still_be_trained():
    """It may be a learner's, which goes on to the next task."""
    given = network(9)
    SequenceEvaluator(given, BODIES, HEADS)
    assert all(p.requires_grad for p in given.parameters())


@pytest.mark.parametrize("count", [1, 2])
def test_a_test_loader_for_each_task_is_needed(tmp_path, count):
    with pytest.raises(MisconfigurationException, match=f"There are {count} test loaders for 3 tasks"):
        evaluated(SequenceEvaluator(network(9), BODIES, HEADS), tmp_path, loaders(count))


def test_a_body_for_each_head_is_needed():
    with pytest.raises(MisconfigurationException, match="one body and one head per task; got 2 and 3"):
        SequenceEvaluator(network(9), BODIES[:2], HEADS)
    with pytest.raises(MisconfigurationException, match="one body and one head per task; got 0 and 0"):
        SequenceEvaluator(network(9), [], [])
    with pytest.raises(MisconfigurationException, match="'first'"):
        SequenceEvaluator(network(9), BODIES, HEADS, models="first")


def test_models_that_do_not_fit_the_network_are_refused(tmp_path):
    """Else a layer that the models lack would be tested with the network's own, random parameters."""
    small = mlp(IMAGE_SHAPE, 2, [4])
    bodies, heads = [small.body.state_dict()] * 5, [small.head.state_dict()] * 5
    with pytest.raises(MisconfigurationException, match=r"body of model 1 .* hidden2\.bias, hidden2\.weight\.$"):
        SequenceEvaluator(mlp(IMAGE_SHAPE, 2, [4, 4]), bodies, heads)
    wrapped = [{f"module.{name}": value for name, value in body.items()} for body in bodies]
    with pytest.raises(MisconfigurationException, match=r"Without the prefix 'module\.' the names would match"):
        SequenceEvaluator(small, wrapped, heads)
    evaluator = SequenceEvaluator(mlp(IMAGE_SHAPE, 2, [6]), bodies, heads)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    with pytest.raises(MisconfigurationException, match=r"'hidden1\.weight' .* is \(4, 768\); .*\(6, 768\)"):
        trainer.test(evaluator, datamodule=DigitsDataModule(user=0), verbose=False)
