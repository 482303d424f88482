"""Adaptations as stages: who does which, and what they leave for the tests."""

import copy
import json

import pytest
import torch
from lightning.pytorch import Trainer
from tiny_benchmark import Finished, Tiny, accuracy, call, loaded, matrix, model, plain, with_norm

from pl_personalize import adapt_batchnorm
from pl_personalize.adaptations import reestimated_statistics
from pl_personalize.adaptations.fine_tune import FineTune
from pl_personalize.adaptations.reestimated_statistics import AdaBNSupervised
from pl_personalize.artifacts import ArtifactError, TensorFile, save_tensors
from pl_personalize.datamodules import tensor_loader
from pl_personalize.functional.seeding import derive_seed
from pl_personalize.models import TaskNetwork
from pl_personalize.runner import AdaptationOptions
from pl_personalize.runner.server_run import load_adapted

TUNED = AdaptationOptions(ft=FineTune(epochs=3, lr=0.07), adabn_s=AdaBNSupervised(epochs=3, lr=0.2))


def adapted(folder, name):
    return load_adapted(folder / "adapted" / "experts" / "seed1" / f"{name}.safetensors")


def stages(finished, kind):
    return [stage.split("/", 3)[3] for stage in finished.stages if f"/{kind}/" in stage]


def tuned_by_hand(data, folder, user, task, make) -> TaskNetwork:
    """SGD with momentum on the expert of a task, in the order of the user's loader."""
    expert = loaded(model(folder, "experts", task + 1), make).train()
    optimizer = torch.optim.SGD(expert.parameters(), lr=0.07, momentum=0.9)
    seed = derive_seed(1, "FT", data.users[user], task)
    loader = tensor_loader(*data.user_split(user, task)[0], batch_size=4, shuffle=True, seed=seed)
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        for images, labels in loader:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(expert(images), labels).backward()
            optimizer.step()
    return expert.eval()


@pytest.mark.parametrize("make", [plain, with_norm])
def test_fine_tuning_is_sgd_on_the_experts_and_steps_that_methods_share_are_done_once(tmp_path, monkeypatch, make):
    data, finished = Tiny(images=40), Finished(monkeypatch)
    adaptations = ["none", "AdaBN"] if make is with_norm else ["none"]
    options = {"data": data, "network": make, "adaptations": adaptations, "adaptation": TUNED}
    rows = call(tmp_path, methods=["Experts", "FT", "Experts+FT"], **options)

    labels = ["Experts", "Experts+AdaBN", "FT", "FT+AdaBN", "Experts+FT"]
    assert list(dict.fromkeys(row.label for row in rows)) == [
        label for label in labels if make is with_norm or "AdaBN" not in label
    ]
    users = ("ann", "bob")
    expected = [f"{name}/{user}" for name in ("FT/FT", "Experts/FT") for user in users]
    if make is with_norm:
        expected += [f"{name}/{user}" for name in ("Experts/AdaBN", "FT/FT+AdaBN") for user in users]
    assert sorted(stages(finished, "adapt")) == sorted(expected)

    for number, user in enumerate(users):
        tuned, pinned = (adapted(tmp_path, f"{user}-{method}-FT") for method in ("FT", "Experts"))
        assert set(tuned) == {(0, 0), (1, 1)}
        for (t, i), entries in tuned.items():
            by_hand = tuned_by_hand(data, tmp_path, number, i, make)
            for name, value in by_hand.state_dict().items():
                torch.testing.assert_close(entries[name], value)
                assert torch.equal(pinned[t, i][name], entries[name])
            split = data.user_split(number, i)[1]
            assert matrix(tmp_path, f"experts/seed1/test/FT/{user}")[i][i] == pytest.approx(accuracy(by_hand, split))
            if make is with_norm:
                both = adapted(tmp_path, f"{user}-FT-FT+AdaBN")[t, i]
                adapt_batchnorm(by_hand, [data.user_split(number, i)[0].images])
                for name, value in by_hand.state_dict().items():
                    torch.testing.assert_close(both[name], value)
                found = matrix(tmp_path, f"experts/seed1/test/FT+AdaBN/{user}")[i][i]
                assert found == pytest.approx(accuracy(by_hand, split))


