"""Messages between a server and its compiling processes: whole, bounded, or none."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from stepwell_server.compile.host import wire
from stepwell_server.compile.host.wire import Channel, GarbledError


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, Channel]]:
    ours, theirs = socket.socketpair()
    channel = Channel(theirs)
    yield ours, channel
    ours.close()
    channel.close()


def test_messages_come_whole_and_in_their_order(pair: tuple[socket.socket, Channel]) -> None:
    ours, channel = pair
    ours.sendall(b'{"stage": "load"}\n{"done": ')
    ours.sendall(b"1}\n")
    assert [channel.receive(), channel.receive()] == [{"stage": "load"}, {"done": 1}]
    ours.sendall(b'{"stage": "tr')
    ours.close()
    assert channel.receive() is None  # it ended in the middle of one


@pytest.mark.parametrize("line", [b"no message", b"[" * 100_000, b"7", b"\xff", b'"text"'])
def test_what_is_no_message_is_told_apart(line: bytes, pair: tuple[socket.socket, Channel]) -> None:
    ours, channel = pair
    ours.sendall(line + b"\n")
    with pytest.raises(GarbledError):
        channel.receive()


def test_a_message_has_an_end(pair: tuple[socket.socket, Channel], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MOST_BYTES", 1000)
    ours, channel = pair
    ours.sendall(b"x" * 1001)
    with pytest.raises(GarbledError):
        channel.receive()


def test_files_go_with_messages(pair: tuple[socket.socket, Channel]) -> None:
    ours, channel = pair
    read, write = os.pipe()
    Channel(ours).send({"fork": {}}, [write])
    assert channel.receive() == {"fork": {}}
    (came,) = channel.files()
    assert channel.files() == []
    os.write(came, b"x")
    assert os.read(read, 1) == b"x"
    for file in (read, write, came):
        os.close(file)
