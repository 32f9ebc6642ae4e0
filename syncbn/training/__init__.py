"""What a job of several processes needs around the layers."""

from syncbn.training.broadcast import broadcast
from syncbn.training.callbacks import AverageMetrics, BroadcastVariables
from syncbn.training.join import join
from syncbn.training.optimizer import distribute

__all__ = ["AverageMetrics", "BroadcastVariables", "broadcast", "distribute", "join"]
