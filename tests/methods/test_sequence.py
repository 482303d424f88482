"""Methods that train one model through all tasks, and fine-tuning for users: how they train, and what is tested."""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tiny_benchmark import Tiny, call, plain, with_norm
from wandb_file import read_run

from pl_personalize import Importance, estimate_importance
from pl_personalize.artifacts import TensorFile
from pl_personalize.callbacks import ParameterPenalty
from pl_personalize.datamodules import tensor_loader
from pl_personalize.functional.seeding import derive_seed
from pl_personalize.modules import LwFLearner, MergeModule, SequenceEvaluator, TaskLearner
from pl_personalize.modules.merge_module import EXPERT_KIND
from pl_personalize.runner import BaselineOptions, ImportanceOptions, TrainingOptions, WandbOptions
from pl_personalize.runner.checkpoints import Checkpoints
from pl_personalize.runner.metrics_log import MetricsLog
from pl_personalize.runner.server_run import ServerRun
from pl_personalize.runner.trained import part

LONGER = TrainingOptions(epochs=4, lr=0.1)


def model(folder: Path, server: str, task: int) -> dict[str, torch.Tensor]:
    return TensorFile(folder / "checkpoints" / server / "seed1" / f"task{task}.safetensors", kind=EXPERT_KIND).load()


def network(state: dict[str, torch.Tensor]) -> torch.nn.Module:
    made = plain(2)
    made.load_state_dict({name: value for name, value in state.items() if not name.startswith("old_heads")})
    return made.eval()


def accuracy(state: dict[str, torch.Tensor], head: dict[str, torch.Tensor], images: object) -> float:
    made = network(state)
    made.head.load_state_dict(head)
    x, y = images
    return float((made(x).argmax(1) == y).float().mean())


def test_without_strength_all_are_plain_finetuning(tmp_path):
    nothing = BaselineOptions(mas_strength=0.0, ewc_strength=0.0, lwf_strength=0.0)
    call(tmp_path, data=Tiny(tasks=3), methods=["MAS", "EWC", "LwF", "Finetune"], training=LONGER, baselines=nothing)

    for server in ("MAS", "EWC"):
        for task in (1, 2, 3):
            for name, value in model(tmp_path, "Finetune", task).items():
                assert torch.equal(model(tmp_path, server, task)[name], value), (server, task, name)
    for name, value in model(tmp_path, "Finetune", 3).items():
        torch.testing.assert_close(model(tmp_path, "LwF", 3)[name], value)


def test_all_methods_share_the_first_model_which_is_trained_once(tmp_path, monkeypatch):
    methods = ["mean-IMM", "MAS", "EWC", "LwF", "Finetune"]
    for method in methods:  # each on its own
        call(tmp_path / method, methods=[method], loggers=["csv"])
    trained = []
    train = ServerRun._train
    monkeypatch.setattr(
        ServerRun, "_train", lambda self, stage, *args: (trained.append(stage), train(self, stage, *args))[1]
    )
    for some in (methods[2:], methods):
        call(tmp_path / "all", methods=some, loggers=["csv"])

    assert [stage for stage in trained if stage.endswith("task1")] == ["EWC/seed1/train/task1"]
    for method in methods:
        server = "IMM" if method == "mean-IMM" else method
        for task in (1, 2):
            alone = model(tmp_path / method, server, task)
            for name, value in model(tmp_path / "all", server, task).items():
                assert torch.equal(value, alone[name]), (server, task, name)
        alone, together = (MetricsLog(tmp_path / folder / "metrics.jsonl").read() for folder in (method, "all"))
        assert [r for r in together if r.stage == f"{server}/seed1/train/task1"] == alone[:1]


def test_the_first_model_is_taken_over_after_a_training_that_was_interrupted(tmp_path, monkeypatch):
    class KilledError(Exception):
        pass

    def killed(self, trainer, *args, **kwargs):
        trainer.save_checkpoint(self.resume)
        raise KilledError

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "on_train_batch_end", killed)
        with pytest.raises(KilledError):
            call(tmp_path, methods=["MAS"])
    call(tmp_path, methods=["EWC"])
    call(tmp_path, methods=["MAS"])
    call(tmp_path / "alone", methods=["MAS"])

    for name, value in model(tmp_path / "alone", "MAS", 2).items():
        assert torch.equal(model(tmp_path, "MAS", 2)[name], value)
    assert not (tmp_path / "checkpoints" / "MAS" / "seed1" / "task1").exists()


