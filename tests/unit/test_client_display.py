"""What a terminal and a notebook show of values: enough, escaped, and never too much."""

from __future__ import annotations

import base64
import dataclasses
import datetime as dt
import html.parser
import re
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import stepwell
from stepwell import ModelInfo, ServerInfo, SessionInfo, TensorInfo
from stepwell._core.group_core import GroupCore
from stepwell._core.group_tracker import GroupTracker
from stepwell._core.tracker import SessionTracker
from stepwell._state import display
from stepwell._state.display import Listing
from stepwell._state.state import State
from stepwell.group import SessionGroup
from stepwell.session import Session
from stepwell.v1 import sessions_pb2

EVIL = "<script>alert('x')</script>&"
NOON = dt.datetime(2026, 11, 26, 12, 0, 1, 5, tzinfo=dt.UTC)


class Checked(html.parser.HTMLParser):
    """Balanced tags, and the text between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag != "img":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def model(name: str = "forecast", tensors: int = 1) -> ModelInfo:
    states = tuple(TensorInfo(f"lstm_{i}/h", "float32", (16,), temporal=False) for i in range(tensors))
    one = (TensorInfo("x", "float32", (3,), temporal=True),)
    return ModelInfo(name, "ab" * 32, one, one, states, "litert", "it can", (), 64, 2)


def session(session_id: str = "user-42") -> SessionInfo:
    return SessionInfo(session_id, "forecast", "ab" * 32, 4, 7, 30, NOON, NOON, resident=True)


def state(tensors: int = 1, units: int = 16) -> State:
    values = np.linspace(-1, 1, 2 * units, dtype=np.float32).reshape(2, units)
    return State(
        {f"lstm_{i}/h": values for i in range(tensors)}, model="forecast", fingerprint="f", batch_size=2
    )


def test_text_says_what_people_look_for() -> None:
    assert repr(model()) == (
        "ModelInfo('forecast', inputs=[x: float32(3,)], outputs=[x: float32(3,)], state=[lstm_0/h: float32(16,)], "
        "executor='litert', sessions=2)"
    )
    assert repr(session()) == (
        "SessionInfo('user-42', model='forecast', batch_size=4, revision=7, position=30, "
        "last used 2026-11-26 12:00:01 UTC, resident)"
    )
    assert (
        repr(ServerInfo("native", (model(), model("b"))))
        == "ServerInfo(front='native', models=[forecast, b])"
    )
    assert "lstm_0/h: float32(2, 16)" in repr(state())
    with stepwell.connect("127.0.0.1:1") as client:
        assert repr(client) == "Client('127.0.0.1:1')"
    assert repr(stepwell.aio.connect("127.0.0.1:1")) == "AsyncClient('127.0.0.1:1')"


def test_lists_are_lists_that_are_shown_as_tables() -> None:
    plain = [session(f"user-{i}") for i in range(3)]
    listing = Listing(plain)
    assert listing == plain
    assert plain == listing
    assert repr(listing) == "[" + ",\n ".join(map(repr, plain)) + "]"
    assert isinstance(listing[:2], Listing)
    assert listing[:2] == plain[:2]
    assert listing[0] is plain[0]
    text = Checked(listing._repr_html_())
    assert text.tags.count("tr") == 4
    assert {"session", "user-1", "2026-11-26 12:00:01 UTC"} <= set(text.words)
    assert repr(Listing()) == "[]"
    assert "none" in Checked(Listing[SessionInfo]()._repr_html_()).words


def values() -> dict[str, Any]:
    """What is shown, whatever comes from outside being hostile."""
    return {
        "model": model(EVIL),
        "models": Listing([model(EVIL)]),
        "session": session(EVIL),
        "sessions": Listing([session(EVIL)]),
        "server": ServerInfo(EVIL, (model(EVIL),)),
        "state": State({EVIL: np.ones((1, 2))}, model=EVIL, fingerprint="f", batch_size=1),
    }


@pytest.mark.parametrize("kind", values())
def test_what_comes_from_outside_is_escaped(kind: str) -> None:
    shown = values()[kind]._repr_html_()
    assert "<script" not in shown
    assert any(EVIL[:7] in word for word in Checked(shown).words)


def test_handles_show_what_they_know() -> None:
    with stepwell.connect("127.0.0.1:1") as client:
        opened = sessions_pb2.Session(
            session_id=EVIL, model="forecast", batch_size=1, revision=7, position=30
        )
        one = Session(client._driver, SessionTracker(opened), owned=False)
        one._closed = True
        tracker = GroupTracker("forecast", "f", 1, [f"{EVIL}{i}" for i in range(3)], [1, 5, 1])
        group = SessionGroup(client._driver, GroupCore(client._core, tracker), owned=False)
    text = one._repr_html_()
    assert "<script" not in text
    assert {"Session (closed)", "forecast", "7", "30"} <= set(Checked(text).words)
    text = group._repr_html_()
    assert "<script" not in text
    assert {"SessionGroup", "3", "1 to 5", "0"} <= set(Checked(text).words)
    Checked(group[[]]._repr_html_())
    with stepwell.connect("127.0.0.1:1") as client:
        assert {"Client", "127.0.0.1:1", "30 s", "no"} <= set(Checked(client._repr_html_()).words)
    assert "Client (closed)" in Checked(client._repr_html_()).words
    assert "AsyncClient" in Checked(stepwell.aio.connect("127.0.0.1:1")._repr_html_()).words


LONG: dict[str, Callable[[], Any]] = {
    "model": lambda: model("m" * 9_000, tensors=10_000),
    "server": lambda: ServerInfo("native", many_models()),
    "models": lambda: Listing(many_models()),
    "sessions": lambda: Listing([session("s" * 200) for _ in range(10_000)]),
    "state": lambda: state(tensors=1_000, units=1_000)[:1],
}


def many_models() -> tuple[ModelInfo, ...]:
    one = model(tensors=1_000)
    return tuple(dataclasses.replace(one, name=f"m{i}") for i in range(1_000))


@pytest.mark.parametrize("kind", LONG)
def test_length_is_bounded_and_says_what_is_left_out(kind: str) -> None:
    value = LONG[kind]()
    assert len(repr(value)) < 20_000
    shown = value._repr_html_()
    Checked(shown)
    assert len(shown) < 100_000
    assert re.search(r"\.\.\. \d+ more", shown)
    assert isinstance(value, ModelInfo | State) or re.search(r"\.\.\. \d+ more", repr(value))


def test_a_wide_tensor_is_shown_in_short() -> None:
    value = state(units=100_000)
    assert len(repr(value)) < 20_000
    assert len(value._repr_html_()) < 100_000


def pixels(picture: str) -> list[list[tuple[int, int, int]]]:
    """The pixels of the picture in a page: a reader of PNG for what `_png` writes, which checks each sum."""
    found = re.search(r"base64,([^']+)'", picture)
    assert found
    data = base64.b64decode(found[1])
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length]) == (zlib.crc32(kind + body),)
        chunks[kind] = body
        at += 12 + length
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    raw = zlib.decompress(chunks[b"IDAT"])
    lines = [raw[i * (1 + 3 * width) + 1 : (i + 1) * (1 + 3 * width)] for i in range(height)]
    return [[(line[i], line[i + 1], line[i + 2]) for i in range(0, 3 * width, 3)] for line in lines]


def test_the_picture_shows_sign_size_and_what_is_no_number() -> None:
    tensors = {"h": np.array([[-2.0, 0.0, 2.0], [1.0, np.nan, np.inf]], np.float32)}
    shown = display.tensors_html("", tensors)
    assert pixels(shown) == [
        [(0, 0, 255), (255, 255, 255), (255, 0, 0)],
        [(255, 128, 128), (128, 128, 128), (255, 0, 0)],
    ]
    assert {"float32", "(2, 3)", "nan"} <= set(Checked(shown).words)
    assert pixels(display.tensors_html("", {"b": np.array([True, False])})) == [
        [(255, 0, 0)],
        [(255, 255, 255)],
    ]
    assert len(pixels(display.tensors_html("", {"h": np.ones((9, 1_000))}))) == 4
    assert "<img" not in display.tensors_html("", {"h": np.ones((0, 3))})
