r"""Heads adapted without labels, in detail: which shift is found, with how many images, and whom it harms.

Of a finished run on scenes, each image passes the merged network once; all the rest is computed from its features:

    python experiments/head_study.py runs/catprior-squeezenet

* every adaptation of the refitted head for every user, beside the bounds;
* a curve over the number of unlabelled images for each task;
* users without any shift, drawn from images that nobody has, as often of each class as the server has it.

``results.csv`` in ``head-study`` has one line for each seed, user and adaptation; parts in it are not repeated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import pandas as pd
import torch
from finished_run import SCENES, FinishedRun
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from scipy import stats
from torch import Tensor, nn

from pl_personalize.adaptations import Case, Received, find_adaptation
from pl_personalize.adaptations.adaptation import SENT
from pl_personalize.adaptations.heads import FOUND, Auto
from pl_personalize.artifacts import TensorFile, write_atomically
from pl_personalize.batchnorm import batchnorm_layers
from pl_personalize.datamodules.labelled_images import permutation
from pl_personalize.datamodules.scene_cameras import CameraSceneDataModule
from pl_personalize.functional.batches import batch_labels
from pl_personalize.functional.discriminant import Linear
from pl_personalize.functional.seeding import derive_seed
from pl_personalize.heads import HeadReference, refit_head
from pl_personalize.heads.adapt import Shift
from pl_personalize.heads.cameras import FAMILIES
from pl_personalize.heads.features import HeadOf
from pl_personalize.models import TaskNetwork
from pl_personalize.runner.command_line import run_script
from pl_personalize.runner.results import FEWEST_SEEDS, markdown_table, mean_and_std

ADAPTATIONS = ("priors", "bbse", "standardize", "auto", "true-priors", "true-moments", "true-both")
SIZES = (5, 10, 20, 40, 80, 160)
Part = Literal["users", "curve", "unshifted"]
LEFT_OUT = "refit+auto, family left out"
DRAWS, UNSHIFTED, IMAGES = 3, 20, 80  # draws of each size; users without a shift for each seed, and their images
LIKE = {  # families of random cameras that resemble a distortion
    "gaussian_noise": ("noise", "mixed"),
    "impulse_noise": ("impulse",),
    "contrast": ("contrast",),
    "jpeg": ("jpeg",),
    "brightness": ("brightness",),
    "saturation": ("saturation",),
    "defocus_blur": ("blur", "mixed"),
    "gaussian_blur": ("blur", "mixed"),
}


class Samples(NamedTuple):
    """Features (n, d) and labels (n,)."""

    features: Tensor
    labels: Tensor

    def at(self, rows: Tensor) -> Samples:
        """Some of the samples."""
        return Samples(self.features[rows], self.labels[rows])


class User(NamedTuple):
    """A user's samples of each task, and the name of their distortion."""

    name: str
    camera: str
    adapt: list[Samples]
    eval: list[Samples]


class Server(NamedTuple):
    """The heads of all tasks, as merged and as refitted, and their references."""

    merged: list[Linear]
    refitted: list[Linear]
    references: list[HeadReference]


class Features:
    """A device of an adaptation whose images are features."""

    user = None

    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    def images(self) -> Iterable[Any]:
        """All of them in one batch."""
        return [self._samples.features]

    def labelled_images(self, seed: int) -> Iterable[Any]:
        """The same with labels."""
        return [tuple(self._samples)]

    def as_input(self, batch: Any) -> Any:
        """The features."""
        return batch if isinstance(batch, Tensor) else batch[0]


def head_network(head: Linear) -> TaskNetwork:
    """A network of a head alone, whose inputs are features."""
    layer = nn.Linear(head.weight.shape[1], len(head.weight))
    with torch.no_grad():
        layer.weight.copy_(head.weight)
        layer.bias.copy_(head.bias)
    return TaskNetwork(nn.Identity(), layer)


def for_features(reference: HeadReference, head: Linear) -> HeadReference:
    """The reference for :func:`head_network`."""
    layer = HeadOf(head_network(head), "head")
    list(layer.read([torch.zeros(1, head.weight.shape[1])]))
    return replace(reference, body_fingerprint=layer.body_fingerprint)