@pytest.mark.parametrize("reduction", ["sample", "batch"])
@pytest.mark.parametrize(("server", "kind"), [("MAS", "mas"), ("EWC", "empirical_fisher")])
def test_importances_are_of_the_training_images_of_each_task(tmp_path, server, kind, reduction):
    data = Tiny(tasks=3)
    call(tmp_path, data=data, methods=[server], importance=ImportanceOptions(reduction=reduction))

    files = sorted((tmp_path / "importances" / server / "seed1").iterdir())
    assert [file.stem for file in files] == [f"server-{kind}-task{task}" for task in (1, 2)]
    for task, file in enumerate(files):
        x, y = data.server_split(task)[0]
        batches = [(x[i : i + 4], y[i : i + 4]) for i in range(0, len(x), 4)]
        right = estimate_importance(network(model(tmp_path, server, task + 1)), batches, kind, reduction=reduction)
        found = Importance.load(file)
        assert (found.kind, found.reduction, found.num_samples) == (kind, reduction, len(x))
        for name, value in found.items():
            torch.testing.assert_close(value, right[f"body.{name}"])


@pytest.mark.parametrize(("reduction", "times"), [("sample", 1), ("batch", 4)])
def test_penalties_have_the_importances_of_all_earlier_tasks_and_the_last_model_as_anchor(
    tmp_path, monkeypatch, reduction, times
):
    made = []
    real = ParameterPenalty.__init__

    def spy(self, strength, importances, anchor, **options):
        made.append((strength, [Path(path).stem for path in importances], anchor))
        real(self, strength, importances, anchor, **options)

    monkeypatch.setattr(ParameterPenalty, "__init__", spy)
    call(
        tmp_path,
        data=Tiny(tasks=3),
        methods=["EWC"],
        baselines=BaselineOptions(ewc_strength=0.5),
        importance=ImportanceOptions(reduction=reduction),
    )

    assert [strength for strength, _, _ in made] == [0.5 * times] * 2
    stems = [f"server-empirical_fisher-task{task}" for task in (1, 2)]
    assert [names for _, names, _ in made] == [stems[:1], stems]
    for task, (_, _, anchor) in enumerate(made, start=1):
        right = model(tmp_path, "EWC", task)
        assert all(torch.equal(value, right[f"body.{name}"]) for name, value in anchor.items())


def test_a_strong_penalty_keeps_what_was_important(tmp_path):
    call(tmp_path, methods=["MAS", "Finetune"], training=LONGER, baselines=BaselineOptions(mas_strength=5.0))
    importance = Importance.load(tmp_path / "importances" / "MAS" / "seed1" / "server-mas-task1.safetensors")
    moved = {}
    for server in ("MAS", "Finetune"):
        first, second = model(tmp_path, server, 1), model(tmp_path, server, 2)
        moved[server] = sum(
            float((omega * (second[f"body.{name}"] - first[f"body.{name}"]).square()).sum())
            for name, omega in importance.items()
        )
    assert 0 < moved["MAS"] < 0.5 * moved["Finetune"]


def test_lwf_tests_each_model_with_its_own_heads(tmp_path):
    data = Tiny(tasks=3, images=200)
    call(tmp_path, data=data, methods=["LwF"], training=TrainingOptions(epochs=10, lr=0.3))
    matrix = _matrix(tmp_path, "LwF", "LwF", "ann")
    differing = set()
    for t in range(3):
        state = model(tmp_path, "LwF", t + 1)
        for i in range(t + 1):
            images = data.user_split(0, i)[1]
            own = accuracy(state, part(state, "head" if i == t else f"old_heads.{i}"), images)
            assert matrix[t][i] == pytest.approx(own)
            if own != accuracy(state, part(model(tmp_path, "LwF", i + 1), "head"), images):
                differing.add((t, i))
    assert differing  # else the heads that tasks began with would do
    assert not any(t == i for t, i in differing)


def test_finetuning_tests_earlier_tasks_with_the_heads_they_had(tmp_path):
    data = Tiny(images=40)
    call(tmp_path, data=data, methods=["Finetune"], training=LONGER)
    matrix = _matrix(tmp_path, "Finetune", "Finetune", "bob")
    last, first = model(tmp_path, "Finetune", 2), model(tmp_path, "Finetune", 1)
    head = {name.removeprefix("head."): value for name, value in first.items() if name.startswith("head.")}

    assert matrix[1][0] == pytest.approx(accuracy(last, head, data.user_split(1, 0)[1]))


