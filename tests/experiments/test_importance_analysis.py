"""The script itself, shrunk by its own options: its figures against scipy's, and what it makes of them."""

import importlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from digit_files import write_mnist, write_photos
from safetensors.torch import load_file, save_file
from scipy import stats
from scripts import EXPERIMENTS, refusal, run_script
from scripts import rows_of as table

from pl_personalize import estimate_importance
from pl_personalize.datamodules import DigitsDataModule
from pl_personalize.datamodules.digits import IMAGE_SHAPE
from pl_personalize.models import mlp

SMALL = ["--seeds", "[1, 2]", "--epochs", "1", "--hidden", "[6]"]
TRAINED = [
    f"checkpoints/{'experts' if task > 1 else 'first'}/seed{seed}/task{task}.safetensors"
    for seed in (1, 2)
    for task in range(1, 6)
]


def analyse(*options):
    return run_script("importance_analysis.py", *options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Experts trained on the handwritten digits, and their analysis."""
    folder = tmp_path_factory.mktemp("analysis")
    analyse(*SMALL, "--output_dir", folder)
    return folder


@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_mnist(folder)
    write_photos(folder / "meter-digits")
    return ["--data_dir", folder, "--sources", json.dumps([str(folder / "meter-digits"), "mnist"])]


def importance(folder, kind, expert, owner, task, **options):
    network = mlp(IMAGE_SHAPE, 2, [6])
    network.load_state_dict(load_file(folder / "experts" / TRAINED[5 + expert]))
    data = DigitsDataModule(user=None if owner == "server" else owner, eval_batch_size=20)
    loader = data.server_dataloader(task) if owner == "server" else data.adapt_dataloader(task)
    return estimate_importance(network, loader, kind, module="body", **options)


@pytest.mark.parametrize(
    ("kind", "relation", "first", "second"),
    [
        ("mas", "two users", (1, "scan", 1), (1, "camera", 1)),
        ("mas", "server and user", (4, "server", 4), (4, "scan", 4)),
        ("fisher", "same images", (0, "camera", 2), (3, "camera", 2)),
        ("fisher", "other task", (2, "scan", 2), (2, "scan", 0)),
        ("mas", "nothing", (0, "scan", 0), (4, "camera", 4)),
    ],
)
def test_its_correlations_are_those_of_the_importances(finished, kind, relation, first, second):
    rows = [row for row in table(finished / "correlations.csv") if (row["experts"], row["kind"]) == ("seed2", kind)]
    options = {"draws": "all"} if kind == "fisher" else {}
    pair = [importance(finished, kind, *one, **options) for one in (first, second)]
    names = [[f"{2 * one[0]}-{2 * one[0] + 1}", f"{one[1]} {2 * one[2]}-{2 * one[2] + 1}"] for one in (first, second)]
    weights = [one["hidden1.weight"].double().flatten(1) for one in pair]
    expected = {
        "all": [torch.cat([value.flatten() for value in one.values()]).double() for one in pair],
        "hidden1.weight": [weight.flatten() for weight in weights],
        "hidden1.bias": [one["hidden1.bias"].double() for one in pair],
        "hidden1.weight by unit": [weight.sum(1) for weight in weights],
        "hidden1.weight by input": [weight.sum(0) for weight in weights],
    }
    for parameters, (x, y) in expected.items():
        (row,) = [
            row
            for row in rows
            if (row["parameters"], row["relation"]) == (parameters, relation)
            and [[row[f"{end}_expert"], row[f"{end}_images"]] for end in ("first", "second")] == names
        ]
        assert float(row["pearson"]) == pytest.approx(stats.pearsonr(x, y)[0], abs=2e-4)
        assert float(row["spearman"]) == pytest.approx(stats.spearmanr(x, y)[0], abs=2e-4)


def test_every_pair_is_there_once(finished):
    rows = [row for row in table(finished / "correlations.csv") if row["parameters"] == "all"]
    keys = [tuple(value for name, value in row.items() if name not in ("pearson", "spearman")) for row in rows]
    assert len(set(keys)) == len(keys)
    numbers = {"server and user": 10, "two users": 5, "other task": 40, "nothing": 40, "same images": 100}
    for relation, number in numbers.items():
        assert sum(row["relation"] == relation for row in rows) == 4 * number  # two seeds, two kinds
    for row in rows:
        experts = len({row["first_expert"], row["second_expert"]})
        assert experts == (2 if row["relation"] in ("nothing", "same images") else 1)
        assert (row["first_images"] == row["second_images"]) == (row["relation"] == "same images")


def test_it_leaves_tables_and_figures(finished):
    text = (finished / "importance-analysis.md").read_text()
    for heading in (
        "All parameters:",
        "Layer by layer:",
        "Summed over inputs",
        "The direction of the claim:",
        "## Options",
    ):
        assert heading in text
    rows = [row for row in table(finished / "correlations.csv") if (row["parameters"], row["kind"]) == ("all", "mas")]
    fixed = [
        float(row["pearson"])
        for row in rows
        if row["relation"] == "same images" and row["first_images"] == "camera 0-1"
    ]
    (line,) = [line for line in text.splitlines() if line.startswith("| two experts, the images camera 0-1 ")]
    assert line.split("|")[2:4] == [f" {len(fixed)}     ", f" {sum(fixed) / 20:.2f} ± {stats.tstd(fixed):.2f} "]
    for name in ("layers", "units-and-inputs", "scatter-mas", "scatter-fisher"):
        assert (finished / "figures" / f"{name}.png").stat().st_size > 10_000
    comparisons = table(finished / "comparisons.csv")
    assert len(comparisons) == 8
    for one in comparisons:
        difference = float(one["same_model"]) - float(one["same_images"])
        assert float(one["difference"]) == pytest.approx(difference, abs=2e-4)
        assert float(one["low"]) < difference < float(one["high"])  # a jackknife: two sets are too few for a t-test


def test_a_run_is_analysed_as_it_is(finished, tmp_path):
    experts = finished / "experts"
    before = {name: (experts / name).read_bytes() for name in [*TRAINED, "manifest.json"]}
    options = ["--run_dir", experts, "--output_dir", tmp_path, "--kinds", "[mas]", "--seeds", "[2]"]
    output = analyse(*options, "--fixed_user", "scan", "--fixed_task", "4-5")
    assert {name: (experts / name).read_bytes() for name in before} == before
    there, here = (table(folder / "correlations.csv") for folder in (finished, tmp_path))
    assert here == [row for row in there if (row["kind"], row["experts"]) == ("mas", "seed2")]
    assert "two experts, the images scan 4-5" in output
    analyse(*options, "--reduction", "batch", "--batch_size", "7")
    batch = table(tmp_path / "correlations.csv")
    (row,) = [
        row
        for row in batch
        if (row["experts"], row["parameters"], row["relation"], row["first_expert"])
        == ("seed2", "all", "two users", "0-1")
    ]
    data = DigitsDataModule(eval_batch_size=7)
    network = mlp(IMAGE_SHAPE, 2, [6])
    network.load_state_dict(load_file(experts / TRAINED[5]))
    x, y = (
        torch.cat([v.flatten() for v in estimate_importance(
            network, data.view(user=user).adapt_dataloader(0), "mas", module="body", reduction="batch").values()])
        for user in ("scan", "camera")
    )  # fmt: skip
    assert float(row["pearson"]) == pytest.approx(stats.pearsonr(x.double(), y.double())[0], abs=2e-4)


def test_experts_of_numbers_are_trained_for_a_single_user(small_data, tmp_path):
    options = ["--benchmark", "numbers", *small_data, "--sources", "[mnist]", *SMALL, "--output_dir", tmp_path]
    options += ["--kinds", "[mas]"]
    output = analyse(*options)
    assert all((tmp_path / "experts" / name).is_file() for name in TRAINED)
    assert {one["name"] for one in table(tmp_path / "comparisons.csv")} == {"as defined"}  # there are no two users
    assert {row["relation"] for row in table(tmp_path / "correlations.csv")}.isdisjoint({"two users"})
    assert "of two users" not in output
    trained = {name: (tmp_path / "experts" / name).stat().st_mtime_ns for name in TRAINED}
    output = analyse(*options)
    assert {name: (tmp_path / "experts" / name).stat().st_mtime_ns for name in TRAINED} == trained
    assert "Every stage was finished before." in output


def test_a_run_with_batch_norm(small_data, tmp_path):
    train = ["--network.name", "cnn_bn", "--methods", "[Experts]", "--adaptations", "[last]", "--training.epochs", "1"]
    options = ["--seeds", "[1]", "--loggers", "[]", "--output_dir", tmp_path / "run"]
    run_script("run_numbers.py", *small_data, *train, *options)
    analysis = ["--output_dir", tmp_path / "analysis", "--kinds", "[fisher]", "--fisher_draws", "2"]
    analyse("--run_dir", tmp_path / "run", *analysis)
    rows = table(tmp_path / "analysis" / "correlations.csv")
    body = load_file(tmp_path / "run" / "checkpoints" / "first" / "seed1" / "task1.safetensors").keys()
    parameters = {f"body.{row['parameters']}" for row in rows if " " not in row["parameters"]} - {"body.all"}
    assert parameters == {
        name for name in body if name.startswith("body.") and "running" not in name and "num_" not in name
    }


def test_experts_of_a_file(small_data, tmp_path):
    entries = {}
    for task in range(1, 6):
        with torch.random.fork_rng():
            torch.manual_seed(max(task, 2))  # the first two are the same network
            network = mlp((3, 28, 28), 2)
        entries |= {f"task{task}.{name.removeprefix('body.')}": value for name, value in network.state_dict().items()}
    save_file(entries, tmp_path / "experts.safetensors")
    given = ["--experts", tmp_path / "experts.safetensors", *small_data, "--output_dir", tmp_path / "analysis"]
    output = analyse(*given, "--kinds", "[mas]")
    assert "two experts, the images mnist 0-1" in output
    assert {row["experts"] for row in table(tmp_path / "analysis" / "correlations.csv")} == {"experts"}
    twins = {"0-1", "2-3"}
    rows = [row for row in table(tmp_path / "analysis" / "correlations.csv") if row["parameters"] == "all"]
    for row in [row for row in rows if row["relation"] == "same images"]:
        alike = {row["first_expert"], row["second_expert"]} == twins
        assert [row[name] == "1.0000" for name in ("pearson", "spearman")] == [alike, alike]
    entries = {name: value for name, value in entries.items() if not name.startswith("task5")}
    save_file(entries, tmp_path / "experts.safetensors")
    assert "has 4 experts for 5 tasks" in refusal("importance_analysis.py", *given)


def test_what_cannot_be_analysed_is_refused(finished, tmp_path):
    def said(*options):
        return refusal("importance_analysis.py", "--output_dir", tmp_path / "analysis", *options)

    run = finished / "experts"
    assert "Give run_dir or experts, not both" in said("--run_dir", run, "--experts", tmp_path / "experts")
    assert "no file of experts at" in said("--experts", tmp_path / "none.safetensors")
    assert "manifest.json" in said("--run_dir", tmp_path / "none")
    assert "There is no user 'nobody'; choose one of 'scan', 'camera'" in said(
        "--run_dir", run, "--fixed_user", "nobody"
    )
    assert "There is no task '0-9'" in said("--run_dir", run, "--fixed_task", "0-9")
    assert "kinds is empty" in said("--run_dir", run, "--kinds", "[]")
    assert "kinds" in said("--run_dir", run, "--kinds", "[empirical_fisher]")
    assert f"{run} has no experts of seed 7; it has those of [1, 2]" in said("--run_dir", run, "--seeds", "[1, 7]")
    copy = tmp_path / "copy"
    (copy / "checkpoints" / "experts" / "seed3").mkdir(parents=True)
    manifest = json.loads((run / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert "seed3 is not finished: there is no" in said("--run_dir", copy)
    (copy / "checkpoints" / "experts" / "seed3").rmdir()
    assert "has no experts" in said("--run_dir", copy)
    manifest["options"]["benchmark"] = "Blobs"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert "is a run of Blobs, not of Digits or Numbers" in said("--run_dir", copy)
    assert not (tmp_path / "analysis").exists()


# What the numbers say


@pytest.fixture
def claim(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return importlib.import_module("importance_study.claim")


@pytest.fixture
def pairs(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return importlib.import_module("importance_study.pairs")


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e-8])
def test_a_constant_vector_correlates_with_nothing(pairs, constant):
    rows = np.random.default_rng(0).exponential(size=(3, 1000))
    rows[1] = constant
    found = pairs.correlation_matrix(rows)
    assert np.isnan(found[1]).all()
    assert np.isnan(found[:, 1]).all()
    assert found[0, 2] == pytest.approx(stats.pearsonr(rows[0], rows[2])[0])


def rows_of(pairs, sets, model, images, tasks=4):
    """Made-up correlations: of one expert ``model(set, task)``, on the same images ``images(set, a, b)``."""
    rows = []
    for s in range(sets):
        for relation, first, second in pairs.related(tasks, ["ann", "bob"]):
            value = (
                images(s, first.expert, second.expert)
                if relation in ("same images", "nothing")
                else model(s, first.expert)
            )
            ends = [
                text for one in (first, second) for text in (str(one.expert), f"{one.images.owner} {one.images.task}")
            ]
            rows.append([f"seed{s}", "mas", "sample", "all", relation, *ends, value, value])
    return pd.DataFrame(rows, columns=pairs.COLUMNS)


def test_the_interval_of_three_sets_is_that_of_a_paired_t_test(pairs, claim):
    model, images = [0.9, 0.8, 0.6], [0.3, 0.4, 0.1]
    rows = rows_of(pairs, 3, lambda s, a: model[s], lambda s, a, b: images[s])
    known = pairs.groups("bob 0", ["ann", "bob"])
    for one in claim.compare(rows, known).itertuples():
        assert one.difference == pytest.approx(0.5)
        expected = stats.ttest_rel(model, images).confidence_interval()
        assert (one.low, one.high) == pytest.approx((expected.low, expected.high))
        assert (one.above, claim.conclusion(one.low, one.high)) == (1.0, "yes")


def test_the_interval_of_one_set_is_that_of_a_jackknife_over_experts(pairs, claim):
    own, pair = [0.9, 0.7, 0.8, 0.5], {(0, 1): 0.5, (0, 2): 0.2, (0, 3): 0.1, (1, 2): 0.4, (1, 3): 0.3, (2, 3): 0.6}
    rows = rows_of(pairs, 1, lambda s, a: own[a], lambda s, a, b: pair[a, b])
    one = next(claim.compare(rows, pairs.groups("bob 0", ["ann", "bob"])).itertuples())
    assert one.difference == pytest.approx(sum(own) / 4 - sum(pair.values()) / 6)
    without = [
        sum(v for a, v in enumerate(own) if a != k) / 3 - sum(v for ab, v in pair.items() if k not in ab) / 3
        for k in range(4)
    ]
    half = (3 / 4 * sum((v - sum(without) / 4) ** 2 for v in without)) ** 0.5 * stats.t.ppf(0.975, 3)
    assert (one.low, one.high) == pytest.approx((one.difference - half, one.difference + half))
    assert one.above == pytest.approx((6 + 6 + 6 + 4.5) / 24, abs=0.05)


@pytest.mark.parametrize(
    ("model", "images", "said"),
    [
        ([0.9, 0.8, 0.9], [0.2, 0.1, 0.2], ["holds in all 4 comparisons", "holds in all 4."]),
        ([0.6, 0.5, 0.6], [0.2, 0.1, 0.2], ["holds in all 4 comparisons", "holds in none of 4."]),
        ([0.2, 0.1, 0.2], [0.6, 0.5, 0.7], ["correlates more in 0 of 4", "in 0; the reverse holds in 4", "none of 4"]),
        ([0.5, 0.1, 0.9], [0.6, 0.5, 0.1], ["correlates more in 4 of 4 comparisons, beyond its uncertainty in 0."]),
    ],
)
def test_the_verdict_depends_on_the_numbers(pairs, claim, model, images, said):
    rows = rows_of(pairs, 3, lambda s, a: model[s], lambda s, a, b: images[s])
    known = pairs.groups("bob 0", ["ann", "bob"])
    text = claim.verdict(claim.compare(rows, known), rows, known)
    assert f"correlate with {sum(model) / 3:.2f} (ranks: {sum(model) / 3:.2f})" in text
    assert [part for part in said if part not in text] == []
    assert ("importances describe the model more than the data" in text) == ("holds in all 4 comparisons" in text)


def test_two_experts_are_too_few_for_an_interval(pairs, claim):
    rows = rows_of(pairs, 1, lambda s, a: 0.9, lambda s, a, b: 0.1, tasks=2)
    known = pairs.groups("bob 0", ["ann", "bob"])
    found = claim.compare(rows, known)
    assert {claim.conclusion(one.low, one.high) for one in found.itertuples()} == {"no interval"}
    assert "too few experts to say how sure that is" in claim.verdict(found, rows, known)


def test_a_correlation_that_is_not_there_does_not_count(pairs, claim):
    rows = rows_of(pairs, 3, lambda s, a: 0.9 - 0.1 * s if a else float("nan"), lambda s, a, b: 0.1)
    for one in claim.compare(rows, pairs.groups("bob 0", ["ann", "bob"])).itertuples():
        assert (one.same_model, one.same_images) == pytest.approx((0.8, 0.1))
        assert one.above == 1.0


@pytest.mark.slow
def test_the_published_experts_correlate_as_was_measured_before(shared_data, tmp_path):
    """With batch estimates on these images, but another draw of the splits and of the labels."""
    experts = Path(shared_data).parent / "reference" / "numbers-experts.safetensors"
    if not experts.exists():
        pytest.skip(f"no experts at {experts}")
    options = ["--data_dir", shared_data, "--sources", f"[{shared_data}/meter-digits, mnist]", "--reduction", "batch"]
    analyse("--experts", experts, *options, "--max_per_source", "2000", "--output_dir", tmp_path)
    found = {(c["kind"], c["name"], c["coefficient"]): c for c in table(tmp_path / "comparisons.csv")}
    measured = {
        ("mas", "pearson"): (0.69, 0.40),
        ("mas", "spearman"): (0.72, 0.38),
        ("fisher", "pearson"): (0.54, 0.32),
        ("fisher", "spearman"): (0.72, 0.40),
    }
    for (kind, coefficient), (model, images) in measured.items():
        one = found[kind, "as defined", coefficient]
        assert float(one["same_model"]) == pytest.approx(model, abs=0.1)
        assert float(one["same_images"]) == pytest.approx(images, abs=0.1)
