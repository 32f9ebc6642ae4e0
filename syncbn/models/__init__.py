"""What is done to a whole model."""

from syncbn.models.statistics import MovingStatistics, moving_statistics, set_moving_statistics

__all__ = ["MovingStatistics", "moving_statistics", "set_moving_statistics"]
