"""What a layer must do with a whole batch, whatever its options: made of the oracle's pieces.

A batch falls into units, each of which is normalized with its own statistics: the whole batch, the
samples of a group of replicas, or a slice of one replica's samples.
"""

import itertools

import numpy as np

from tests import oracle

EPSILON = 1e-3


class Truth:
    """A layer's outputs and gradients, batch by batch, and its moving statistics after each."""

    def __init__(self, normalizes, channels, axis, options):
        self.normalizes, self.axis, self.options = normalizes, axis, options
        self.moving = {
            "moving_mean": np.zeros(channels),
            "moving_variance": np.ones(channels),
            "moving_count": np.zeros(channels),
            "moving_stddev": np.ones(channels),
            "renorm_mean": np.zeros(channels),
            "renorm_stddev": np.ones(channels),
        }

    def step(self, x, dy, gamma, beta, mask, split):
        """Returns y, dx, the terms of dx, and what gamma is multiplied with, as arrays like x."""
        units = _units(split, self.options)
        count, mean, variance = self._taken_up(x, dy, mask, units)

        virtual = self.options.get("virtual_batch_size")

        def correction(*own):
            # Slices are corrected as their average is, groups each for itself.
            return self._correction(*((mean, variance) if virtual else own))

        arrays = [np.zeros(x.shape) for _ in range(4)]
        for unit in units:
            own_mask = None if mask is None else mask[unit]
            if self.normalizes:
                result = oracle.batch_normalization(
                    x[unit],
                    dy[unit],
                    gamma,
                    beta,
                    axis=self.axis,
                    mask=own_mask,
                    correction=correction,
                )
            else:
                result = oracle.centering(x[unit], dy[unit], axis=self.axis, mask=own_mask)
            parts = result.y, result.dx, result.dx_terms, result.normalized
            for whole, part in zip(arrays, parts, strict=True):
                if part.size:
                    whole[unit] = part
        self._move(count, mean, variance)
        return arrays

    def _taken_up(self, x, dy, mask, units):
        """The average of the units' statistics, weighted by their counts."""
        channels = self.moving["moving_mean"].size
        count, mean, variance = np.zeros((3, channels))
        for unit in units:
            # gamma and beta make no difference to the statistics.
            own_mask = None if mask is None else mask[unit]
            own = oracle.batch_normalization(
                x[unit], dy[unit], 1.0, 0.0, axis=self.axis, mask=own_mask
            )
            own_variance = own.variance
            if self.options.get("unbiased_moving_variance"):
                own_variance = own_variance * own.count / np.maximum(own.count - 1, 1)
            count += own.count
            mean += own.count * own.mean
            variance += own.count * own_variance
        return count, mean / np.maximum(count, 1), variance / np.maximum(count, 1)

    def _correction(self, mean, variance):
        if not self.options.get("renorm"):
            return 1.0, 0.0
        clipping = self.options.get("renorm_clipping") or {}
        deviation = np.maximum(self.moving["renorm_stddev"], EPSILON**0.5)
        r = np.sqrt(variance + EPSILON) / deviation
        d = (mean - self.moving["renorm_mean"]) / deviation
        r = np.clip(r, clipping.get("rmin", -np.inf), clipping.get("rmax", np.inf))
        return r, np.clip(d, -clipping.get("dmax", np.inf), clipping.get("dmax", np.inf))

    def _move(self, count, mean, variance):
        moving, seen = self.moving, count > 0
        deviation = np.sqrt(variance + EPSILON)
        if self.options["momentum"] is None:
            moving["moving_count"] = moving["moving_count"] + count
            rate = count / np.maximum(moving["moving_count"], 1)
        else:
            rate = (1 - self.options["momentum"]) * seen

        def towards(name, target, rate):
            moving[name] = moving[name] + rate * (target - moving[name])

        towards("moving_mean", mean, rate)
        if self.options.get("renorm"):
            towards("moving_stddev", deviation, rate)
            variance = np.maximum(moving["moving_stddev"] ** 2 - EPSILON, 0)
            moving["moving_variance"] = np.where(seen, variance, moving["moving_variance"])
            renorm_rate = (1 - self.options.get("renorm_momentum", 0.99)) * seen
            towards("renorm_mean", mean, renorm_rate)
            towards("renorm_stddev", deviation, renorm_rate)
        else:
            towards("moving_variance", variance, rate)


def _units(split, options):
    """The samples of each unit, as arrays of indices; none is empty."""
    starts = np.cumsum([0, *split])
    parts = [np.arange(a, b) for a, b in itertools.pairwise(starts)]
    size = options.get("virtual_batch_size")
    if size is not None:
        numbers = [-(-len(part) // size) for part in parts]
        units = [part[i::n] for part, n in zip(parts, numbers, strict=True) for i in range(n)]
    else:
        units = [
            np.concatenate([parts[rank] for rank in group]) for group in _groups(split, options)
        ]
    return [unit for unit in units if len(unit)]


def _groups(split, options):
    if options.get("groups") is not None:
        return options["groups"]
    size = options.get("group_size") or len(split)
    return [range(first, first + size) for first in range(0, len(split), size)]
