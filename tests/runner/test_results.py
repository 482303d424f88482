import csv

import pytest
import torch

from pl_personalize import ArtifactError
from pl_personalize.runner.figures import draw_matrices, draw_methods
from pl_personalize.runner.paper import PaperResult
from pl_personalize.runner.results import (
    legend,
    markdown_table,
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


def test_many_users_are_the_rows_of_the_table():
    users = [f"user{k}" for k in range(1, 11)]
    rows = [row(method, user) for method in ("MAS-RACL", "FIM-RACL") for user in users]
    lines = results_table(rows, {("MAS-RACL", "user2"): "*"}, {"MAS-RACL": PaperResult(84.01, -0.22)}).splitlines()
    assert lines[0] == "| user   | MAS-RACL      | FIM-RACL    |"
    assert lines[3] == "| user2  | 62.5 (25.0) * | 62.5 (25.0) |"
    assert lines[-1] == "| paper  | 84.0 (-0.2)   |             |"
    assert len(lines) == 2 + 10 + 1
    assert "user9" in results_table(with_means_over_users(rows[:9])).splitlines()[0]


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


@pytest.fixture
def figures(monkeypatch):
    from matplotlib.figure import Figure

    drawn, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *o, **k: drawn.append(self) or savefig(self, *o, **k))
    return drawn


def fits(figure):
    """Whether nothing is cut off."""
    renderer = figure.canvas.get_renderer()
    box, inside = figure.get_tightbbox(renderer), figure.bbox_inches
    return box.x0 >= inside.x0 and box.y0 >= inside.y0 and box.x1 <= inside.x1 and box.y1 <= inside.y1


LONG = "A benchmark of a rather long name, timm:tf_efficientnet_lite0"


MANY_METHODS = ["MAS-RACL", "FIM-RACL", "MAS-IMM", "FIM-IMM", "LwF", "FT"]
MANY_ADAPTATIONS = ["last", "average", "expert", "recalibrate", "AdaBN", "AdaBN-S"]


@pytest.mark.parametrize(
    ("num_users", "methods", "adaptations"),
    [
        (1, ["MAS-RACL"], ["none"]),
        (9, ["MAS-RACL"], ["none"]),
        (9, MANY_METHODS, ["none"]),
        (50, MANY_METHODS, ["none"]),
        (1, ["MAS-RACL"], MANY_ADAPTATIONS),
        (50, MANY_METHODS, MANY_ADAPTATIONS),
    ],
)
def test_bars_and_their_legend_are_not_cut_off(tmp_path, figures, adaptations, methods, num_users):
    rows = [
        result_row(MATRIX, method=m, user=f"user{k}", seed=1, adaptation=a, **NAMES)
        for m in methods for a in adaptations for k in range(num_users)
    ]  # fmt: skip
    draw_methods(tmp_path / "methods.png", LONG, with_means_over_users(rows))
    assert fits(figures[0])
    assert figures[0].get_figwidth() < 30
    bars = sum(patch.get_width() > 0 for patch in figures[0].axes[0].patches)
    per_method = 6 if len(adaptations) > 1 else 1 if num_users == 50 else num_users
    assert bars == len(methods) * per_method


def test_heat_maps_stand_five_in_a_row_in_common_colours(tmp_path, figures):
    matrices = {f"user{k}": MATRIX for k in range(8)}
    draw_matrices(tmp_path / "matrix.png", LONG, matrices, ["0-1", "2-3"], low=30)
    maps = [axis for axis in figures[0].axes if axis.images]
    assert len(maps) == 8
    assert [axis.get_subplotspec().colspan.start for axis in maps] == [0, 1, 2, 3, 4, 0, 1, 2]
    assert {axis.images[0].get_clim() for axis in maps} == {(30, 100)}
    assert fits(figures[0])


def test_of_many_users_the_mean_is_drawn(tmp_path, figures):
    matrices = {f"user{k}": torch.full((1, 1), k / 10) for k in range(10)}
    draw_matrices(tmp_path / "matrix.png", "t", matrices, ["a task with a long name"])
    (only,) = (axis for axis in figures[0].axes if axis.images)
    assert only.get_title() == "all users"
    assert [text.get_text() for text in only.texts] == ["45"]


def test_what_would_break_a_table_is_escaped():
    lines = markdown_table([["a", "b"], ["x | y\nz", "1"]]).splitlines()
    assert lines[2] == r"| x \| y z | 1 |"


def test_figures_are_drawn(tmp_path):
    paths = [
        draw_matrices(tmp_path / "f" / "matrix.png", "t", {"a": MATRIX, "b": MATRIX}, ["0-1", "2-3"]),
        draw_methods(tmp_path / "f" / "methods.png", "t", with_means_over_users([row("MAS-RACL", "a")])),
    ]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
