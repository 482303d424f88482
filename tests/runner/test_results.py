import csv

import pytest
import torch

from pl_personalize import ArtifactError
from pl_personalize.runner.figures import draw_matrices, draw_methods
from pl_personalize.runner.paper import PaperResult
from pl_personalize.runner.results import (
    legend,
    read_csv,
    result_row,
    results_table,
    user_title,
    with_means_over_users,
    write_csv,
)

NAN = float("nan")
MATRIX = torch.tensor([[1.0, NAN], [0.5, 0.75]])
NAMES = {"benchmark": "Digits", "backbone": "MLP"}


def row(method, user, seed=1, matrix=MATRIX):
    return result_row(matrix, method=method, user=user, seed=seed, **NAMES)


def test_a_row_follows_from_the_matrix():
    merged = row("MAS-RACL", "a")
    assert merged.avg_acc == pytest.approx(62.5)  # mean of 0.5 and 0.75
    assert merged.forgetting == pytest.approx(25.0)  # 0.5 lost on task 1, divided by two tasks


def test_the_bounds_have_no_forgetting():
    experts = row("Experts", "a")
    assert experts.avg_acc == pytest.approx(87.5)  # the diagonal
    assert experts.forgetting is None
    joint = row("Joint", "a", matrix=torch.tensor([[NAN, NAN], [0.5, 1.0]]))
    assert (joint.avg_acc, joint.forgetting) == (pytest.approx(75.0), None)


def test_the_mean_over_users_is_added_for_each_method_and_seed():
    other = torch.tensor([[1.0, NAN], [1.0, 1.0]])
    rows = with_means_over_users([row("MAS-RACL", "a"), row("MAS-RACL", "b", matrix=other), row("MAS-RACL", "a", 2)])
    means = {r.seed: r for r in rows if r.user == "all"}
    assert means[1].avg_acc == pytest.approx(81.25)
    assert means[1].forgetting == pytest.approx(12.5)
    assert means[2].avg_acc == pytest.approx(62.5)


def test_the_csv_has_the_agreed_columns(tmp_path):
    path = write_csv(tmp_path / "results.csv", [row("MAS-RACL", "a"), row("Experts", "a")])
    header, first, second = csv.reader(path.open())
    assert header == ["benchmark", "backbone", "method", "adaptation", "user", "seed", "avg_acc", "forgetting"]
    assert first == ["Digits", "MLP", "MAS-RACL", "none", "a", "1", "62.5000", "25.0000"]
    assert second[-1] == ""


def test_the_table_has_mean_and_standard_deviation_over_seeds():
    better = torch.tensor([[1.0, NAN], [0.7, 0.75]])  # 72.5 and 15.0
    table = results_table([row("MAS-RACL", "a"), row("MAS-RACL", "a", 2, better)])
    assert "| 67.5 ± 7.1 (20.0) |" in table


def test_marks_and_the_papers_figures_stand_in_the_table():
    rows = [row("MAS-RACL", "a"), row("Joint", "a")]
    paper = {"MAS-RACL": PaperResult(84.01, -0.22)}
    lines = results_table(rows, {("MAS-RACL", "a"): "↓"}, paper).splitlines()
    assert lines[0] == "| method   | user a        | paper       |"
    assert lines[2] == "| MAS-RACL | 62.5 (25.0) ↓ | 84.0 (-0.2) |"
    assert lines[3].endswith("|             |")


def test_no_two_users_have_one_title():
    users = ["user1", "1", "scan", "user scan", "user", "all"]
    titles = ["user1", "user 1", "user scan", "user user scan", "user user", "all users"]
    assert [user_title(user) for user in users] == titles


def test_the_legend_says_what_is_in_the_table():
    assert "Joint: one model trained on all tasks" in legend([row("Joint", "a")])
    plain = legend([row("MAS-RACL", "a")])
    assert "Joint" not in plain
    assert "↓" not in plain
    assert "↓ significantly below" in legend([row("MAS-RACL", "a")], marked=True)


def test_what_was_written_is_read_back(tmp_path):
    rows = [row("MAS-RACL", "a"), row("Experts", "a")]
    assert read_csv(write_csv(tmp_path / "results.csv", rows)) == rows


@pytest.mark.parametrize(
    "content",
    ["a,b\n1,2\n", "benchmark,backbone,method,adaptation,user,seed,avg_acc,forgetting\nN,M,A,none,u,one,1.0,\n", None],
)
def test_another_file_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "results.csv").write_text(content)
    with pytest.raises(ArtifactError, match=r"results\.csv cannot be read as a table of results"):
        read_csv(tmp_path / "results.csv")


def test_figures_are_drawn(tmp_path):
    paths = [
        draw_matrices(tmp_path / "f" / "matrix.png", "t", {"a": MATRIX, "b": MATRIX}, ["0-1", "2-3"]),
        draw_methods(tmp_path / "f" / "methods.png", "t", with_means_over_users([row("MAS-RACL", "a")])),
    ]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
