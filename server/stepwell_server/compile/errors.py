"""Why a model cannot be served."""

from __future__ import annotations


class ModelError(Exception):
    """The model cannot be served. The message is one line for people."""

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details
        """More for the log: the last lines that the compiling process wrote, or empty."""


class NotCausalError(ModelError):
    """T calls of one step are not one call over T steps."""
