"""Servers that share a Valkey list each other, those that stop leave, and those that are killed are missing."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from typing import Any

import pytest
from click.testing import CliRunner

import stepwell
from stepwell.cli import main
from stepwell_server.process.replicas import EXPIRY_S
from support.servers.server_process import ServerProcess, serve
from support.servers.valkey_servers import Valkey

TIMEOUT_S = 100.0


@pytest.fixture(scope="module")
def valkey() -> Iterator[Valkey]:
    with Valkey(append="always") as server:
        yield server


def shares(valkey: Valkey, prefix: str, *arguments: str) -> ServerProcess:
    return serve("--store", valkey.url(f"?prefix={prefix}:"), *arguments)


def until(
    client: stepwell.Client, is_right: Callable[[stepwell.ServerActivity], bool]
) -> stepwell.ServerActivity:
    """The first report that is right."""
    end = time.monotonic() + TIMEOUT_S
    with client.watch_server(interval_s=0.2) as watch:
        for activity in watch:
            if is_right(activity):
                return activity
            assert time.monotonic() < end, (activity.replicas, activity.warnings)
    raise AssertionError("the watch ended")


def states(activity: stepwell.ServerActivity) -> Mapping[str, str]:
    return {one.address: one.state for one in activity.replicas}


def test_servers_of_a_store_list_each_other_until_they_stop(valkey: Valkey) -> None:
    with (
        shares(valkey, "list", "--http-listen", "127.0.0.1:0") as one,
        stepwell.connect(one.address) as a,
    ):
        alone = until(a, lambda it: bool(it.replicas))
        assert states(alone) == {one.address: "ready"}
        with shares(valkey, "list") as other, stepwell.connect(other.address) as b:
            b.open_session("forecast")
            wanted = {one.address: "ready", other.address: "ready"}
            (first, second) = until(a, lambda it: states(it) == wanted).replicas
            (here, there) = until(b, lambda it: states(it) == wanted).replicas
            assert (first.id, second.id) == (here.id, there.id) == (a.server_info().id, b.server_info().id)
            assert (first.address, second.address) == (one.address, other.address), "the oldest first"
            assert first.http_address == here.http_address == a.server_info().http_address
            assert (first.version, second.http_address) == (metadata.version("stepwell"), "")
            assert first.started_s <= second.started_s <= second.last_seen_s
            until(a, lambda it: [each.resident_sessions for each in it.replicas] == [0, 1])
            shown = json.loads(top(one.address, "--json"))["replicas"]
            assert [each["address"] for each in shown] == [one.address, other.address]
            assert "REPLICA" in top(one.address)
            other.signal()
            other.finish()
            assert not until(a, lambda it: set(states(it)) == {one.address}).warnings
        assert "disappeared" not in "".join(one.log)


@pytest.mark.slow
def test_a_killed_server_is_missing_until_it_is_started_again(valkey: Valkey) -> None:
    with shares(valkey, "killed") as one, stepwell.connect(one.address) as a:
        with shares(valkey, "killed") as other:
            until(a, lambda it: other.address in states(it))
            other.process.kill()
            other.process.wait()
            found = until(a, lambda it: "replicas" in it.warnings)
            assert states(found)[other.address] == "missing"
            assert f" at {other.address}" in found.warnings["replicas"]
            assert found.is_ready
        with shares(valkey, "killed", "--listen", other.address):
            assert not until(a, lambda it: states(it).get(other.address) == "ready").warnings


@pytest.mark.slow
def test_a_missing_server_is_forgotten(valkey: Valkey) -> None:
    with shares(valkey, "forgotten") as one, stepwell.connect(one.address) as a:
        with shares(valkey, "forgotten") as other, stepwell.connect(other.address) as b:
            key, name = "forgotten:{meta}replicas", b.server_info().id
            until(a, lambda it: other.address in states(it))
            other.process.kill()
            other.process.wait()
        document = valkey.ask("HGET", key, name)[8:]
        assert json.loads(document)["address"] == other.address
        valkey.ask("HSET", key, name, struct.pack(">Q", int((time.time() - EXPIRY_S) * 1000)) + document)
        until(a, lambda it: set(states(it)) == {one.address})
        assert valkey.ask("HKEYS", key) == [a.server_info().id.encode()]


@pytest.mark.slow
def test_servers_list_each_other_again_after_the_store_lost_everything() -> None:
    with Valkey(append="") as valkey:
        options = "--durability", "async"
        with (
            shares(valkey, "empty", *options) as one,
            shares(valkey, "empty", *options) as other,
            stepwell.connect(one.address) as a,
        ):
            both = {one.address: "ready", other.address: "ready"}
            until(a, lambda it: states(it) == both)
            valkey.kill()
            until(a, lambda it: not it.is_ready)
            valkey.start()
            until(a, lambda it: it.is_ready and states(it) == both)


def test_a_server_with_a_store_of_its_own_lists_itself() -> None:
    with serve() as server, stepwell.connect(server.address) as client:
        (one,) = until(client, lambda it: bool(it.replicas)).replicas
        assert (one.address, one.state, one.id) == (server.address, "ready", client.server_info().id)


def top(address: str, *arguments: str) -> Any:
    command = ["top", "--server", address, "--interval", "0.2s", *arguments]
    return CliRunner().invoke(main, command, catch_exceptions=False).stdout
