"""Lines of the log, as text and as JSON, and values that try to forge them."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from typing_extensions import override

from stepwell_server.errors import Internal
from stepwell_server.logs import MAX_WAITING_LINES, Log, LogFormat, configure
from support.engine.fake_executor import BROKEN
from support.engine.harness import running, x


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root, ours = logging.getLogger(), logging.getLogger("stepwell_server")
    before = (root.handlers[:], root.level, ours.level, Log.is_debug)
    yield io.StringIO()
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    ours.setLevel(before[2])
    Log.is_debug = before[3]


def _write(log_format: LogFormat, stream: io.StringIO) -> None:
    configure("info", log_format, stream)
    log = Log("test")
    log.debug("not written")
    log.info("session opened", session="user 42", model="forecast", rows=3, seconds=0.123456789)
    try:
        raise ValueError("what\nhappened")
    except ValueError as error:
        log.defect("internal error", error, error_id="1d")
    logging.getLogger("other").warning("several\nlines")


def test_text_is_one_line_per_event_with_its_facts(stream: io.StringIO) -> None:
    _write("text", stream)
    lines = stream.getvalue().splitlines()
    assert lines[0].split(" ", 1)[1] == (
        'info session opened session="user 42" model=forecast rows=3 seconds=0.123457'
    )
    assert lines[1].split(" ", 1)[1] == "error internal error error_id=1d"
    assert lines[2] == "Traceback (most recent call last):"
    assert lines[-1].split(" ", 1)[1] == "warning several\\nlines logger=other"


def test_json_is_one_object_per_line(stream: io.StringIO) -> None:
    _write("json", stream)
    opened, failed, other = (json.loads(line) for line in stream.getvalue().splitlines())
    assert opened.pop("time").endswith("Z")
    assert opened == {
        "level": "info",
        "event": "session opened",
        "session": "user 42",
        "model": "forecast",
        "rows": 3,
        "seconds": 0.123456789,
    }
    assert failed["error_id"] == "1d"
    assert failed["traceback"].endswith("happened")
    assert (other["event"], other["logger"]) == ("several\nlines", "other")


@pytest.mark.usefixtures("stream")
def test_a_reader_that_stops_delays_nobody_and_finds_out_what_it_missed() -> None:
    reading, writing = os.pipe()
    with open(reading, "rb", buffering=0) as reader, open(writing, "w") as writer:
        os.set_blocking(reading, False)
        configure("info", "text", writer)
        log = Log("test")
        room, sent = fcntl.fcntl(writing, fcntl.F_GETPIPE_SZ), MAX_WAITING_LINES
        while room > 0:
            log.info("event", number=sent, much="x" * 9000)
            sent, room = sent + 1, room - 9000
        for number in range(sent, sent + MAX_WAITING_LINES + 5):
            log.info("event", number=number, much="é")  # would block for ever
        found = b""
        while b"info again\n" not in found:
            found += reader.read(1 << 20) or b""
            log.info("again")
        lines = found.decode().splitlines()
    numbers = [int(line.partition("number=")[2].split()[0]) for line in lines if "number=" in line]
    assert numbers == list(range(MAX_WAITING_LINES, numbers[-1] + 1)), "whole, in order, none twice"
    dropped = [line for line in lines if "log lines were dropped" in line]
    assert [line.split(" ", 1)[1] for line in dropped] == [
        f"warning log lines were dropped count={sent + MAX_WAITING_LINES + 5 - numbers[-1] - 1}"
    ]
    assert lines[-1].endswith("info again")


@pytest.mark.usefixtures("stream")
def test_a_reader_that_is_gone_harms_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    reading, writing = os.pipe()
    with open(writing, "w") as writer:
        configure("info", "text", writer)
        os.close(reading)
        Log("test").info("event")
    assert "BrokenPipeError" in capsys.readouterr().err


@pytest.mark.usefixtures("stream")
def test_lines_of_a_full_disk_are_kept_or_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_descriptor: int, _line: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with (tmp_path / "log").open("w") as writer:
        configure("info", "text", writer)
        log = Log("test")
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            for number in range(MAX_WAITING_LINES + 5):
                log.info("event", number=number)
        log.info("again")
        log.info("twice", value=_Unprintable())
        log.info("done")
    lines = [line.split(" ", 1)[1] for line in (tmp_path / "log").read_text().splitlines()]
    assert lines[:MAX_WAITING_LINES] == [f"info event number={n}" for n in range(MAX_WAITING_LINES)]
    assert lines[MAX_WAITING_LINES:] == ["warning log lines were dropped count=5", "info again", "info done"]
    assert "No space left" in (err := capsys.readouterr().err)
    assert "no text" in err


class _Unprintable:
    @override
    def __str__(self) -> str:
        raise ValueError("no text")


@pytest.mark.parametrize("value", ["a\nb", 'say "x"', "a=b", "", "\x1b[31m"])
def test_text_values_cannot_forge_lines_or_fields(stream: io.StringIO, value: str) -> None:
    configure("info", "text", stream)
    Log("test").info("event", value=value)
    (line,) = stream.getvalue().splitlines()
    assert line.isprintable()
    assert json.loads(line.partition("value=")[2]) == value


async def test_the_id_of_an_engine_s_defect_is_in_the_printed_line(stream: io.StringIO) -> None:
    configure("info", "text", stream)
    async with running() as at:
        await at.open("a")
        (error,) = await at.submit("a", x(1) * 0 + BROKEN).all()
    assert isinstance(error, Internal)
    (line,) = [line for line in stream.getvalue().splitlines() if error.error_id in line]
    assert line.split(" ", 1)[1] == f"error a pass raised error_id={error.error_id} model=plain"
    assert "Traceback" in stream.getvalue()


async def test_the_id_of_a_store_s_defect_is_in_the_printed_line(
    stream: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure("info", "json", stream)

    def breaks(*_arguments: object) -> None:
        raise RuntimeError("a secret detail")

    async with running(resident_rows=1) as at:
        await at.open("a")
        await at.open("b")
        monkeypatch.setattr(at.store, "get_many", breaks)
        (error,) = await at.submit("a", x(1)).all()
        monkeypatch.undo()
    assert isinstance(error, Internal)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    (line,) = [line for line in lines if line.get("error_id") == error.error_id]
    assert (line["level"], line["event"]) == ("error", "the store raised")
    assert "a secret detail" in line["traceback"]


def test_the_level_reaches_engine_and_store(stream: io.StringIO) -> None:
    configure("debug", "text", stream)
    Log("engine.loop").debug("inputs refused", model="forecast")
    logging.getLogger("stepwell_server.store.disk").debug("a segment is full")
    first, second = stream.getvalue().splitlines()
    assert first.endswith("debug inputs refused model=forecast")
    assert second.endswith("debug a segment is full logger=stepwell_server.store.disk")
