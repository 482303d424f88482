"""Networks with a ``body`` and a ``head``."""

from pl_personalize.models.task_network import MultiHeadNetwork, TaskNetwork, cnn_bn, mlp

__all__ = ["MultiHeadNetwork", "TaskNetwork", "cnn_bn", "mlp"]
