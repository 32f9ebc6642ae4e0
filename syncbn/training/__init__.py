"""What a job of several processes needs around the layers."""

from syncbn.training.broadcast import broadcast
from syncbn.training.callbacks import AverageMetrics, BroadcastVariables
from syncbn.training.clustering import compile_around_collectives
from syncbn.training.horovod import init_horovod
from syncbn.training.join import join
from syncbn.training.learning_rate import LearningRateSchedule, LearningRateWarmup
from syncbn.training.multi_worker import mend_keras_fit
from syncbn.training.optimizer import distribute
from syncbn.training.sessions import prediction_variables
from syncbn.training.tape import DistributedGradientTape

__all__ = [
    "AverageMetrics",
    "BroadcastVariables",
    "DistributedGradientTape",
    "LearningRateSchedule",
    "LearningRateWarmup",
    "broadcast",
    "compile_around_collectives",
    "distribute",
    "init_horovod",
    "join",
    "mend_keras_fit",
    "prediction_variables",
]
