"""The Valkey of the tests: what is killed, paused or failed over behaves as the fault tests take for granted."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from support.servers.resp import Connection, ReplyError
from support.servers.valkey_servers import HOST, NoValkey, Port, Valkey, paused


def test_a_paused_one_answers_nobody_until_it_goes_on() -> None:
    with Valkey() as valkey, valkey.connect() as mine:
        with paused(valkey):
            mine.send("PING")
            mine._socket.settimeout(0.2)
            with pytest.raises(TimeoutError):
                mine._socket.recv(1, socket.MSG_PEEK)
            mine._socket.settimeout(100.0)
        assert mine.receive() == b"PONG"


def test_a_full_one_refuses_and_a_password_is_asked_for() -> None:
    with Valkey(maxmemory=1, password="secret") as valkey:
        with pytest.raises(ReplyError, match="OOM"):
            valkey.ask("SET", "a", "1")
        with Connection(HOST, valkey.port) as stranger, pytest.raises(ReplyError, match="NOAUTH"):
            stranger.ask("GET", "a")


def test_what_does_not_start_says_why() -> None:
    with pytest.raises(AssertionError, match="no-such-setting"), Valkey(options=("--no-such-setting", "1")):
        pass


def test_a_missing_program_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    with pytest.raises(NoValkey, match="valkey-server is not installed; `make test` installs it"):
        Valkey()


def test_a_port_is_nobody_elses_though_nobody_listens() -> None:
    port = Port()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other, pytest.raises(OSError, match="in use"):
        other.bind((HOST, port.number))
    with socket.create_server((HOST, port.number)):
        pass
    port.free()
