"""What is done to a whole model."""

from syncbn.models.agreement import assert_synchronized
from syncbn.models.convert import Conversion, convert_sync_batchnorm, revert_sync_batchnorm
from syncbn.models.equivalence import Equivalence, check_equivalence
from syncbn.models.recalibrate import recalibrate
from syncbn.models.report import Report, report
from syncbn.models.statistics import MovingStatistics, moving_statistics, set_moving_statistics

__all__ = [
    "Conversion",
    "Equivalence",
    "MovingStatistics",
    "Report",
    "assert_synchronized",
    "check_equivalence",
    "convert_sync_batchnorm",
    "moving_statistics",
    "recalibrate",
    "report",
    "revert_sync_batchnorm",
    "set_moving_statistics",
]
