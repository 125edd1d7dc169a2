"""TensorFlow and Keras, configured for compiling. Other modules here import `tf` and `keras` from this one."""

from __future__ import annotations

import os

# The user's ~/.keras/keras.json may name another backend, but the compiler traces with TensorFlow.
os.environ["KERAS_BACKEND"] = "tensorflow"

# The executor's module makes TensorFlow deterministic, so that checks here apply to the served program.
from stepwell_server.engine.executors import tensorflow as _executor  # noqa: I001

import keras
import tensorflow as tf
from tensorflow.python.util import deprecation

_executor.configure()
# Else graphs divide by a constant as a product with its rounded reciprocal: 1 / 1 is 0.99999994.
tf.config.optimizer.set_experimental_options({"constant_folding": False})
# Else TensorFlow inspects the signatures of many of its functions in each call, to warn about its own deprecations: a tenth
# of the compile time.
deprecation._PRINT_DEPRECATION_WARNINGS = False

__all__ = ["keras", "tf"]
