"""Importances that ``importance_analysis.py`` compares, and their correlations."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from pl_personalize import Importance, estimate_importance
from pl_personalize.datamodules import TaskIncrementalDataModule
from pl_personalize.functional.seeding import derive_seed
from pl_personalize.models import TaskNetwork
from pl_personalize.runner import ImportanceOptions

ImportanceName = Literal["mas", "fisher"]
KINDS: dict[str, str] = {"mas": "MAS", "fisher": "Fisher"}
COEFFICIENTS = ["pearson", "spearman"]
SERVER = "server"
ALL = "all"  # parameters of the body, concatenated
BY_UNIT, BY_INPUT = "by unit", "by input"
COLUMNS = [
    *("experts", "kind", "reduction", "parameters", "relation"),
    *("first_expert", "first_images", "second_expert", "second_images"),
    *COEFFICIENTS,
]


class Images(NamedTuple):
    """Images of a task (counted from 0): a user's for importances, or the server's."""

    owner: str
    task: int


class Estimate(NamedTuple):
    """Importances of the expert of a task (counted from 0) on images."""

    expert: int
    images: Images


@dataclass(frozen=True)
class Group:
    """Pairs of some relations (see :func:`related`), on some images only or with a user's second images only."""

    title: str
    relations: tuple[str, ...]
    images: str | None = None
    user: str | None = None

    @property
    def full_title(self) -> str:
        """Title that does not continue that of another group."""
        return self.title.replace("– of", "same expert, images of")

    def of(self, pairs: pd.DataFrame) -> pd.DataFrame:
        """The pairs that are in the group."""
        chosen = pairs["relation"].isin(self.relations)
        if self.images is not None:
            chosen &= pairs["first_images"] == self.images
        if self.user is not None:
            chosen &= pairs["second_images"].str.rpartition(" ")[0] == self.user
        return pairs[chosen]


def groups(fixed: str, users: Sequence[str]) -> dict[str, Group]:
    """The groups of pairs in the tables, by a short name; ``fixed`` are images such as ``mnist 0-1``."""
    return {
        "model": Group("same expert, images of server and users", ("server and user", "two users")),
        **{f"server {u}": Group(f"– of the server and {u}", ("server and user",), user=u) for u in users},
        "users": Group("– of two users", ("two users",)),
        "task": Group("same expert, one user's images of two tasks", ("other task",)),
        "fixed": Group(f"two experts, the images {fixed}", ("same images",), fixed),
        "images": Group("two experts, the same images, any user and task", ("same images",)),
        "nothing": Group("two experts, each on images of its own task", ("nothing",)),
    }


def related(num_tasks: int, users: Sequence[str]) -> Iterator[tuple[str, Estimate, Estimate]]:
    """The pairs to compare, with the relation of the two.

    * ``server and user``, ``two users``: one expert on two owners' images of its task.
    * ``other task``: one expert on a user's images of its task and of another.
    * ``same images``: two experts on a user's images of one task.
    * ``nothing``: two experts, each on a user's images of its own task.
    """
    for task in range(num_tasks):
        own = [Estimate(task, Images(owner, task)) for owner in (SERVER, *users)]
        for first, second in combinations(own, 2):
            yield ("server and user" if first.images.owner == SERVER else "two users"), first, second
        for mine in own[1:]:
            for other in range(num_tasks):
                if other != task:
                    yield "other task", mine, Estimate(task, Images(mine.images.owner, other))
                if other > task:
                    for user in users:
                        yield "nothing", mine, Estimate(other, Images(user, other))
    for user in users:
        for task in range(num_tasks):
            for a, b in combinations(range(num_tasks), 2):
                yield "same images", Estimate(a, Images(user, task)), Estimate(b, Images(user, task))


def estimate_all(
    experts: Sequence[TaskNetwork],
    data: TaskIncrementalDataModule,
    kind: ImportanceName,
    options: ImportanceOptions,
    seed: int,
) -> dict[Estimate, Importance]:
    """Importances of every expert on every user's images of every task, and on the server's of its own."""
    found = {}
    draws = options.fisher_draws if options.reduction == "sample" else 1
    for k, expert in enumerate(experts):
        for images in [Images(SERVER, k), *(Images(user, task) for user in data.users for task in range(len(experts)))]:
            view = data.view(user=None if images.owner == SERVER else images.owner)
            loader = (view.adapt_dataloader if view.user else view.server_dataloader)(images.task)
            generator = torch.Generator().manual_seed(derive_seed(seed, kind, k, *images))
            drawn = {"draws": draws, "generator": generator} if kind == "fisher" else {}
            given = {"module": "body", "reduction": options.reduction, **drawn}
            found[Estimate(k, images)] = estimate_importance(expert, loader, kind, **given)  # type: ignore[arg-type]
    return found


def views(importances: Sequence[Importance]) -> Iterator[tuple[str, Tensor]]:
    """Rows to correlate: all parameters, each, and each matrix summed over its inputs and over its units."""
    yield ALL, torch.stack([torch.cat([value.flatten() for value in one.values()]) for one in importances])
    for name, value in importances[0].items():
        stacked = torch.stack([one[name] for one in importances])
        yield name, stacked.flatten(1)
        if value.dim() > 1:
            yield f"{name} {BY_UNIT}", stacked.double().flatten(2).sum(2)
            yield f"{name} {BY_INPUT}", stacked.double().sum(1).flatten(1)


def correlation_matrix(rows: np.ndarray) -> np.ndarray:
    """Pearson's correlations of the rows, ``(k, k)``; NaN for constant rows, also where rounding hides that."""
    with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)
        matrix = np.corrcoef(rows)
    constant = (rows == rows[:, :1]).all(1)
    matrix[constant] = matrix[:, constant] = np.nan
    return matrix


def correlate(
    found: dict[Estimate, Importance], data: TaskIncrementalDataModule, experts: str, kind: str, reduction: str
) -> pd.DataFrame:
    """Correlations of all pairs, for all parameters and each, with the columns :data:`COLUMNS`."""
    places = {estimate: place for place, estimate in enumerate(found)}
    pairs = list(related(len(data.tasks), data.users))
    described = pd.DataFrame(
        {"experts": experts, "kind": kind, "reduction": reduction, "relation": [r for r, *_ in pairs]}
    )
    for end, estimates in (("first", [first for _, first, _ in pairs]), ("second", [second for *_, second in pairs])):
        described[f"{end}_expert"] = [data.tasks[one.expert] for one in estimates]
        described[f"{end}_images"] = [title(one.images, data) for one in estimates]
    where = [places[first] for _, first, _ in pairs], [places[second] for *_, second in pairs]
    frames = []
    for parameters, values in views(list(found.values())):
        if values.shape[1] > 1:
            rows = values.double().cpu().numpy()
            pearson, spearman = correlation_matrix(rows), correlation_matrix(stats.rankdata(rows, axis=1))
            frames.append(described.assign(parameters=parameters, pearson=pearson[where], spearman=spearman[where]))
    return pd.concat(frames, ignore_index=True)[COLUMNS]


def title(images: Images, data: TaskIncrementalDataModule) -> str:
    """Title of images, such as ``mnist 0-1``."""
    return f"{images.owner} {data.tasks[images.task]}"