def test_ft_trains_each_expert_on_each_users_own_images(tmp_path):
    data = Tiny(images=40)
    rows = call(
        tmp_path,
        data=data,
        methods=["FT", "Experts"],
        baselines=BaselineOptions(ft_epochs=3, ft_lr=0.1),
        loggers=["csv"],
    )
    folder = tmp_path / "finetuned" / "IMM" / "seed1"
    assert sorted(file.stem for file in folder.iterdir()) == ["ann-task1", "ann-task2", "bob-task1", "bob-task2"]
    tuned = {file.stem: TensorFile(file, kind=EXPERT_KIND).load() for file in folder.iterdir()}
    assert not torch.equal(tuned["ann-task1"]["head.weight"], tuned["bob-task1"]["head.weight"])
    for number, user in enumerate(data.users):
        (row,) = [row for row in rows if (row.method, row.user) == ("FT", user)]
        found = []
        for task in range(2):
            state = tuned[f"{user}-task{task + 1}"]
            head = {"weight": state["head.weight"], "bias": state["head.bias"]}
            found.append(accuracy(state, head, data.user_split(number, task)[1]))
        assert row.avg_acc == pytest.approx(100 * sum(found) / 2)
        assert row.forgetting is None


def test_every_method_with_batch_norm_and_wandb(tmp_path):
    methods = ["FIM-RACL", "MAS", "EWC", "LwF", "Finetune", "FT", "Experts", "Joint"]
    options = {"network": with_norm, "methods": methods, "loggers": ["wandb"]}
    rows = call(tmp_path, **options, wandb=WandbOptions(artifacts=["experts", "importances"]))

    assert {row.method for row in rows} == set(methods)
    runs = {}
    for folder in (tmp_path / "wandb").glob("offline-run-*"):
        run = read_run(folder)
        runs[run.run.job_type] = run
    assert set(runs) == {"IMM", "MAS", "EWC", "LwF", "Finetune", "Joint"}
    artifacts = {
        server: sorted(a.name for a in run.artifacts if not a.name.startswith("run-")) for server, run in runs.items()
    }
    assert sum("empirical_fisher" in name for name in artifacts["EWC"]) == 1
    assert len(artifacts["LwF"]) == 2
    assert len(artifacts["IMM"]) == 2 + 2 * 2 + 2 * 2  # experts, of each user importances and tuned experts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mas_strength": -1.0}, "baselines.mas_strength must be 0 or more; got -1.0"),
        ({"lwf_temperature": 0.0}, "baselines.lwf_temperature must be positive; got 0.0"),
        ({"lwf_temperature": float("inf")}, "baselines.lwf_temperature must be positive; got inf"),
        ({"ft_epochs": 0}, "baselines.ft_epochs must be at least 1; got 0"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, options, message):
    with pytest.raises(MisconfigurationException, match=message):
        call(tmp_path, methods=["MAS"], baselines=BaselineOptions(**options))


def _matrix(folder: Path, server: str, method: str, user: str) -> list[list[float]]:
    stages = json.loads((folder / "manifest.json").read_text())["stages"]
    return stages[f"{server}/seed1/test/{method}/{user}"]["result"]["matrix"]


def test_trained_batch_norm_is_trained_and_tested_with_the_models_own_heads(tmp_path, monkeypatch):
    tested = []
    start = SequenceEvaluator.on_test_start
    monkeypatch.setattr(SequenceEvaluator, "on_test_start", lambda self: (tested.append(self), start(self))[1])
    call(tmp_path, network=with_norm, methods=["LwF"], adaptations=["AdaBN-S"], training=LONGER)

    state = model(tmp_path, "LwF", 2)
    for evaluator in tested:
        assert set(evaluator.entries) == {(0, 0), (1, 0), (1, 1)}
        assert torch.equal(evaluator.head_of(1, 0)["weight"], state["old_heads.0.weight"])
        assert torch.equal(evaluator.head_of(1, 1)["weight"], state["head.weight"])
    assert len(tested) == 2  # a user each


# What the published code does


def test_fim_imm_adds_what_train_and_val_give(tmp_path, monkeypatch):
    data = Tiny()
    monkeypatch.setattr(torch, "multinomial", lambda chances, *args, **options: chances.argmax(1, keepdim=True))
    call(tmp_path, data=data, methods=["FIM-IMM"], importance=ImportanceOptions(reduction="batch"))

    for task in range(2):
        trained = network(model(tmp_path, "IMM", task + 1))
        right = 0.0
        for split in ("train", "val"):
            squares = []
            for x, _ in data.server_dataloader(task, split):
                loss = torch.nn.functional.cross_entropy(trained(x), trained(x).argmax(1))
                squares.append(torch.autograd.grad(loss, trained.body[0].weight)[0].square())
            right = right + torch.stack(squares).mean(0)
        folder = tmp_path / "importances" / "IMM" / "seed1"
        found = Importance.load(folder / f"server-fisher-task{task + 1}.safetensors")
        assert found.num_samples == 24
        torch.testing.assert_close(found["0.weight"], right + 1e-8)


