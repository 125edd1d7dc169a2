"""Tapes: the inputs, outputs and states of a session over time."""
