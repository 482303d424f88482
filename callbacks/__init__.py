"""Lightning callbacks; each works on any Trainer and LightningModule."""

from pl_personalize.callbacks.adabn import AdaBN
from pl_personalize.callbacks.adabns import AdaBNS
from pl_personalize.callbacks.adapt_head import AdaptHead
from pl_personalize.callbacks.fisher_importance import FisherImportance
from pl_personalize.callbacks.mas_importance import MASImportance
from pl_personalize.callbacks.parameter_penalty import ParameterPenalty
from pl_personalize.callbacks.plateau_schedule import PlateauSchedule
from pl_personalize.callbacks.refit_head import RefitHead

__all__ = [
    "AdaBN",
    "AdaBNS",
    "AdaptHead",
    "FisherImportance",
    "MASImportance",
    "ParameterPenalty",
    "PlateauSchedule",
    "RefitHead",
]
