"""TensorFlow and Keras, set up for compiling. Other modules here take `tf` and `keras` from this one."""

from __future__ import annotations

import os

# A user's ~/.keras/keras.json may name another backend; the compiler traces with TensorFlow.
os.environ["KERAS_BACKEND"] = "tensorflow"

# The executor's module makes TensorFlow deterministic: what is checked here is what runs there.
from stepwell_server.engine.executors import tensorflow as _executor  # noqa: I001

import keras
import tensorflow as tf

_executor.configure()

__all__ = ["keras", "tf"]
