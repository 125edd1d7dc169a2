"""Lines of the log, as text and as JSON, and values that try to forge them."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from stepwell_server.errors import Internal
from stepwell_server.logs import Log, LogFormat, configure
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
