"""Commands that are given several addresses: they go on where one replica is gone, and say which servers were meant."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from click.testing import CliRunner, Result

import stepwell
from stepwell.cli import main
from support import secured
from support.sdk.scripted_replicas import ScriptedReplicas
from support.sdk.scripted_server import MODEL

pytestmark = pytest.mark.skipif(secured.is_on(), reason="options of TLS are tried elsewhere")


@pytest.fixture
def replicas() -> Iterator[ScriptedReplicas]:
    with ScriptedReplicas() as replicas:
        yield replicas


def run(*arguments: str, server: str, **environment: str) -> Result:
    return CliRunner().invoke(main, arguments, env={"STEPWELL_SERVER": server, **environment})


def test_they_go_on_where_one_is_gone(replicas: ScriptedReplicas) -> None:
    ids = replicas.spread(6)
    with stepwell.connect(replicas.address) as client:
        client.open_sessions(MODEL, 6, session_ids=ids)
    replicas.stop(1)
    for server in (replicas.address, ", ".join(replicas.addresses)):
        assert MODEL in run("models", server=server).stdout
        listed = run("sessions", "list", "--json", server=server)
        assert sorted(json.loads(line)["session_id"] for line in listed.stdout.splitlines()) == sorted(ids), (
            listed
        )
    for session_id in ids:
        assert run("sessions", "close", session_id, "--yes", server=replicas.address).exit_code == 0
    assert not replicas.servers[0].sessions


def test_all_that_are_gone_are_named(replicas: ScriptedReplicas) -> None:
    for at in range(3):
        replicas.stop(at)
    ended = run("models", "--server", replicas.address, server="", STEPWELL_CONNECT_TIMEOUT_S="0.2")
    assert ended.exit_code == 1, ended
    assert f"no server was reached at {replicas.address} (--server) within" in ended.stderr.replace("\n", " ")
    for address in replicas.addresses:
        assert f"{address}: " in ended.stderr


def test_what_is_no_list_of_addresses() -> None:
    ended = run("models", "--server", "a:1,", server="")
    assert ended.exit_code == 2
    assert "address must have an address before and after each comma; got 'a:1,'" in ended.stderr
