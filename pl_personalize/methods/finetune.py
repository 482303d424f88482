"""Finetune: one model through all tasks, without any means against forgetting."""

from __future__ import annotations

from pl_personalize.methods.method import Method
from pl_personalize.methods.sequence import SequenceFamily


class FinetuneFamily(SequenceFamily):
    """One model, trained on one task after the other."""

    name = "Finetune"
    shares_first = True


FINETUNE = Method(
    "Finetune",
    FinetuneFamily,
    "one model through all tasks, without any means against forgetting",
    bound="one model, trained on one task after the other",
)
