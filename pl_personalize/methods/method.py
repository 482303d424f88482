"""Methods, the rows of the tables, and the families of stages that make what they need."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pl_personalize.modules import SequenceEvaluator
from pl_personalize.stages.work import RunFile, Work
from pl_personalize.stages.workspace import Workspace


@dataclass(frozen=True)
class NoOptions:
    """No options."""


@dataclass(frozen=True)
class Method:
    """A method that an experiment compares.

    Attributes:
        name: Name in options, stages, tables and figures.
        family: The stages that make what it tests; methods of one family share them.
        text: One line on what it does.
        reference: The paper that describes it.
        merges: Whether it merges experts, so that there is a merged model to keep for each user.
        personal: Whether each user gets another model.
        needs_importances: Whether it weights parameters by their importance.
        one_each: Whether each task has a model of its own, so that nothing can be forgotten.
        then: Names of adaptations that always come first, such as fine-tuning in ``FT``.
        bound: What it bounds, if it is no competitor but a bound to compare with.
    """

    name: str
    family: type[Family]
    text: str
    reference: str = "De Lange et al., CVPR 2020"
    merges: bool = False
    personal: bool = False
    needs_importances: bool = False
    one_each: bool = False
    then: tuple[str, ...] = ()
    bound: str | None = None


class Family(ABC):
    """Base class for the stages of a server method with one seed: training, importances, and the models to test.

    A subclass with its methods is one file of :mod:`pl_personalize.methods`.

    Args:
        workspace: The place in which the stages are done.
        methods: The methods of this family that are tested.
        options: An instance of :attr:`Options`.
    """

    name: ClassVar[str]
    """Name of the family in stages, files and tracked runs."""
    Options: ClassVar[type] = NoOptions
    """A frozen dataclass that checks itself."""
    needs_one_shape: ClassVar[bool] = False
    """Whether a model is trained on the images of several tasks at once, which must be of one shape then."""

    def __init__(self, workspace: Workspace, methods: Sequence[Method], options: Any) -> None:
        self.workspace, self.methods, self.options = workspace, list(methods), options
        self.data, self.num_tasks = workspace.data, workspace.num_tasks

    @abstractmethod
    def stages(self) -> Iterator[Work]:
        """The stages of training and of importances, in an order in which each finds what it needs."""

    @abstractmethod
    def evaluator(self, method: Method, user: str) -> SequenceEvaluator:
        """The models that a method has for a user."""

    @abstractmethod
    def models(self) -> list[RunFile]:
        """The files of trained models, in the order of their training."""

    def importances(self) -> list[tuple[str, int, RunFile]]:
        """Estimated importances: their owner, the task (from 0) of the model, and the file."""
        return []

    def sources(self, method: Method, user: str) -> list[Path]:
        """The files that a merged model of a method for a user is made of."""
        return []
