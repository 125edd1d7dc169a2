"""Messages between a server and its compiling processes: whole, bounded, or none."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from stepwell_server.compile.host import wire
from stepwell_server.compile.host.wire import Channel, GarbledError
from support.processes import descriptors


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
    monkeypatch.setattr(wire, "MAX_BYTES", 1000)
    ours, channel = pair
    ours.sendall(b"x" * 1001)
    with pytest.raises(GarbledError):
        channel.receive()


def test_who_waits_checks_meanwhile_also_in_the_middle_of_a_message(
    pair: tuple[socket.socket, Channel],
) -> None:
    class OverError(Exception):
        pass

    def check() -> None:
        raise OverError

    ours, channel = pair
    for sent in (b"", b'{"stage": "tr'):
        ours.sendall(sent)
        with pytest.raises(OverError):
            channel.receive(check)
    ours.sendall(b'ace"}\n')
    assert channel.receive() == {"stage": "trace"}


def test_open_files_that_come_with_a_message_are_none(pair: tuple[socket.socket, Channel]) -> None:
    ours, channel = pair
    read, write = os.pipe()
    before = descriptors()
    socket.send_fds(ours, [b'{"done": 1}\n'], [write])
    assert channel.receive() == {"done": 1}
    assert descriptors() == before
    os.close(read)
    os.close(write)
