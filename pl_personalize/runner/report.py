"""Report of an experiment: tables, figures, and where its files are."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from pl_personalize.heads.adapt import Shift
from pl_personalize.runner.figures import draw_matrices, draw_methods, lowest_accuracy
from pl_personalize.runner.following import versions
from pl_personalize.runner.paper import PaperResult
from pl_personalize.runner.results import (
    ALL_USERS,
    MANY_USERS,
    ResultRow,
    adaptation_table,
    legend,
    markdown_table,
    mean_and_std,
    result_frame,
    results_table,
    task_accuracies,
    write_csv,
    write_markdown,
)
from pl_personalize.runner.server_run import ServerRun
from pl_personalize.runner.significance import Comparison, compare, marks
from pl_personalize.runner.variants import Variant
from pl_personalize.stages.run_folder import RunFolder

_HARM = 0.01 + 1e-6  # accuracy, with rounding


def report(
    folder: RunFolder,
    rows: list[ResultRow],
    runs: Sequence[ServerRun],
    options: Mapping[str, Any],
    *,
    write: bool = True,
) -> None:
    """Print the tables and the paths of all files; unless ``write`` is False, write tables and figures first."""
    path, comparisons, experiment = folder.path, compare(rows), runs[0].experiment
    tables = result_tables(rows, comparisons, experiment.paper)
    text = legend(rows, marked=bool(comparisons), paper_note=experiment.paper_note if experiment.paper else None)
    text = "\n\n".join(filter(None, [text, harm_table(runs), shift_table(runs), experts_table(runs)]))
    title = f"{rows[0].benchmark}, {rows[0].backbone}"
    if write:
        write_csv(path / "results.csv", rows)
        (path / "comparisons.csv").unlink(missing_ok=True)
        if comparisons:
            write_csv(path / "comparisons.csv", comparisons, decimals=6)
        for stale in (path / "figures").glob("matrix-*.png"):
            stale.unlink()
        everything = "\n\n".join(filter(None, [text, users_table(runs), comparison_table(comparisons)]))
        write_markdown(path / "results.md", title, "\n\n".join(tables), everything, {**options, **versions()})
        draw_methods(path / "figures" / "methods.png", title, rows)
        _draw_means(path / "figures", runs)
        if len(tables) > MANY_USERS:
            tables = [tables[0], f"By user: {path / 'results.md'}"]

    print("\n" + "\n\n".join([*tables, text]) + "\n")
    if not write:
        print(f"Nothing was written because {path} is read-only; the files there are from an earlier run.")
    models = {"checkpoints": "", "merged": " (for each user)", "adapted": " (for each user)"}
    places = {
        "Results": f"{path / 'results.csv'}, {path / 'results.md'}",
        "Differences": f"{path / 'comparisons.csv'} (between methods, with p-values)" if comparisons else "",
        "Figures": str(path / "figures"),
        "Models": ", ".join(f"{path / name}{note}" for name, note in models.items() if (path / name).is_dir()),
        "Importances": str(path / "importances") if (path / "importances").is_dir() else "",
        "Metrics": str(path / "metrics.jsonl"),
        "CSV": str(path / "csv") if "csv" in experiment.loggers else "",
        "TensorBoard": f"tensorboard --logdir {shlex.quote(str(path / 'tensorboard'))}"
        if "tensorboard" in experiment.loggers
        else "",
    }
    stages = [folder.finished(f"{run.name}/tracked/wandb") for run in runs]
    segments = [name for stage in stages if stage is not None for name in stage.result["folders"]]
    if offline := [shlex.quote(str(path / "wandb" / name)) for name in segments if name.startswith("offline")]:
        places["To W&B"] = f"python -m wandb sync {' '.join(offline)}"
    print("\n".join(f"{name + ':':12} {where}" for name, where in places.items() if where))


def result_tables(
    rows: Sequence[ResultRow], comparisons: Sequence[Comparison], paper: Mapping[str, PaperResult] | None
) -> list[str]:
    """Methods × users or, if there are several adaptations, methods × adaptations for each user (``all`` first)."""
    variants = result_frame(rows).drop_duplicates("label")
    by_method = [list(group.loc[~group["oracle"], "label"]) for _, group in variants.groupby("method", sort=False)]
    if len(variants) == len(by_method):
        competitors = list(variants.loc[~variants["bound"], "label"])
        return [results_table(rows, marks(rows, comparisons, competitors), paper)]
    best = {key: mark for labels in by_method for key, mark in marks(rows, comparisons, labels).items()}
    users = sorted(dict.fromkeys(row.user for row in rows), key=lambda user: user != ALL_USERS)
    return [adaptation_table(rows, user, best) for user in users]


def harm_table(runs: Sequence[ServerRun]) -> str:
    """How many pairs of user and task lose more than a point by an adaptation; empty without adaptations."""
    counts: dict[Variant, list[int]] = {}
    references: dict[str, None] = {}
    for run in runs:
        for method in run.methods:
            variants = [variant for variant in run.variants if variant.method == method.name]
            impersonal = [v for v in variants if not run.experiment.sequence(v).personal]
            base = min(impersonal, key=lambda v: (v.adaptation != "none", v.adaptation.count("+")), default=None)
            if base is None:
                continue
            for variant in variants:
                if variant == base:
                    continue
                references[base.adaptation] = None
                count = counts.setdefault(variant, [0, 0])
                for user in run.data.users:
                    before, after = (task_accuracies(run.matrix(v, user), method.name) for v in (base, variant))
                    count[0] += int((before - after > _HARM).sum())
                    count[1] += len(after)
    if not counts:
        return ""
    adaptations = list(dict.fromkeys(variant.adaptation for variant in counts))
    lines = [["harmed", *adaptations]]
    for name in dict.fromkeys(variant.method for variant in counts):
        cells = [counts.get(Variant(name, adaptation)) for adaptation in adaptations]
        lines.append([name, *["–" if cell is None else f"{cell[0]}/{cell[1]}" for cell in cells]])
    heading = f"Pairs of user and task that lose more than a point against {' or '.join(map(repr, references))}:"
    return f"{heading}\n\n{markdown_table(lines)}"


def shift_table(runs: Sequence[ServerRun]) -> str:
    """The shifts that were found; empty if none was looked for."""
    found: dict[str, Counter[Shift | None]] = {}
    for run in runs:
        for variant in run.variants:
            shifts = Counter(run.found_shift(variant, user) for user in run.data.users)
            if None not in shifts:
                found[variant.label] = found.get(variant.label, Counter()) + shifts
    lines = [["shift found", *get_args(Shift)]]
    lines += [[label, *[str(counts[shift]) for shift in get_args(Shift)]] for label, counts in found.items()]
    return f"Shifts found, in number of users of all seeds:\n\n{markdown_table(lines)}" if found else ""


def experts_table(runs: Sequence[ServerRun]) -> str:
    """Validation accuracy of each expert beside chance; empty without experts."""
    found = [run for run in runs if any(method.merges or method.one_each for method in run.methods)]
    if not found:
        return ""
    lines = [["task", "classes", "chance", "expert"]]
    for task, name in enumerate(found[0].data.tasks):
        accuracies = [100 * run.validation()[f"task{task + 1}"] for run in found]
        classes = found[0].data.num_classes(task)
        lines.append([name, str(classes), f"{100 / classes:.1f}", mean_and_std(accuracies)])
    heading = "Accuracy of the experts in percent on the server's validation images, which also chose the epoch:"
    return f"{heading}\n\n{markdown_table(lines)}"


def users_table(runs: Sequence[ServerRun]) -> str:
    """Description of each user; empty if the benchmark has none."""
    data = runs[0].data
    about = [[user, str(data.about_user(user))] for user in data.users]
    return "Users:\n\n" + markdown_table([["user", "about"], *about]) if any(what for _, what in about) else ""


def comparison_table(comparisons: Sequence[Comparison]) -> str:
    """Differences between methods over all users; empty without comparisons."""
    lines = [["method", "other", "difference", "p", "p (Holm)", "significant"]]
    for one in comparisons:
        if one.user == ALL_USERS:
            numbers = [f"{one.difference:+.2f}", f"{one.p:.2g}", f"{one.p_adjusted:.2g}"]
            lines.append([one.method, one.other, *numbers, "yes" if one.significant else ""])
    return f"## Differences over seeds and users\n\n{markdown_table(lines)}" if comparisons else ""


def _draw_means(folder: Path, runs: Sequence[ServerRun]) -> None:
    """Draw the accuracy matrices of each method and adaptation, averaged over seeds."""
    groups: dict[Variant, list[ServerRun]] = {}
    for run in runs:
        for variant in run.variants:
            groups.setdefault(variant, []).append(run)
    data, means = runs[0].data, {}
    for variant, group in groups.items():
        means[variant] = {u: torch.stack([run.matrix(variant, u) for run in group]).mean(0) for u in data.users}
    low = lowest_accuracy(matrix for by_user in means.values() for matrix in by_user.values())
    for variant, group in groups.items():
        of_seeds = f"mean of {len(group)} seeds" if len(group) > 1 else f"seed {group[0].seed}"
        path, title = folder / f"matrix-{variant.label}.png", f"{variant.label}: accuracy, {of_seeds}"
        draw_matrices(path, title, means[variant], data.tasks, low)
