"""However a command ends: one line, the right exit code, and a traceback for defects alone."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner, Result

from stepwell import errors
from stepwell.cli import _root, main


def fail_with(error: BaseException) -> Result:
    root = _root.Root(name="stepwell")

    @root.command("fail")
    def fail() -> None:
        raise error

    return CliRunner().invoke(root, ["fail"])


@pytest.mark.parametrize("kind", [getattr(errors, name) for name in errors.__all__])
def test_every_error_of_the_sdk_is_one_line_and_exit_code_1(kind: type[errors.StepwellError]) -> None:
    result = fail_with(kind("rows must be below 4;\n got \x1b[31m7"))

    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("stepwell: error: rows must be below 4; got [31m7")
    assert result.stderr.count("\n") == 1


def test_an_unknown_outcome_says_where_to_look() -> None:
    result = fail_with(errors.DeadlineExceededError("timeout_s has passed", outcome="unknown"))

    assert "stepwell sessions show" in result.stderr


def test_a_settled_outcome_needs_no_look() -> None:
    result = fail_with(errors.UnavailableError("no server", outcome="not_applied"))

    assert result.stderr == "stepwell: error: no server\n"


def test_a_file_that_cannot_be_written_is_one_line() -> None:
    result = fail_with(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out.safetensors"))

    assert result.exit_code == 1
    assert result.stderr == "stepwell: error: out.safetensors: No space left on device\n"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), click.Abort()])
def test_an_interrupt_is_quiet_and_130(error: BaseException) -> None:
    result = fail_with(error)

    assert (result.exit_code, result.output) == (130, "")


def test_a_broken_pipe_is_quiet_and_141() -> None:
    result = fail_with(BrokenPipeError(errno.EPIPE, "Broken pipe"))

    assert (result.exit_code, result.output) == (141, "")


def test_a_reader_that_leaves_makes_no_noise() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)  # before it begins: what it writes while there is a reader would fit in the pipe
    try:
        done = subprocess.run(
            [sys.executable, "-m", "stepwell", "--help"],
            stdout=write_end,
            stderr=subprocess.PIPE,
            timeout=200,
            check=False,
        )
    finally:
        os.close(write_end)

    assert (done.stderr, done.returncode) == (b"", 141)


def test_a_defect_is_not_hidden() -> None:
    result = fail_with(RuntimeError("a defect"))

    assert isinstance(result.exception, RuntimeError)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["stpe"], "No such command 'stpe'"),
        (["--sever", "x"], "No such option"),
        (["step"], "Missing argument 'SESSION'"),
        (["step", "s"], "Missing option '--input'"),
        (["step", "s", "--input", "[[1]", "--json"], "the value is not JSON"),
        (["step", "s", "--input", "no.npy"], "cannot read no.npy: No such file or directory"),
        (["step", "s", "--input", "[[1]]", "--batch-size", "0"], "0 is not in the range x>=1"),
        (["step", "s", "--input", "[[1]]", "--batch-size", "2"], "--batch-size must be given with --open"),
        (["step", "s", "--input", "[[1]]", "--max-idle-s", "1h"], "--max-idle-s must be given with --open"),
        (["step", "s", "--input", "[[1]]", "--open", "a", "--max-idle-s", "-1"], "a number of seconds"),
        (["step", "s", "--input", "[[1]]", "--open", "a", "--model", "b"], "got b and a"),
        (["step", "s", "--input", "[[1]]", "--outputs", "some"], "'some' is not one of"),
        (["state", "reset", "s"], "no command 'reset': stepwell state set s --zero sets the initial state"),
        (["state", "set", "s"], "either a FILE.safetensors or --zero"),
        (["state", "set", "s", __file__, "--zero"], "either a FILE.safetensors or --zero"),
        (["state", "set", "s", "--zero", "--rows", "0,x"], "'0,x' must be row numbers"),
        (["state", "set", "s", "--zero", "--rows", ""], "must be row numbers"),
        (["state", "set", "s", "gone.safetensors"], "does not exist"),
        (["state", "set", "s", __file__], "State.save"),
        (["sessions", "close"], "give either sessions, a filter"),
        (["sessions", "close", "s"], "pass --yes"),
        (["models", "--timeout-s", "0"], "must be above 0"),
        (["models", "--timeout-s", "nan"], "a time such as 500ms, 90s or 1h30m"),
        (["models", "--server", "nowhere"], "--server"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(arguments: list[str], says: str) -> None:
    result = CliRunner().invoke(main, arguments)

    assert says in result.stderr
    assert result.stderr.startswith("stepwell: error: ")
    assert result.stderr.count("\n") == 1
    assert (result.exit_code, result.stdout) == (2, "")


def test_a_variable_that_cannot_be_read_is_named() -> None:
    result = CliRunner().invoke(main, ["models"], env={"STEPWELL_SERVER": "nowhere"})

    assert result.exit_code == 2
    assert "STEPWELL_SERVER" in result.stderr


@pytest.mark.parametrize("arguments", [[], ["sessions"], ["state"]])
def test_a_group_alone_shows_its_help(arguments: list[str]) -> None:
    result = CliRunner().invoke(main, arguments)

    assert result.exit_code == 2
    assert "Commands:" in result.output


def test_text_that_the_terminal_cannot_write_is_escaped() -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "stepwell", "models", "--server", "5€"],
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )

    assert finished.returncode == 2
    assert "got '5\\u20ac'" in finished.stderr


def test_arguments_that_are_no_text_are_refused() -> None:
    for command in (["sessions", "show"], ["sessions", "list", "--prefix"], ["sessions", "list", "--model"]):
        result = CliRunner().invoke(main, [*command, "user-\udcff", "--timeout-s", "0.5"])

        assert result.exit_code == 1
        assert result.stderr.startswith("stepwell: error: ")


_CLOSED = """
import os
from stepwell.cli import main
nowhere = os.stat(os.devnull).st_rdev
try:
    main(["--version"])
except SystemExit as ended:
    os._exit(ended.code or sum(os.fstat(number).st_rdev != nowhere for number in range(3)))
"""


def test_the_descriptor_of_a_closed_stream_is_for_no_other_file() -> None:
    closed = ["sh", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, _CLOSED]
    assert subprocess.run(closed, timeout=200, check=False).returncode == 0
