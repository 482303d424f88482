"""Lightning callbacks; each works on any Trainer and LightningModule."""

from pl_personalize.callbacks.adabn import AdaBN
from pl_personalize.callbacks.adabns import AdaBNS
from pl_personalize.callbacks.fisher_importance import FisherImportance
from pl_personalize.callbacks.mas_importance import MASImportance
from pl_personalize.callbacks.parameter_penalty import ParameterPenalty
from pl_personalize.callbacks.plateau_schedule import PlateauSchedule

__all__ = ["AdaBN", "AdaBNS", "FisherImportance", "MASImportance", "ParameterPenalty", "PlateauSchedule"]
