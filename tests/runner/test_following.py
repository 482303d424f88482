"""What loggers receive when stages are done in several calls."""

import csv
import re

from tiny_benchmark import call, with_norm
from wandb_file import read_run

from pl_personalize.runner import WandbOptions


def results(folder) -> set[str]:
    (row,) = csv.DictReader((folder / "csv" / "experts-seed1" / "results" / "metrics.csv").open())
    return set(row)


BOTH = {"MAS-RACL/ann/avg_acc", "mean-IMM/ann/avg_acc"}


def test_a_logger_that_comes_later_receives_all_methods(tmp_path):
    call(tmp_path, methods=["MAS-RACL"])
    call(tmp_path, methods=["mean-IMM"], loggers=["csv"])
    assert results(tmp_path) >= BOTH


def test_a_logger_that_was_there_receives_what_came_later(tmp_path):
    call(tmp_path, methods=["mean-IMM"], loggers=["csv"])
    call(tmp_path, methods=["MAS-RACL"])
    call(tmp_path, methods=["MAS-RACL"], loggers=["csv"])
    assert results(tmp_path) >= BOTH


def runs(folder):
    return sorted((folder / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_mtime)


def test_what_is_chosen_for_wandb_later_comes_later(tmp_path, capsys):
    call(tmp_path, loggers=["wandb"])
    call(tmp_path, loggers=["wandb"])  # nothing new
    assert len(runs(tmp_path)) == 1
    call(tmp_path, loggers=["wandb"], wandb=WandbOptions(artifacts=["experts"]))
    first, second = runs(tmp_path)
    assert len(read_run(second).artifacts) - len(read_run(first).artifacts) == 2  # the tables are artifacts, too
    sync = [line for line in capsys.readouterr().out.splitlines() if line.startswith("To W&B:")][-1]
    assert first.name in sync
    assert second.name in sync


def test_each_family_is_one_run_of_wandb_with_its_artifacts(tmp_path):
    artifacts = WandbOptions(artifacts=["experts", "importances", "merged", "adapted"])
    options = {"methods": ["FIM-RACL", "EWC", "FT", "Joint"], "adaptations": ["AdaBN"], "network": with_norm}
    call(tmp_path, **options, loggers=["wandb"], wandb=artifacts)
    found = {}
    for folder in runs(tmp_path):
        run = read_run(folder)
        names = [artifact.name for artifact in run.artifacts if not artifact.name.startswith("run-")]
        names = [name.removeprefix(f"{run.run.display_name}-") for name in names]
        # Of "FT+AdaBN", the plus sign is replaced, and a hash added.
        found[run.run.job_type] = sorted(re.sub(r"-[0-9a-f]{8}$", "", name) for name in names)
    both = ("ann", "bob")
    assert found == {
        "experts": sorted(
            [f"experts-task{task}" for task in (1, 2)]
            + [f"importances-{user}-fisher-task{task}" for user in both for task in (1, 2)]
            + [f"merged-{user}-FIM-RACL" for user in both]
            + [f"adapted-{user}-{name}" for user in both for name in ("FIM-RACL-AdaBN", "FT-FT", "FT-FT-AdaBN")]
        ),
        "EWC": sorted(
            ["experts-task1", "experts-task2", "importances-server-empirical_fisher-task1"]
            + [f"adapted-{user}-EWC-AdaBN" for user in both]
        ),
        "Joint": sorted(["experts-all", *[f"adapted-{user}-Joint-AdaBN" for user in both]]),
    }
