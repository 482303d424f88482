"""What an experiment ends with: tables, figures, and where everything is."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pl_personalize.runner.expert_run import ExpertRun
from pl_personalize.runner.figures import draw_matrices, draw_methods, lowest_accuracy
from pl_personalize.runner.following import versions
from pl_personalize.runner.methods import METHODS, Variant
from pl_personalize.runner.paper import PaperResult
from pl_personalize.runner.results import (
    ALL_USERS,
    MANY_USERS,
    ResultRow,
    adaptation_table,
    legend,
    markdown_table,
    mean_and_deviation,
    results_table,
    write_csv,
    write_markdown,
)
from pl_personalize.runner.run_folder import RunFolder
from pl_personalize.runner.server_run import ServerRun
from pl_personalize.runner.significance import Comparison, compare, marks


def report(
    folder: RunFolder,
    rows: list[ResultRow],
    runs: Sequence[ServerRun],
    options: Mapping[str, Any],
    paper: Mapping[str, PaperResult] | None,
    paper_note: str | None,
    tracked: Sequence[str],
    *,
    write: bool = True,
) -> None:
    """Write the tables and figures (unless ``write`` is False), print the table, and say where everything is."""
    path = folder.path
    by_method: dict[str, list[str]] = {}
    for row in rows:
        by_method.setdefault(row.method, [])
        if row.label not in by_method[row.method]:
            by_method[row.method].append(row.label)
    competitors = [name for name in by_method if METHODS[name].bound is None]  # type: ignore[index]
    comparisons = compare(rows)
    if max(map(len, by_method.values())) > 1:
        best = {key: mark for labels in by_method.values() for key, mark in marks(rows, comparisons, labels).items()}
        users = sorted(dict.fromkeys(row.user for row in rows), key=lambda user: user != ALL_USERS)
        tables = [adaptation_table(rows, user, best) for user in users]
    else:
        labels = [label for name in competitors for label in by_method[name]]
        tables = [results_table(rows, marks(rows, comparisons, labels), paper)]
    shown = tables
    if len(tables) > MANY_USERS:
        shown = [tables[0], f"By user: {path / 'results.md'}"]
    text = legend(rows, marked=bool(comparisons), paper_note=paper_note if paper else None)
    title = f"{rows[0].benchmark}, {rows[0].backbone}"
    if experts := experts_table(runs):
        text = f"{text}\n\n{experts}"
    if write:
        write_csv(path / "results.csv", rows)
        (path / "comparisons.csv").unlink(missing_ok=True)
        if comparisons:
            write_csv(path / "comparisons.csv", comparisons, Comparison, decimals=6)
        for stale in (path / "figures").glob("matrix-*.png"):
            stale.unlink()
        everything = _with_comparisons("\n\n".join(filter(None, [text, users_table(runs)])), comparisons)
        write_markdown(path / "results.md", title, "\n\n".join(tables), everything, {**options, **versions()})
        draw_methods(path / "figures" / "methods.png", title, rows)
        _draw_means(path / "figures", runs)

    print("\n" + "\n\n".join([*(shown if write else tables), text]) + "\n")
    if not write:
        print(f"Nothing was written: {path} cannot be. What is there is of an earlier call.")
    print(f"Results:     {path / 'results.csv'}, {path / 'results.md'}")
    if comparisons:
        print(f"Differences: {path / 'comparisons.csv'} (between methods, with p-values)")
    print(f"Figures:     {path / 'figures'}")
    models = {"checkpoints": "", "merged": " (for each user)", "finetuned": " (for each user)"}
    there = [f"{path / room}{note}" for room, note in models.items() if (path / room).is_dir()]
    print(f"Models:      {', '.join(there)}")
    if (path / "importances").is_dir():
        print(f"Importances: {path / 'importances'}")
    print(f"Metrics:     {path / 'metrics.jsonl'}")
    if "csv" in tracked:
        print(f"CSV:         {path / 'csv'}")
    if "tensorboard" in tracked:
        print(f"TensorBoard: tensorboard --logdir {shlex.quote(str(path / 'tensorboard'))}")
    stages = [folder.finished(f"{run.name}/tracked/wandb") for run in runs]
    segments = [name for stage in stages if stage is not None for name in stage.result["folders"]]
    offline = [name for name in segments if name.startswith("offline")]
    if offline:
        folders = " ".join(shlex.quote(str(path / "wandb" / name)) for name in offline)
        print(f"To W&B:      python -m wandb sync {folders}")


def experts_table(runs: Sequence[ServerRun]) -> str:
    """How good each expert is on the server's validation images of its task, beside guessing; empty without experts."""
    found = [run for run in runs if isinstance(run, ExpertRun)]
    if not found:
        return ""
    lines = [["task", "classes", "chance", "expert"]]
    for task, name in enumerate(found[0].data.tasks):
        accuracies = [100 * run.validation()[f"task{task + 1}"] for run in found]
        classes = found[0].data.num_classes(task)
        lines.append([name, str(classes), f"{100 / classes:.1f}", mean_and_deviation(accuracies)])
    return (
        "Accuracy of the experts, in percent, on the server's validation images, which chose the epoch:\n\n"
        + markdown_table(lines)
    )


def users_table(runs: Sequence[ServerRun]) -> str:
    """What makes each user different; empty where the benchmark does not say."""
    data = runs[0].data
    about = [[user, str(data.about_user(user))] for user in data.users]
    return "Users:\n\n" + markdown_table([["user", "about"], *about]) if any(what for _, what in about) else ""


def _with_comparisons(text: str, comparisons: Sequence[Comparison]) -> str:
    """The legend, and the differences between methods over all users."""
    lines = [
        [
            one.method,
            one.other,
            f"{one.difference:+.2f}",
            f"{one.p:.2g}",
            f"{one.p_adjusted:.2g}",
            "yes" if one.significant else "",
        ]
        for one in comparisons
        if one.user == ALL_USERS
    ]
    if not lines:
        return text
    header = ["method", "other", "difference", "p", "p (Holm)", "significant"]
    return f"{text}\n\n## Differences over seeds and users\n\n{markdown_table([header, *lines])}"


def _draw_means(folder: Path, runs: Sequence[ServerRun]) -> None:
    """The accuracy matrix of each method, mean over seeds."""
    groups: dict[Variant, list[ServerRun]] = {}
    for run in runs:
        for variant in run.variants:
            groups.setdefault(variant, []).append(run)
    means = {variant: _means(variant, group) for variant, group in groups.items()}
    low = lowest_accuracy(matrix for by_user in means.values() for matrix in by_user.values())
    for variant, by_user in means.items():
        group, path = groups[variant], folder / f"matrix-{variant.label}.png"
        of_seeds = f"mean of {len(group)} seeds" if len(group) > 1 else f"seed {group[0].seed}"
        draw_matrices(path, f"{variant.label}: accuracy, {of_seeds}", by_user, group[0].data.tasks, low)


def _means(variant: Variant, runs: Sequence[ServerRun]) -> dict[str, Tensor]:
    """For each user the accuracy matrix, mean over seeds."""
    return {user: torch.stack([run.matrix(variant, user) for run in runs]).mean(0) for user in runs[0].data.users}