def without_families(reference: HeadReference, families: Sequence[str]) -> HeadReference:
    """The reference without the shifts of random cameras of some families.

    What they contributed to the calibration of other cameras (``camera_scale``) is left.
    """
    names = list(FAMILIES)
    kept = [k for k in range(len(reference.camera_shifts)) if names[k % len(names)] not in families]
    tensors = {name: getattr(reference, name)[kept] for name in ("camera_shifts", "camera_ratios", "camera_evidence")}
    return replace(reference, **tensors)


def read(network: TaskNetwork, batches: Iterable[Any]) -> Samples:
    """Features and labels of all batches."""
    layer = HeadOf(network, "head")
    parts = [(features.float(), batch_labels(batch).cpu()) for batch, features in layer.read(batches)]
    return Samples(*(torch.cat(part) for part in zip(*parts, strict=True)))


def adapted(
    server: Server, samples: Sequence[Samples], adaptation: str, references: Sequence[HeadReference] | None = None
) -> tuple[list[TaskNetwork], Shift | None]:
    """The heads of all tasks after an adaptation, and the shift that it found."""
    cases = []
    for task, own in enumerate(samples):
        reference = (references or server.references)[task]
        sent = {f"reference.{name}": value for name, value in reference.tensors.items()}
        cases.append(
            Case(head_network(server.refitted[task]), Features(own), Received(len(samples) - 1, task, sent=sent))
        )
    found = find_adaptation(adaptation).adapt_tasks(cases)
    shift = None if adaptation != Auto.name else get_args(Shift)[int(found[0][f"{SENT}{FOUND}"])]
    return [case.network for case in cases], shift


@torch.inference_mode()
def accuracies(networks: Sequence[TaskNetwork], samples: Sequence[Samples]) -> list[float]:
    """Accuracy on each task in percent."""
    pairs = zip(networks, samples, strict=True)
    return [100 * float((network(own.features).argmax(1) == own.labels).float().mean()) for network, own in pairs]


