"""What a job of several processes needs around the layers."""

from syncbn.training.broadcast import broadcast
from syncbn.training.callbacks import AverageMetrics, BroadcastVariables
from syncbn.training.clustering import compile_around_collectives
from syncbn.training.join import join
from syncbn.training.multi_worker import mend_keras_fit
from syncbn.training.optimizer import distribute
from syncbn.training.sessions import prediction_variables

__all__ = [
    "AverageMetrics",
    "BroadcastVariables",
    "broadcast",
    "compile_around_collectives",
    "distribute",
    "join",
    "mend_keras_fit",
    "prediction_variables",
]
