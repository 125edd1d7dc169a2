"""Compiles a step function from an ``.onnx`` file into a `Program`."""
