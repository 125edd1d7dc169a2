"""Why a model cannot be served."""

from __future__ import annotations

import re

from stepwell_server.errors import MAX_MESSAGE_CHARACTERS, shorten

_MAX_NAME_CHARACTERS, _MAX_GIST_CHARACTERS = 100, 1000
REPORT = "Report it with the config.json in the file, which is a zip archive, and the log"
"""The advice for a defect of Stepwell."""


class ModelError(Exception):
    """The model cannot be served. The message is one line."""

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(shorten(message, MAX_MESSAGE_CHARACTERS))
        self.details = details
        """Details for the log: the last lines that the compiling process wrote, or empty."""


class DataError(ModelError):
    """The user's sequences cannot be used; the model is not at fault."""


class NotCausalError(ModelError):
    """T calls of one step do not equal one call over T steps."""


def quoted(name: str) -> str:
    """Quote the name of a layer, input or output for a message. Names in a model's file may have any length."""
    return repr(shorten(name, _MAX_NAME_CHARACTERS))


def gist(error: Exception | str) -> str:
    """Shorten an error, which may be pages long, to one line of at most 1,000 characters.

    Keras prints the message in bold (which a KeyError shows as a literal), below a line with the location. TensorFlow
    appends the definition of its node, which does not help.
    """
    text = str(error)
    if isinstance(error, KeyError) and error.args:
        text = str(error.args[0])  # str() would return a Python literal.
    bold = re.search(r"(?:\x1b|\\x1b)\[1m(.+?)(?:\x1b|\\x1b)\[0m", text, re.DOTALL)
    if bold:
        text = bold[1]
    elif "in user code:" in text:
        text = text.strip().splitlines()[-1]
    elif found := re.search(r"\n([^\n]+)\n\s*\[\[\{\{node", text):
        text = found[1]  # An error while a graph runs: the message follows the location.
    text = re.sub(r"\{\{function_node [^}]*\}\}\s*|\s*\[Op:\w+\].*", "", text)
    text = re.sub(
        r"\s*Received: inputs?=.*", "", text, flags=re.DOTALL
    )  # Tensors of a trace are not helpful.
    text = re.sub(r" for '\{\{node .*", "", text, flags=re.DOTALL).replace(" with name 'None'", "")
    return shorten(
        next((line.strip() for line in text.splitlines() if line.strip()), "no message"), _MAX_GIST_CHARACTERS
    )
