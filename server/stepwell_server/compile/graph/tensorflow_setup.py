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
# Else TensorFlow inspects the signatures of many of its functions in each call, to warn about its own deprecations: a tenth
# of the compile time.
deprecation._PRINT_DEPRECATION_WARNINGS = False

__all__ = ["keras", "tf"]
