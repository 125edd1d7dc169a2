"""Tensors, states and descriptions of models as values."""
