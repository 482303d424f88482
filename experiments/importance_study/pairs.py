"""Which importances ``importance_analysis.py`` compares, how they correlate, and what follows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor

from pl_personalize import Importance, estimate_importance
from pl_personalize.datamodules import TaskIncrementalDataModule
from pl_personalize.functional.seeding import derive_seed
from pl_personalize.importance import Reduction
from pl_personalize.models import TaskNetwork
from pl_personalize.runner.options import ImportanceOptions

ImportanceName = Literal["mas", "fisher"]
KINDS: dict[ImportanceName, str] = {"mas": "MAS", "fisher": "Fisher"}
COEFFICIENTS = ("pearson", "spearman")
SERVER = "server"
ALL = "all"  # of the body's parameters, one after the other
BY_UNIT, BY_INPUT = "by unit", "by input"

Relation = Literal["server and user", "two users", "other task", "same images", "nothing"]


class Images(NamedTuple):
    """Whose images of which task (from 0): a user's for importances, or the server's."""

    owner: str
    task: int


class Estimate(NamedTuple):
    """Importances: of the expert of a task (from 0), on images."""

    expert: int
    images: Images


@dataclass(frozen=True)
class PairRow:
    """How two importances correlate.

    Attributes:
        experts: Which set of experts, such as that of a seed.
        kind: ``mas`` or ``fisher``.
        reduction: ``sample`` or ``batch``.
        parameters: ``all``, the name of a parameter, or of a parameter summed ``by unit`` or ``by input``.
        relation: What the two have in common, see :func:`related`.
        first_expert: Task of the first expert.
        first_images: Owner and task of its images.
        second_expert: Task of the second expert.
        second_images: Owner and task of its images.
        pearson: Pearson's correlation; NaN where an importance is constant.
        spearman: Spearman's.
    """

    experts: str
    kind: ImportanceName
    reduction: Reduction
    parameters: str
    relation: Relation
    first_expert: str
    first_images: str
    second_expert: str
    second_images: str
    pearson: float
    spearman: float


@dataclass(frozen=True)
class Group:
    """Pairs over which a mean is taken.

    Attributes:
        title: What they are.
        relations: What the two have in common.
        images: Only pairs on these images.
        user: Only pairs whose second images are this user's.
    """

    title: str
    relations: frozenset[Relation]
    images: str | None = None
    user: str | None = None

    def __contains__(self, row: PairRow) -> bool:
        chosen = self.images in (None, row.first_images) and self.user in (None, row.second_images.rpartition(" ")[0])
        return chosen and row.relation in self.relations


def related(num_tasks: int, users: Sequence[str]) -> Iterator[tuple[Relation, Estimate, Estimate]]:
    """The pairs that are compared.

    * ``server and user``, ``two users``: one expert, images of its task of two owners.
    * ``other task``: one expert, a user's images of its task and of another.
    * ``same images``: two experts, a user's images of one task.
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
    """Every expert on every user's images of every task, and on the server's of its own."""
    found = {}
    draws = options.fisher_draws if options.reduction == "sample" else 1
    for k, expert in enumerate(experts):
        everything = [Images(user, task) for user in data.users for task in range(len(data.tasks))]
        for images in [Images(SERVER, k), *everything]:
            view = data.view(user=None if images.owner == SERVER else images.owner)
            server = images.owner == SERVER
            loader = view.server_dataloader(images.task) if server else view.adapt_dataloader(images.task)
            generator = torch.Generator().manual_seed(derive_seed(seed, kind, k, *images))
            drawn = {"draws": draws, "generator": generator} if kind == "fisher" else {}
            found[Estimate(k, images)] = estimate_importance(
                expert,
                loader,
                kind,
                module="body",
                reduction=options.reduction,
                **drawn,  # type: ignore[arg-type]
            )
    return found


def views(importances: Sequence[Importance]) -> Iterator[tuple[str, Tensor]]:
    """What is correlated, a row for each importance.

    All parameters, each parameter, and each matrix summed over its inputs (what its units are worth) and over its units
    (what its inputs are worth).
    """
    yield ALL, torch.stack([torch.cat([value.flatten() for value in one.values()]) for one in importances])
    for name, value in importances[0].items():
        stacked = torch.stack([one[name] for one in importances])
        yield name, stacked.flatten(1)
        if value.dim() > 1:
            yield f"{name} {BY_UNIT}", stacked.double().flatten(2).sum(2)
            yield f"{name} {BY_INPUT}", stacked.double().sum(1).flatten(1)


def correlate(
    name: str,
    kind: ImportanceName,
    reduction: Reduction,
    found: dict[Estimate, Importance],
    data: TaskIncrementalDataModule,
) -> list[PairRow]:
    """The correlations of all pairs, for all parameters and each."""
    places = {estimate: place for place, estimate in enumerate(found)}
    pairs = list(related(len(data.tasks), data.users))
    rows = []
    for parameters, values in views(list(found.values())):
        if values.shape[1] < 2:
            continue
        pearson, spearman = correlations(values)
        for relation, first, second in pairs:
            where = places[first], places[second]
            rows.append(
                PairRow(
                    experts=name,
                    kind=kind,
                    reduction=reduction,
                    parameters=parameters,
                    relation=relation,
                    first_expert=data.tasks[first.expert],
                    first_images=title(first.images, data),
                    second_expert=data.tasks[second.expert],
                    second_images=title(second.images, data),
                    pearson=float(pearson[where]),
                    spearman=float(spearman[where]),
                )
            )
    return rows


def correlations(rows: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Pearson's and Spearman's correlation of each row (k, n) with each, (k, k); NaN for constant rows."""
    values = rows.double().numpy()
    with np.errstate(invalid="ignore"):
        scaled = values / values.max(axis=1, keepdims=True)  # the squares of small importances would underflow
        return np.corrcoef(scaled), np.corrcoef(rankdata(values, axis=1))


def title(images: Images, data: TaskIncrementalDataModule) -> str:
    """Such as ``mnist 0-1``."""
    return f"{images.owner} {data.tasks[images.task]}"


def groups(fixed: str, users: Sequence[str]) -> dict[str, Group]:
    """The groups of pairs in the tables, by a short name.

    Args:
        fixed: The images that the claim's second half is read on, such as ``mnist 0-1``.
        users: Names of the users.
    """
    of_server: frozenset[Relation] = frozenset({"server and user"})
    return {
        "model": Group("same expert, images of server and users", of_server | {"two users"}),
        **{f"server {user}": Group(f"– of the server and {user}", of_server, user=user) for user in users},
        "users": Group("– of two users", frozenset({"two users"})),
        "task": Group("same expert, one user's images of two tasks", frozenset({"other task"})),
        "fixed": Group(f"two experts, the images {fixed}", frozenset({"same images"}), fixed),
        "images": Group("two experts, the same images, any user and task", frozenset({"same images"})),
        "nothing": Group("two experts, each on images of its own task", frozenset({"nothing"})),
    }
