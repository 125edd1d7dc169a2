"""Why a model cannot be served."""

from __future__ import annotations

import re

from stepwell_server.errors import MAX_MESSAGE_CHARACTERS, shorten

_MAX_NAME_CHARACTERS, _MAX_GIST_CHARACTERS = 100, 1000
REPORT = "Report it with the config.json in the file, which is a zip archive, and what the log says"
"""The way on where the fault is not the user's."""


class ModelError(Exception):
    """The model cannot be served. The message is one line for people."""

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(shorten(message, MAX_MESSAGE_CHARACTERS))
        self.details = details
        """More for the log: the last lines that the compiling process wrote, or empty."""


class DataError(ModelError):
    """The user's sequences cannot be used: it is not the model that is at fault."""


class NotCausalError(ModelError):
    """T calls of one step are not one call over T steps."""


def quoted(name: str) -> str:
    """Return how a message shows the name of a layer, an input or an output, which a model's file may have of any length."""
    return repr(shorten(name, _MAX_NAME_CHARACTERS))


def gist(error: Exception | str) -> str:
    """Return one line, of 1,000 characters at most, that says what went wrong, out of what may be pages.

    Keras sets the message itself in bold (which a KeyError shows as a literal), below a line that only says where it happened. TensorFlow adds
    how its node is written, which tells nobody anything.
    """
    text = str(error)
    if isinstance(error, KeyError) and error.args:
        text = str(error.args[0])  # As text it is a literal of Python's.
    bold = re.search(r"(?:\x1b|\\x1b)\[1m(.+?)(?:\x1b|\\x1b)\[0m", text, re.DOTALL)
    if bold:
        text = bold[1]
    elif "in user code:" in text:
        text = text.strip().splitlines()[-1]
    elif found := re.search(r"\n([^\n]+)\n\s*\[\[\{\{node", text):
        text = found[1]  # Of an error while a graph runs: below where it was detected.
    text = re.sub(r"\{\{function_node [^}]*\}\}\s*|\s*\[Op:\w+\].*", "", text)
    text = re.sub(r"\s*Received: inputs?=.*", "", text, flags=re.DOTALL)  # Tensors of a trace.
    text = re.sub(r" for '\{\{node .*", "", text, flags=re.DOTALL).replace(" with name 'None'", "")
    return shorten(
        next((line.strip() for line in text.splitlines() if line.strip()), "no message"), _MAX_GIST_CHARACTERS
    )
