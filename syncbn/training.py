"""What a job of several processes needs around the layers."""

from syncbn._src.keras_compat.multi_worker_fit import mend_keras_fit
from syncbn._src.training.callbacks import AverageMetrics, BroadcastVariables
from syncbn._src.training.clustering import compile_around_collectives
from syncbn._src.training.horovod_initialization import init_horovod
from syncbn._src.training.joined_dataset import join
from syncbn._src.training.learning_rate import LearningRateSchedule, LearningRateWarmup
from syncbn._src.training.optimizer import distribute
from syncbn._src.training.sessions import prediction_variables
from syncbn._src.training.tape import DistributedGradientTape
from syncbn._src.training.variable_broadcast import broadcast

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