def test_l2_transfer_as_the_published_code_has_it(tmp_path, monkeypatch):
    learners, penalties = [], []
    configure, penalty = TaskLearner.configure_optimizers, ParameterPenalty.__init__

    def spy(self):
        learners.append((self.hparams["task"], self.hparams["l2_transfer"], self.penalty is not None))
        return configure(self)

    monkeypatch.setattr(TaskLearner, "configure_optimizers", spy)

    def other_spy(self, *args, **options):
        penalties.append((args, options))
        penalty(self, *args, **options)

    monkeypatch.setattr(ParameterPenalty, "__init__", other_spy)
    training = TrainingOptions(epochs=1, lr=0.1, l2_transfer="reference")
    call(tmp_path, data=Tiny(tasks=3), methods=["Experts"], training=training)

    assert learners == [(0, 1.0, False), (1, 0.0, False), (2, 1.0, True)]
    assert [found for found in penalties if found[1]["module"] == "network.head"] == [
        ((1.0,), {"module": "network.head", "log_name": None})
    ]


def test_reference_merges_have_zero_where_nothing_is_important(tmp_path, monkeypatch):
    seen = []
    make = MergeModule.__init__
    monkeypatch.setattr(MergeModule, "__init__", lambda self, *a, **k: (seen.append(k["zero"]), make(self, *a, **k))[1])
    for reduction in ("sample", "batch"):
        call(tmp_path / reduction, methods=["MAS-IMM"], importance=ImportanceOptions(reduction=reduction))
    assert set(seen[: len(seen) // 2]) == {"mean"}
    assert set(seen[len(seen) // 2 :]) == {"reference"}


def test_ft_is_what_its_options_and_the_adapt_images_make_of_an_expert(tmp_path):
    data = Tiny()
    call(tmp_path, data=data, methods=["FT"], baselines=BaselineOptions(ft_epochs=3, ft_lr=0.07))
    tuned = TensorFile(tmp_path / "finetuned" / "IMM" / "seed1" / "bob-task2.safetensors", kind=EXPERT_KIND).load()

    expert = network(model(tmp_path, "IMM", 2)).train()
    optimizer = torch.optim.SGD(expert.parameters(), lr=0.07, momentum=0.9)
    x, y = data.user_split(1, 1)[0]
    loader = tensor_loader(x, y, batch_size=4, shuffle=True, seed=derive_seed(1, "FT", "bob", 1))
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        for images, labels in loader:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(expert(images), labels).backward()
            optimizer.step()

    for name, value in expert.state_dict().items():
        torch.testing.assert_close(tuned[name], value)


def test_lwf_trains_with_its_options_and_the_heads_as_they_were(tmp_path, monkeypatch):
    made = []
    fit = LwFLearner.on_fit_start

    def spy(self):
        made.append((self.strength, self.temperature, [head.weight.detach().clone() for head in self.old_heads]))
        fit(self)

    monkeypatch.setattr(LwFLearner, "on_fit_start", spy)
    baselines = BaselineOptions(lwf_strength=2.5, lwf_temperature=3.5)
    call(tmp_path, data=Tiny(tasks=3), methods=["LwF"], baselines=baselines, training=LONGER)

    assert [(strength, temperature) for strength, temperature, _ in made] == [(2.5, 3.5)] * 3
    second = model(tmp_path, "LwF", 2)
    assert [len(heads) for _, _, heads in made] == [0, 1, 2]
    assert torch.equal(made[1][2][0], model(tmp_path, "LwF", 1)["head.weight"])
    assert torch.equal(made[2][2][0], second["old_heads.0.weight"])
    assert torch.equal(made[2][2][1], second["head.weight"])


@pytest.mark.parametrize(("method", "option"), [("FT", {"ft_lr": 1e30}), ("EWC", {"ewc_strength": 1e30})])
def test_a_training_that_diverges_is_no_result(tmp_path, method, option):
    with pytest.raises(
        MisconfigurationException, match=r"diverged .* smaller (baselines\.ft_lr|training\.lr, or strength)"
    ):
        call(tmp_path, methods=[method], baselines=BaselineOptions(**option))
