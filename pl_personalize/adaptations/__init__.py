"""Adaptations: what a device does with a model that it was given, without or with labels."""

from pl_personalize.adaptations.adaptation import Adaptation, AdaptationSequence, Case, Device, Entries, Received
from pl_personalize.adaptations.catalogue import ADAPTATIONS, default_adaptation, find_adaptation

__all__ = [
    "ADAPTATIONS",
    "Adaptation",
    "AdaptationSequence",
    "Case",
    "Device",
    "Entries",
    "Received",
    "default_adaptation",
    "find_adaptation",
]
