"""The synchronized layers."""

from syncbn.layers.batch_normalization import SyncBatchNormalization
from syncbn.layers.centering import SyncCentering

__all__ = ["SyncBatchNormalization", "SyncCentering"]
