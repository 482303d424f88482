"""Methods: what a server trains, merges and sends."""

from pl_personalize.methods.experts import EXPERTS, FIM_IMM, FIM_RACL, FT, MAS_IMM, MAS_RACL, MEAN_IMM
from pl_personalize.methods.finetune import FINETUNE
from pl_personalize.methods.joint import JOINT
from pl_personalize.methods.lwf import LWF
from pl_personalize.methods.method import Family, Method
from pl_personalize.methods.penalties import EWC, MAS
from pl_personalize.registry import Registry

METHODS: Registry[Method] = Registry(
    "method",
    [MAS_RACL, FIM_RACL, MAS_IMM, FIM_IMM, MEAN_IMM, MAS, EWC, LWF, FINETUNE, FT, EXPERTS, JOINT],
)

__all__ = ["METHODS", "Family", "Method"]
