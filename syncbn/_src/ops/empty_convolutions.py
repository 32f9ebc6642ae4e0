"""Convolutions of empty batches, to which oneDNN gives a wrong shape.

With oneDNN, TensorFlow's convolution on x86 gives an empty batch the shape of its input, say (0, 8,
8, 3) where (0, 6, 6, 4) is right. What follows then fails, and gets the blame. Seen with TensorFlow
2.21.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import tensorflow as tf

from syncbn._src.ops import xla

_CONVOLUTIONS = {"Conv2D", "Conv3D", "DepthwiseConv2dNative"}
# What may stand between a convolution and a normalization: biases, activations.
_ELEMENTWISE = {
    *("Add", "AddV2", "BiasAdd", "Cast", "Elu", "Identity", "LeakyRelu"),
    *("Mul", "Relu", "Relu6", "Selu", "Sigmoid", "Squeeze", "Tanh"),
}
_DEPTH = 6


def with_checked_channels(x: tf.Tensor, axes: Sequence[int]) -> tf.Tensor:
    """Returns ``x``, which fails where it is an empty batch of a convolution with other channels.

    Where only other sizes are wrong, what follows is right.

    The name of the operation that fails, which TensorFlow shows, says why and what to do. Only
    where that can be, in a graph in which ``x`` comes from a convolution and may have no samples,
    is there such an operation.
    """
    if (
        tf.is_symbolic_tensor(x)
        and x.shape.rank
        and x.shape[0] in (None, 0)
        and os.environ.get("TF_ENABLE_ONEDNN_OPTS") != "0"
        and not (xla.on_gpus() or xla.compiles_everything())
        and _is_of_convolution(x)
    ):
        name = (
            "oneDNN_gave_an_empty_batch_of_a_convolution_this_shape.Set_TF_ENABLE_ONEDNN_OPTS_to_0"
        )
        channels = [size if axis in axes else None for axis, size in enumerate(x.shape)]
        return tf.ensure_shape(x, channels, name=name)
    return x


def _is_of_convolution(x: tf.Tensor) -> bool:
    operation = x.op
    for _ in range(_DEPTH):
        if operation.type in _CONVOLUTIONS:
            return True
        if operation.type not in _ELEMENTWISE or not operation.inputs:
            return False
        operation = operation.inputs[0].op
    return False
