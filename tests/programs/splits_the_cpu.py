"""`check_equivalence` makes CPU devices where there are none yet, and else says how."""

import numpy as np
import tensorflow as tf

from syncbn import check_equivalence


def build():
    return tf.keras.Sequential([tf.keras.Input((2,)), tf.keras.layers.Dense(1)])


assert check_equivalence(build, np.ones([6, 2]), 3).equivalent
try:
    check_equivalence(build, np.ones([8, 2]), 4)
except RuntimeError as error:
    print(error)
