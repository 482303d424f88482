"""Heads that are refitted on a server and adapted on a device, in closed form and without a change of the network."""

from pl_personalize.heads.adapt import HeadAdaptation, adapt_head
from pl_personalize.heads.reference import HeadReference
from pl_personalize.heads.refit import refit_head

__all__ = ["HeadAdaptation", "HeadReference", "adapt_head", "refit_head"]
