"""The Valkey of the tests: what is killed, paused or failed over behaves as the fault tests take for granted."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from support.certificates import Authority
from support.processes import is_there
from support.servers.resp import Connection, ReplyError
from support.servers.valkey_servers import HOST, Cluster, NoValkey, Port, Sentinels, Valkey, paused, until


def test_what_is_kept_is_there_after_a_kill_on_the_same_port() -> None:
    with Valkey(append="always") as valkey:
        valkey.ask("SET", "a", b"\r\n\0")
        port = valkey.port
        valkey.restart()
        assert valkey.port == port
        assert valkey.ask("GET", "a") == b"\r\n\0"
        assert valkey.ask("MGET", "a", "b") == [b"\r\n\0", None]
        pid, folder = valkey.pid, valkey.folder
    assert not is_there(pid)
    assert not folder.exists()


def test_without_a_file_a_restart_begins_empty() -> None:
    with Valkey(append="") as valkey:
        valkey.ask("SET", "a", "1")
        valkey.stop()
        assert not valkey.is_running
        valkey.start()
        assert valkey.ask("GET", "a") is None


def test_a_paused_one_answers_nobody_until_it_goes_on() -> None:
    with Valkey() as valkey, valkey.connect() as mine:
        with paused(valkey):
            mine.send("PING")
            mine._socket.settimeout(0.2)
            with pytest.raises(TimeoutError):
                mine._socket.recv(1, socket.MSG_PEEK)
            mine._socket.settimeout(100.0)
        assert mine.receive() == b"PONG"


def test_a_paused_one_can_be_killed() -> None:
    with Valkey() as valkey:
        pid = valkey.pid
        valkey.pause()
    assert not is_there(pid)


def test_a_full_one_refuses_and_a_password_is_asked_for() -> None:
    with Valkey(maxmemory=1, password="secret") as valkey:
        with pytest.raises(ReplyError, match="OOM"):
            valkey.ask("SET", "a", "1")
        with Connection(HOST, valkey.port) as stranger, pytest.raises(ReplyError, match="NOAUTH"):
            stranger.ask("GET", "a")


def test_tls(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    with Valkey(tls=authority.issue(), ca=authority.cert) as valkey:
        assert valkey.ask("ECHO", "a") == b"a"
        assert valkey.url().startswith("valkeys://127.0.0.1:")
        with (
            Connection(HOST, valkey.port, timeout_s=100.0) as plain,
            pytest.raises(ConnectionError),
        ):
            plain.ask("PING")


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


@pytest.mark.slow
def test_a_replica_becomes_the_primary_when_that_is_killed() -> None:
    with Sentinels() as watched:
        old = watched.primary()
        old.ask("SET", "a", "1")
        assert old.ask("WAIT", 1, 0) == 1
        old.kill()
        new = watched.fail_over()
        assert new is not old
        assert new.ask("GET", "a") == b"1"
        old.start()  # the old primary comes back as a replica
        until(lambda: old.role() == "slave", "it stays a primary", watched.sentinels[0].log)


@pytest.mark.slow
def test_a_cluster_shares_the_slots_and_goes_on_without_a_primary() -> None:
    with Cluster(replicas=1) as cluster:
        owners = {cluster.primary_of(f"{{{i}}}").port for i in range(100)}
        assert owners == {one.port for one in cluster.primaries}
        assert cluster.url("&prefix=t:").endswith("/0?cluster=true&prefix=t:")
        old = cluster.primary_of("a")
        old.ask("SET", "a", "1")
        assert old.ask("WAIT", 1, 0) == 1
        old.kill()
        new = cluster.fail_over(old)
        cluster.wait_ok()
        assert cluster.primary_of("a") is new
        assert new.ask("GET", "a") == b"1"


@pytest.mark.slow
def test_sentinels_find_out_by_themselves() -> None:
    with Sentinels(down_after_ms=1000) as watched:
        old = watched.primary()
        old.kill()
        assert watched.wait_fail_over(old).ask("PING") == b"PONG"
