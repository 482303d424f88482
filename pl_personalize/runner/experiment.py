"""The experiment: all that a run depends on, in one object."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from pl_personalize.adaptations import ADAPTATIONS, Adaptation, AdaptationSequence, default_adaptation
from pl_personalize.adaptations.catalogue import split_steps
from pl_personalize.datamodules import TaskIncrementalDataModule
from pl_personalize.datamodules.base import whole
from pl_personalize.methods import METHODS, Family, Method
from pl_personalize.models import TaskNetwork
from pl_personalize.models.network_options import NetworkOptions
from pl_personalize.registry import did_you_mean
from pl_personalize.runner.options import ArtifactName, LoggerName, TestedModels, WandbOptions
from pl_personalize.runner.paper import PaperResult
from pl_personalize.runner.quiet import quiet_lightning
from pl_personalize.runner.results import ALL_USERS
from pl_personalize.runner.variants import Variant
from pl_personalize.stages.options import ImportanceOptions, TrainerOptions, TrainingOptions

DEFAULT_METHODS = ("MAS-RACL", "FIM-RACL", "MAS-IMM", "FIM-IMM", "mean-IMM", "Experts", "Joint")
_RESERVED_USERS = (ALL_USERS, "server", "", "..")  # they stand for something else in results and names of files


def _key(name: str) -> str:
    """The name of an option group: ``AdaBN-S`` is ``adabn_s``."""
    return re.sub(r"\W+", "_", name.lower())


def _option_groups(title: str, groups: Mapping[str, type]) -> type[Any]:
    """A frozen dataclass with one field for each group that has options."""
    chosen = {_key(name): group for name, group in groups.items() if fields(group)}
    made = make_dataclass(
        title, [(key, group, field(default_factory=group)) for key, group in chosen.items()], frozen=True
    )
    lines = "\n".join(f"        {key}: {(group.__doc__ or '').partition('.')[0]}." for key, group in chosen.items())
    made.__doc__ = f"{title}.\n\n    Attributes:\n{lines}\n    "
    made.__module__ = __name__
    return made


MethodOptions = _option_groups("MethodOptions", {m.family.name: m.family.Options for m in METHODS.values()})
AdaptationOptions = _option_groups("AdaptationOptions", dict(ADAPTATIONS))


@dataclass(frozen=True)
class Experiment:
    """An experiment: methods compared on a benchmark, for several users and seeds.

    Finished stages are not repeated when an experiment is run again in the same folder; an interrupted stage resumes
    from its last checkpoint.

    Attributes:
        benchmark: Name of the benchmark, for the results.
        data: The benchmark.
        network: The network, or a function that makes one for a number of classes.
        backbone: Name of the network, for the results; by default that of the options.
        methods: Methods to compare, one or several: the merges ``MAS-RACL``, ``FIM-RACL``, ``MAS-IMM``, ``FIM-IMM`` and
            ``mean-IMM``; ``MAS``, ``EWC``, ``LwF`` and ``Finetune``, which train one model through all tasks; ``FT``,
            experts fine-tuned on the user's labelled images; the bounds ``Experts`` and ``Joint``. A name such as
            ``Experts+FT`` pins the adaptation of a method.
        seeds: Seeds of initial parameters and of the order of the data, one or several.
        adaptations: Adaptations under which every method is tested, one or several, also in sequence
            (``recalibrate+AdaBN``): ``none``, ``last``, ``average``, ``expert``, ``reference``, ``recalibrate``,
            ``AdaBN``, ``AdaBN-S``, ``FT``; by default ``AdaBN`` for networks with batch norm, else ``none``.
        models: Models of a sequence to test: ``all``, or ``last``: only the one after the last task, which has no
            forgetting and takes a fraction of the time.
        training: Training options.
        importance: Importance options.
        method: Method options.
        adaptation: Adaptation options.
        trainer: Trainer options.
        loggers: Where runs are tracked: ``wandb``, ``csv``, ``tensorboard``; one, several or none. Each seed and server
            method is one run.
        wandb: Options of Weights & Biases.
        output_dir: Folder of the run, by default ``runs`` and the name of the benchmark. A finished run may be in a
            read-only folder; then its results are only printed.
        options: Further options that the results depend on.
        paper: Results of the paper by label, shown next to the results.
        paper_note: A note for the comparison with them.

    Raises:
        MisconfigurationException: If an option is out of range, or a package is missing.
    """

    benchmark: str
    data: TaskIncrementalDataModule
    network: NetworkOptions | Callable[[int], TaskNetwork]
    backbone: str | None = None
    methods: Sequence[str] | str = DEFAULT_METHODS
    seeds: Sequence[int] | int = (1, 2, 3)
    adaptations: Sequence[str] | str | None = None
    models: TestedModels = "all"
    training: TrainingOptions = field(default_factory=TrainingOptions)
    importance: ImportanceOptions = field(default_factory=ImportanceOptions)
    method: MethodOptions = field(default_factory=MethodOptions)  # type: ignore[valid-type]
    adaptation: AdaptationOptions = field(default_factory=AdaptationOptions)  # type: ignore[valid-type]
    trainer: TrainerOptions = field(default_factory=TrainerOptions)
    loggers: Sequence[LoggerName] | LoggerName = ("wandb",)
    wandb: WandbOptions = field(default_factory=WandbOptions)
    output_dir: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    paper: Mapping[str, PaperResult] | None = None
    paper_note: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.network, NetworkOptions) and self.backbone is None:
            self._set("backbone", self.network.title)
        if self.backbone is None:
            raise MisconfigurationException("backbone= must name a network that is made by a function.")
        for name in ("methods", "loggers"):
            value = getattr(self, name)
            self._set(name, (value,) if isinstance(value, str) else tuple(value))
        seeds = self.seeds if isinstance(self.seeds, Iterable) else [self.seeds]
        self._set("seeds", tuple(whole("A seed", seed) for seed in seeds))
        if self.adaptations is not None:
            chosen = (self.adaptations,) if isinstance(self.adaptations, str) else tuple(self.adaptations)
            self._set("adaptations", chosen)
        if self.wandb.mode == "disabled":
            self._set("loggers", tuple(name for name in self.loggers if name != "wandb"))
        folder = self.output_dir or Path("runs") / re.sub(r"\W+", "-", self.benchmark.lower())
        self._set("output_dir", Path(folder).expanduser())
        self._check()

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check(self) -> None:
        for name, values, least in (
            ("methods", self.methods, 1),
            ("seeds", self.seeds, 1),
            ("loggers", self.loggers, 0),
            ("adaptations", ("none",) if self.adaptations is None else self.adaptations, 1),
        ):
            listed: list[Any] = list(values)  # type: ignore[arg-type]
            if len(listed) < least or len(set(listed)) != len(listed):
                what = "at least one, and each once" if least else "each once"
                raise MisconfigurationException(f"{name} must be {what}; got {listed}.")
        try:
            pinned = [split_steps(name.partition("+")[2]) for name in self.methods if "+" in name]
            sequences = [split_steps(name) for name in self.adaptations or ()]
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        known: list[tuple[str, Sequence[str], Sequence[str]]] = [
            ("models", [self.models], get_args(TestedModels)),
            ("methods", [name.partition("+")[0] for name in self.methods], list(METHODS)),
            ("methods", [step for steps in pinned for step in steps], list(ADAPTATIONS)),
            ("adaptations", [step for steps in sequences for step in steps], list(ADAPTATIONS)),
            ("loggers", self.loggers, get_args(LoggerName)),
            ("wandb.artifacts", self.wandb.artifacts, get_args(ArtifactName)),
            ("wandb.images_of", self.wandb.images_of, self.data.users),
        ]
        for option, chosen, there in known:
            if unknown := [one for one in chosen if one not in there]:
                hint = did_you_mean(unknown[0], there)
                raise MisconfigurationException(
                    f"{option}: there is no {unknown[0]!r}{hint} Known: {', '.join(there)}."
                )
        names = [family.name for family in self.families]
        if len(set(names)) != len(names):
            raise MisconfigurationException(
                f"Two families of the chosen methods have one name, so they would share stages: {', '.join(names)}."
            )
        if reserved := [user for user in self.data.users if user in _RESERVED_USERS or Path(user).name != user]:
            raise MisconfigurationException(
                f"A user cannot be called {reserved[0]!r}: that name has another meaning in results or file names."
            )
        untracked = "wandb" not in self.loggers and self.wandb.mode != "disabled"
        if untracked and (self.wandb.artifacts or self.wandb.images_of):
            raise MisconfigurationException("wandb.artifacts and wandb.images_of need 'wandb' among the loggers.")
        with quiet_lightning():
            self.trainer.trainer(logger=False, enable_checkpointing=False)
        for package in ("matplotlib", "scipy", "pandas", *(["tensorboard"] if "tensorboard" in self.loggers else [])):
            if find_spec(package) is None:  # needed at the end: say so at the start
                raise MisconfigurationException(
                    f"An experiment with these options needs {package}, which is not installed: pip install {package}"
                )

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        assert self.output_dir is not None
        return self.output_dir

    @property
    def seed_list(self) -> list[int]:
        """The seeds."""
        return [self.seeds] if isinstance(self.seeds, int) else list(self.seeds)

    @property
    def compared(self) -> list[Method]:
        """The methods, each once."""
        return [METHODS[name] for name in dict.fromkeys(name.partition("+")[0] for name in self.methods)]

    @property
    def families(self) -> dict[type[Family], list[Method]]:
        """The methods by the stages that they share, in the order of the registry."""
        chosen, groups = self.compared, dict[type[Family], list[Method]]()
        for method in METHODS.values():
            if method in chosen:
                groups.setdefault(method.family, []).append(method)
        return groups

    def make_network(self, num_classes: int) -> TaskNetwork:
        """The network for a number of classes, initialised from the global generator."""
        if isinstance(self.network, NetworkOptions):
            return self.network.make(self.data.image_shape, num_classes)
        return self.network(num_classes)

    def family_options(self, family: type[Family]) -> Any:
        """The options of a family of methods."""
        found = getattr(self.method, _key(family.name), None)
        return found if isinstance(found, family.Options) else family.Options()

    def sequence(self, variant: Variant) -> AdaptationSequence:
        """The adaptations of a variant, with their options; those that belong to the method come first."""
        names = [*METHODS[variant.method].then, *variant.adaptation.split("+")]
        names = [name for name in names if name != "none"] or ["none"]
        return AdaptationSequence(tuple(self._adaptation(name) for name in names))

    def _steps(self, method: Method) -> Iterator[Adaptation]:
        """Every adaptation that was chosen for a method."""
        pinned = [name.partition("+")[2] for name in self.methods if name.partition("+")[0] == method.name]
        for adaptation in (*filter(None, pinned), *(self.adaptations or ())):
            yield from self.sequence(Variant(method.name, adaptation)).steps

    def _adaptation(self, name: str) -> Adaptation:
        found = getattr(self.adaptation, _key(name), None)
        return found if isinstance(found, Adaptation) and found.name == name else ADAPTATIONS[name]()

    def variants(self, network: TaskNetwork) -> list[Variant]:
        """The rows of the tables: each method under each adaptation that applies to it.

        Raises:
            MisconfigurationException: If an adaptation does not apply to the network or to the tested models, or none
                applies to a method.
        """
        chosen = [default_adaptation(network)] if self.adaptations is None else list(self.adaptations)
        found: list[Variant] = []
        for entry in self.methods:
            method, _, pinned = entry.partition("+")
            wanted = [Variant(method, adaptation) for adaptation in ([pinned] if pinned else chosen)]
            fitting = [v for v in wanted if METHODS[method].merges or not self.sequence(v).merges_only]
            if not fitting:
                raise MisconfigurationException(
                    f"None of the adaptations {[v.adaptation for v in wanted]} applies to {method}, which is no merge; "
                    "add one that does, or leave the method out."
                )
            found += [variant for variant in fitting if variant not in found]
        for variant in found:
            sequence = self.sequence(variant)
            if (why := sequence.why_not(network)) is not None:
                raise MisconfigurationException(f"The adaptation {why}; got the network {self.backbone}.")
            if sequence.needs_earlier_models and self.models == "last":
                raise MisconfigurationException(
                    f"The adaptation {variant.adaptation!r} uses earlier merges, which models='last' does not make: "
                    "leave one of the two out."
                )
        return found

    def decisive_options(self) -> dict[str, Any]:
        """The options that results depend on, as plain JSON values by dotted names.

        Those of the package's methods and adaptations are always among them, so that more of them can be run in the
        same folder later.
        """
        network = {"network": asdict(self.network)} if isinstance(self.network, NetworkOptions) else {}
        trainer = asdict(self.trainer)
        del trainer["enable_progress_bar"], trainer["log_every_n_steps"]
        found: dict[str, Any] = {"benchmark": self.benchmark, "backbone": self.backbone, "models": self.models}
        found |= {"data": self.data.decisive_options()} | network | dict(self.options)
        found |= {"training": asdict(self.training), "importance": asdict(self.importance), "trainer": trainer}
        families = {_key(family.name): asdict(self.family_options(family)) for family in self.families}
        steps = {step.name: step for method in self.compared for step in self._steps(method)}
        found["method"] = asdict(self.method) | families  # also of entries that were registered later
        found["adaptation"] = asdict(self.adaptation) | {_key(name): asdict(step) for name, step in steps.items()}
        plain: dict[str, Any] = json.loads(json.dumps(_flat(found)))
        return plain


def _flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found