def test_what_is_the_same_for_all_users_is_computed_once(tmp_path, monkeypatch):
    data, finished = Tiny(images=40), Finished(monkeypatch)
    methods, adaptations = ["mean-IMM", "MAS-RACL"], ["recalibrate", "recalibrate+AdaBN", "average"]
    call(tmp_path, data=data, network=with_norm, methods=methods, adaptations=adaptations)
    assert sorted(stages(finished, "adapt")) == sorted(
        ["mean-IMM/recalibrate/server", "mean-IMM/average/server"]
        + [f"mean-IMM/recalibrate+AdaBN/{user}" for user in data.users]
        + [f"MAS-RACL/{name}/{user}" for name in adaptations for user in data.users]
    )
    state = TensorFile(tmp_path / "merged" / "experts" / "seed1" / "bob-mean-IMM.safetensors", kind="merged")
    network = with_norm(2)
    network.load_state_dict(
        {name.replace("heads.0.", "head."): state[name] for name in state if not name.startswith("heads.1.")}
    )
    recalibrated = adapted(tmp_path, "server-mean-IMM-recalibrate")[1, 0]
    expected = adapt_batchnorm(copy.deepcopy(network), [data.server_split(0)[1].images], module="body")
    for name, value in expected.items():
        torch.testing.assert_close(recalibrated[f"body.{name}"], value)
    network.load_state_dict(recalibrated, strict=False)
    assert matrix(tmp_path, "experts/seed1/test/mean-IMM+recalibrate/bob")[1][0] == pytest.approx(
        accuracy(network.eval(), data.user_split("bob", 0)[1])
    )


def test_supervised_adabn_starts_from_adabn_and_trains_what_average_accuracy_and_forgetting_need(tmp_path):
    call(
        tmp_path,
        data=Tiny(tasks=3),
        network=with_norm,
        methods=["mean-IMM", "LwF"],
        adaptations=["AdaBN", "AdaBN-S"],
        adaptation=TUNED,
    )
    statistics, trained = (adapted(tmp_path, f"ann-mean-IMM-{name}") for name in ("AdaBN", "AdaBN-S"))
    assert set(statistics) == {(t, i) for t in range(3) for i in range(t + 1)}
    assert set(trained) == set(statistics) - {(1, 0)}
    for cell, entries in trained.items():
        assert entries.keys() == statistics[cell].keys() | {"body.1.weight", "body.1.bias"}
        assert all(torch.equal(entries[name], value) for name, value in statistics[cell].items())
    assert not torch.equal(trained[2, 0]["body.1.weight"], trained[2, 1]["body.1.weight"])
    for stage in ("experts/seed1/test/mean-IMM+AdaBN-S/ann", "LwF/seed1/test/LwF+AdaBN-S/bob"):
        rows = matrix(tmp_path, stage)
        assert [[value is not None for value in row] for row in rows] == [
            [True, False, False],
            [False, True, False],
            [True, True, True],
        ]


def test_models_adapt_with_the_heads_that_they_have_changed(tmp_path):
    """Those of LwF: the head of task 1 in the model after task 2, not that of the first model."""
    data = Tiny(images=40)
    call(tmp_path, data=data, network=with_norm, methods=["LwF"], adaptations=["AdaBN-S"], adaptation=TUNED)
    state = model(tmp_path, "LwF", 2)
    heads = {0: "old_heads.0", 1: "head"}
    file = load_adapted(tmp_path / "adapted" / "LwF" / "seed1" / "ann-LwF-AdaBN-S.safetensors")
    for task, head in heads.items():
        network = loaded(state, with_norm)
        network.head.load_state_dict({name: state[f"{head}.{name}"] for name in ("weight", "bias")})
        network.load_state_dict(file[1, task], strict=False)
        found = matrix(tmp_path, "LwF/seed1/test/LwF+AdaBN-S/ann")[1][task]
        assert found == pytest.approx(accuracy(network.eval(), data.user_split("ann", task)[1]))


def test_tests_train_and_adapt_nothing(tmp_path, monkeypatch):
    methods, adaptations = ["FT", "mean-IMM"], ["AdaBN-S", "recalibrate"]
    options = {"network": with_norm, "methods": methods, "adaptations": adaptations}
    whole = call(tmp_path, **options)
    forget(tmp_path, "/test/")
    finished = Finished(monkeypatch)

    def forbidden(*args, **options):
        raise AssertionError("a test trains or estimates")

    monkeypatch.setattr(Trainer, "fit", forbidden)
    monkeypatch.setattr(reestimated_statistics, "estimate_batchnorm", forbidden)
    assert call(tmp_path, **options) == whole
    assert sorted(stages(finished, "test")) == sorted(
        f"{method}+{adaptation}/{user}" for method in methods for adaptation in adaptations for user in ("ann", "bob")
    )
    assert len(finished.stages) == 8
    forget(tmp_path, "/adapt/")
    with pytest.raises(AssertionError, match="trains or estimates"):
        call(tmp_path, **options)


def forget(folder, kind):
    """Remove the finished stages of a kind from the manifest."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    content["stages"] = {name: stage for name, stage in content["stages"].items() if kind not in name}
    path.write_text(json.dumps(content))


def test_what_is_no_file_of_an_adaptation_is_refused(tmp_path):
    save_tensors(tmp_path / "a.safetensors", {"body.0.weight": torch.zeros(1)}, kind="expert")
    with pytest.raises(ArtifactError, match="holds 'expert'; expected 'adapted'"):
        load_adapted(tmp_path / "a.safetensors")
    with pytest.raises(ArtifactError, match="does not exist"):
        load_adapted(tmp_path / "b.safetensors")
