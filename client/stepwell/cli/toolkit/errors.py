"""Every expected error becomes one line on stderr and an exit code; none becomes a traceback."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator

import click
from click.exceptions import Exit

SERVER_ERROR = 1
"""Exit code: the server rejected the call, could not be reached, or did not answer in time."""
USAGE_ERROR = 2
"""Exit code: the command line, or a file that it names, is invalid."""
INTERRUPTED = 130
"""Exit code: Ctrl-C, as in shells (128 + SIGINT)."""
BROKEN_PIPE = 141
"""Exit code: the reader of stdout has closed it, as in shells (128 + SIGPIPE)."""

_STDERR = 2

HELP_SHOWN: type[Exception] = getattr(click.exceptions, "NoArgsIsHelpError", click.exceptions.Exit)
"""The exception with which click shows the help of a group without a command (since 8.2; before, click just exits)."""


class Failure(Exception):
    """An error that ends the program with one line on stderr.

    Args:
        message: The error, for people. Line breaks and control characters in it become spaces.
        exit_code: The program's exit code.
    """

    def __init__(self, message: str, exit_code: int = USAGE_ERROR) -> None:
        super().__init__(message)
        self.message = one_line(message)
        self.exit_code = exit_code


def one_line(text: str) -> str:
    """Replaces every run of spaces and control characters by one space."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Report expected errors of the body as one line and an exit code; unexpected ones are raised."""
    try:
        yield
        sys.stdout.flush()
    except (KeyboardInterrupt, click.Abort):
        raise Exit(INTERRUPTED) from None
    except BrokenPipeError:
        discard_stdout()
        raise Exit(BROKEN_PIPE) from None
    except (Exit, HELP_SHOWN):
        raise
    except Exception as error:
        failure = as_failure(error)
        if failure is None:
            raise
        click.echo(f"stepwell: error: {failure.message}", err=True)
        raise Exit(failure.exit_code) from None


def as_failure(error: Exception) -> Failure | None:
    """The error in the form in which it is reported; None for a defect."""
    from stepwell.errors import StepwellError

    if isinstance(error, Failure):
        return error
    if isinstance(error, click.ClickException):
        return Failure(usage_text(error), USAGE_ERROR)
    if isinstance(error, OSError):
        text = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        return Failure(text, SERVER_ERROR)
    if isinstance(error, StepwellError):
        return Failure(f"{error}{outcome_hint(error)}", SERVER_ERROR)
    return None


def usage_text(error: click.ClickException) -> str:
    """The error's message, with the command's help option if click knows the command."""
    message = error.format_message()
    context = error.ctx if isinstance(error, click.UsageError) else None
    if context is None:
        return message
    return f"{message.rstrip('.')} (see '{context.command_path} --help')"


def outcome_hint(error: Exception) -> str:
    """Where to look if a change may have been applied; this program cannot repeat it."""
    if getattr(error, "outcome", None) != "unknown":
        return ""
    return "; the change may have been applied: check the revision with 'stepwell sessions show'"


def open_closed_streams() -> None:
    """Opens stdin, stdout and stderr to nowhere if the caller has closed them.

    Otherwise the next file or connection gets the free descriptor, and the output of libraries.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= _STDERR:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdin = sys.stdin or open(0)  # noqa: SIM115 - it stays open
    sys.stdout = sys.stdout or open(1, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(_STDERR, "w")  # noqa: SIM115


def accept_any_text() -> None:
    """Makes stdout and stderr escape characters that their encoding lacks, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def discard_stdout() -> None:
    """Discards the buffered output, so that the interpreter's last flush is quiet."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
