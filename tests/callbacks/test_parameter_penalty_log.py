"""ParameterPenalty: the logged value."""

from pathlib import Path

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from penalty_runs import Net, data, distance, point, random_omega, trained, trainer

from pl_personalize.callbacks import ParameterPenalty, parameter_penalty
from pl_personalize.functional.penalties import quadratic_penalty


def test_the_value_is_logged_when_lightning_logs_and_computed_only_then(tmp_path, monkeypatch):
    computed = []

    def noted(*arguments):
        computed.append(quadratic_penalty(*arguments))
        return computed[-1]

    class Watch(Callback):
        def __init__(self):
            self.points = []

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.points.append(point(pl_module))

    monkeypatch.setattr(parameter_penalty, "quadratic_penalty", noted)
    logger, watch = CSVLogger(tmp_path), Watch()
    omega, start = random_omega(Net()), point(Net())
    penalty = ParameterPenalty(3.0, omega, log_name="train/penalty")
    t = trainer(tmp_path, penalty, watch, logger=logger, log_every_n_steps=2, accumulate_grad_batches=2)
    t.fit(Net(), data())  # 2 steps in each of 3 epochs
    header, *rows = (line.split(",") for line in Path(logger.log_dir, "metrics.csv").read_text().splitlines())
    logged = {int(row[header.index("step")]): float(row[header.index("train/penalty")]) for row in rows}
    right = {}
    for step in (1, 3, 5):
        p, a, o = zip(*((watch.points[step][name], start[name], omega[name]) for name in omega), strict=True)
        right[step] = quadratic_penalty(p, a, o, 3.0).item()
    assert logged == pytest.approx(right, rel=1e-6)
    assert min(right.values()) > 1e-3
    assert [value.item() for value in computed] == pytest.approx(list(right.values()))
    assert t.callback_metrics["train/penalty"].item() == pytest.approx(right[5])


def test_it_need_not_be_logged(tmp_path):
    t = trainer(tmp_path, ParameterPenalty(1.0, log_name=None), log_every_n_steps=1)
    t.fit(Net(), data())
    assert "penalty" not in t.callback_metrics


def test_two_in_one_trainer_need_different_names(tmp_path):
    with pytest.raises(RuntimeError):  # Lightning's own
        trainer(tmp_path, ParameterPenalty(1.0), ParameterPenalty(2.0))
    weak = ParameterPenalty(0.5, log_name="l2")
    strong = ParameterPenalty(1.0, random_omega(Net()), log_name="ewc")
    both = trained(tmp_path, Net(), weak, strong)
    total = {name: 0.5 + omega for name, omega in random_omega(Net()).items()}
    assert distance(both, trained(tmp_path, Net(), ParameterPenalty(1.0, total))) < 1e-5