class Study:
    """One seed of a run: its merged network, refitted heads, and the features of all images."""

    def __init__(self, run: FinishedRun[Any], seed: int, method: str, cameras: int) -> None:
        self.data, self.seed = run.data.view(seed=seed), seed
        path = run.path / "merged" / "experts" / f"seed{seed}" / f"{self.data.users[0]}-{method}.safetensors"
        state = TensorFile(path, kind="merged").load()
        self.networks, merged, refitted, references = [], [], [], []
        for task in range(len(self.data.tasks)):
            network, head = run.network(task), f"heads.{task}."
            entries = {name: value for name, value in state.items() if name.startswith("body.")}
            entries |= {f"head.{n.removeprefix(head)}": v for n, v in state.items() if n.startswith(head)}
            network.load_state_dict(entries)
            if batchnorm_layers(network.body):
                raise MisconfigurationException("The network has batch norm, which this study does not adapt.")
            layer = HeadOf(network, "head")
            merged.append(layer.linear)
            splits = (self.data.server_dataloader(task, split=split) for split in ("train", "val"))
            reference = refit_head(network, *splits, head="head", cameras=cameras, progress=True)
            refitted.append(layer.linear)
            references.append(for_features(reference, layer.linear))
            self.networks.append(network)
        self.server = Server(merged, refitted, references)

    def users(self) -> Iterable[User]:
        """The users of the benchmark."""
        for name in self.data.users:
            view = self.data.view(user=name)
            adapt = [read(net, view.adapt_dataloader(t, labels=True)) for t, net in enumerate(self.networks)]
            evaluation = [read(net, loader) for net, loader in zip(self.networks, view.test_dataloader(), strict=True)]
            camera = self.data.distortion_of(name) if isinstance(self.data, CameraSceneDataModule) else ""
            yield User(name, camera, adapt, evaluation)

    def unshifted(self) -> Iterable[User]:
        """Users with the server's own distribution, of images that neither it nor a user has."""
        taken = {
            name
            for user in self.data.users
            for task in self.data.tasks
            for split in self.data.user_files(user, task)
            for name in split
        }
        pools = []
        for task, network in enumerate(self.networks):
            names = [(n, k) for k, scene in enumerate(self.data.classes[task]) for n in self.data.pools().extra[scene]]
            names = [(name, label) for name, label in names if name not in taken]
            images = (torch.tensor(self.data.read_scene(self.data.data_dir / "Images" / name)) for name, _ in names)
            labels = torch.tensor([label for _, label in names])
            stacked = torch.stack([image.permute(2, 0, 1) for image in images])
            parts = zip(stacked.split(64), labels.split(64), strict=True)
            pools.append(read(network, ((self.data.transform(x), y) for x, y in parts)))
        for number in range(UNSHIFTED):
            drawn = [
                self._draw(pool, reference.class_priors, number, task)
                for task, (pool, reference) in enumerate(zip(pools, self.server.references, strict=True))
            ]
            yield User(f"unshifted{number + 1}", "", [own for own, _ in drawn], [own for _, own in drawn])

    def _draw(self, pool: Samples, priors: Tensor, number: int, task: int) -> tuple[Samples, Samples]:
        """Different samples to adapt to and to evaluate on, with the server's class priors."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "unshifted", number, task))
        weights = (priors / torch.bincount(pool.labels, minlength=len(priors)).clamp_min(1))[pool.labels]
        size = min(IMAGES, len(pool.labels) // 2)
        rows = torch.multinomial(weights, 2 * size, generator=generator)
        return pool.at(rows[:size]), pool.at(rows[size:])

    def rows(self, user: User, parts: Sequence[Part]) -> Iterable[dict[str, Any]]:
        """The lines of ``results.csv`` for a user."""

        def row(adaptation: str, images: float, found: Sequence[float], shift: Shift | None = None) -> dict[str, Any]:
            lost = sum(before - after > 1 + 1e-4 for before, after in zip(as_it_is, found, strict=True))
            return {
                "seed": self.seed,
                "part": part,
                "user": user.name,
                "camera": user.camera,
                "adaptation": adaptation,
                "images": images,
                "accuracy": sum(found) / len(found),
                "shift": shift or "",
                "harmed": lost,
                "tasks": len(found),
            }

        server, count = self.server, sum(len(own.labels) for own in user.adapt) / len(user.adapt)
        as_it_is = accuracies([head_network(head) for head in server.merged], user.eval)
        for part in parts:
            if part == "curve":
                continue
            yield row("none", count, as_it_is)
            yield row("refit", count, accuracies([head_network(head) for head in server.refitted], user.eval))
            for name in ADAPTATIONS if part == "users" else ("auto",):
                networks, shift = adapted(server, user.adapt, name)
                yield row(f"refit+{name}", count, accuracies(networks, user.eval), shift)
            families = LIKE.get(user.camera, ())
            if part == "users" and families and server.references[0].cameras is not None:
                left = [without_families(reference, families) for reference in server.references]
                networks, shift = adapted(server, user.adapt, "auto", left)
                yield row(LEFT_OUT, count, accuracies(networks, user.eval), shift)
        part = "curve"
        for size in SIZES if part in parts else ():
            if sum(min(len(own.labels), size) for own in user.adapt) < 0.9 * size * len(user.adapt):
                break
            for draw in range(DRAWS):
                some = [
                    own.at(permutation(len(own.labels), self.seed, user.name, draw, task)[:size])
                    for task, own in enumerate(user.adapt)
                ]
                networks, shift = adapted(server, some, "auto")
                yield row("refit+auto", size, accuracies(networks, user.eval), shift)


def p_value(found: pd.Series, others: pd.Series) -> str:
    """The p of a paired t-test of means by seed; empty with fewer than three seeds or without a difference."""
    if len(found) < FEWEST_SEEDS or found.equals(others):
        return ""
    return f"{stats.ttest_rel(found, others).pvalue:.2g}"


def tables(frame: pd.DataFrame) -> str:
    """The tables of all lines."""
    found = []
    for part, rows in frame[frame["part"] != "curve"].groupby("part", sort=False):
        lines = [["adaptation", "accuracy", "p, none", "p, refit", "harmed", *get_args(Shift)]]
        rows = rows[rows["adaptation"] != LEFT_OUT]  # which not all users have
        means = rows.groupby(["adaptation", "seed"], sort=False)["accuracy"].mean()
        for name, one in rows.groupby("adaptation", sort=False):
            counts = Counter(one["shift"])
            shifts = [str(counts[shift]) if one["shift"].any() else "" for shift in get_args(Shift)]
            p_values = [p_value(means[name], means[other]) for other in ("none", "refit")]
            harmed = f"{one['harmed'].sum()}/{one['tasks'].sum()}"
            lines.append([name, mean_and_std(list(means[name])), *p_values, harmed, *shifts])
        title = {"users": "Users of the benchmark", "unshifted": "Users without a shift"}[part]
        found.append(f"{title}:\n\n{markdown_table(lines)}")
    curve = frame[frame["part"] == "curve"]
    if len(curve):
        lines = [["images a task", "accuracy", "harmed", *get_args(Shift)]]
        for size, one in curve.groupby("images"):
            counts, by_seed = Counter(one["shift"]), list(one.groupby("seed")["accuracy"].mean())
            harmed = f"{one['harmed'].sum()}/{one['tasks'].sum()}"
            lines.append([f"{size:.0f}", mean_and_std(by_seed), harmed, *[str(counts[s]) for s in get_args(Shift)]])
        found.append(f"refit+auto with some of the images, {DRAWS} draws:\n\n{markdown_table(lines)}")
    seen = frame[(frame["camera"] != "") & (frame["part"] == "users")]
    if len(seen):
        table = seen.groupby(["camera", "adaptation"], sort=False)["accuracy"].mean().unstack().round(1)
        lines = [["camera", *table.columns]]
        lines += [[str(camera), *map(str, line)] for camera, line in zip(table.index, table.to_numpy(), strict=True)]
        found.append(f"By camera:\n\n{markdown_table(lines)}")
    found.append(
        "Accuracy in percent, mean ± standard deviation over seeds; p of paired t-tests over seeds against none and "
        "refit. harmed: pairs of user and task that lose more than a point against the merged model as it is (none). "
        "The other columns: users for whom a shift was found."
    )
    return "\n\n".join(found)


def main(
    run: Path,
    method: str = "FIM-IMM",
    cameras: int = 0,
    seeds: Sequence[int] | None = None,
    parts: Sequence[Part] = ("users", "curve", "unshifted"),
) -> None:
    """Study the heads of a finished run on scenes.

    Args:
        run: Folder of the run.
        method: A merge whose models are the same for all users.
        cameras: Number of random cameras that the references hold.
        seeds: Seeds of the run; by default all.
        parts: What to compute.
    """
    finished = FinishedRun(run, SCENES)
    finished.data.prepare_data()
    folder = run / "head-study" / (f"{method}-{cameras}-cameras" if cameras else method)
    path = folder / "results.csv"
    frame = pd.read_csv(path, keep_default_na=False) if path.exists() else pd.DataFrame(columns=["seed", "part"])
    for seed in seeds or finished.seeds("merged"):
        missing = [part for part in parts if part not in set(frame.loc[frame["seed"] == seed, "part"])]
        if not missing:
            continue
        study, rows = Study(finished, seed, method, cameras), []
        of_users = [part for part in missing if part != "unshifted"]
        for user in study.users() if of_users else ():
            rows += study.rows(user, of_users)
        for user in study.unshifted() if "unshifted" in missing else ():
            rows += study.rows(user, ["unshifted"])
        frame = pd.concat([frame, pd.DataFrame(rows)]) if len(frame) else pd.DataFrame(rows)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, frame.to_csv(index=False).encode())
        print(f"seed {seed} is done")
    if frame.empty:
        raise MisconfigurationException(f"{run} has no finished seed with merged models.")
    text = tables(frame)
    write_atomically(folder / "results.md", f"# Heads of {method}\n\n{text}\n".encode())
    print(f"\n{text}\n\nResults: {path}, {folder / 'results.md'}")


if __name__ == "__main__":
    run_script(main, as_positional=True)
