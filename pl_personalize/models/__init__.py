"""Networks with a body and a head."""

from pl_personalize.models.backbones import backbone, backbone_names, check_backbone
from pl_personalize.models.network_options import NetworkOptions
from pl_personalize.models.splitting import split
from pl_personalize.models.task_network import ConvHead, MultiHeadNetwork, TaskNetwork, cnn_bn, mlp
from pl_personalize.models.weights import efficientnet_lite_to_timm

__all__ = [
    "ConvHead",
    "MultiHeadNetwork",
    "NetworkOptions",
    "TaskNetwork",
    "backbone",
    "backbone_names",
    "check_backbone",
    "cnn_bn",
    "efficientnet_lite_to_timm",
    "mlp",
    "split",
]
