"""What a job of several processes needs around the layers."""

from syncbn._src.keras_compat.multi_worker_fit import mend_keras_fit
from syncbn._src.training.callbacks import AverageMetrics, BroadcastVariables
from syncbn._src.training.clustering import compile_around_collectives
from syncbn._src.training.elastic_function import elastic
from syncbn._src.training.elastic_state import ElasticState
from syncbn._src.training.evaluation_statistics import AverageStatistics, Recalibrate
from syncbn._src.training.horovod_initialization import init_horovod
from syncbn._src.training.job_start import Job, start
from syncbn._src.training.joined_dataset import join
from syncbn._src.training.joint_metrics import evaluate
from syncbn._src.training.learning_rate import LearningRateSchedule, LearningRateWarmup
from syncbn._src.training.optimizer import distribute
from syncbn._src.training.preemption_checkpoint import PreemptionCheckpoint
from syncbn._src.training.rank_zero import rank_zero_only
from syncbn._src.training.sessions import prediction_variables
from syncbn._src.training.state_commits import CommitState
from syncbn._src.training.statistics_monitor import StatisticsMonitor
from syncbn._src.training.tape import DistributedGradientTape
from syncbn._src.training.variable_broadcast import broadcast

__all__ = [
    "AverageMetrics",
    "AverageStatistics",
    "BroadcastVariables",
    "CommitState",
    "DistributedGradientTape",
    "ElasticState",
    "Job",
    "LearningRateSchedule",
    "LearningRateWarmup",
    "PreemptionCheckpoint",
    "Recalibrate",
    "StatisticsMonitor",
    "broadcast",
    "compile_around_collectives",
    "distribute",
    "elastic",
    "evaluate",
    "init_horovod",
    "join",
    "mend_keras_fit",
    "prediction_variables",
    "rank_zero_only",
    "start",
]
