"""The server is killed again and again under load and comes back: nothing acknowledged is lost, nothing happens twice.

The short version of `make soak`.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from support.checks.history import Call, End, Log, load
from support.load.driver import MODEL, PlayerCounts, Table, audit
from support.load.driver_process import DriverProcess
from support.load.random_kills import kill_at_random
from support.peers.wire import Wire, tensor
from support.samples import examples
from support.servers.fault_servers import SMALL_BYTES, FaultyServer, local, verdict


@pytest.mark.parametrize(
    ("durability", "seed", "extra", "segment_bytes"),
    [
        pytest.param("sync", 21, (), SMALL_BYTES, marks=pytest.mark.slow),
        ("async", 22, ("--resident-rows", "16"), None),
    ],
)
def test_kills(
    tmp_path: Path, durability: str, seed: int, extra: tuple[str, ...], segment_bytes: int | None
) -> None:
    """The first server's segments rotate all the time.

    The second one has room for fewer rows than there are, so that sessions are paged out all the time.
    """
    history = tmp_path / "history"
    with (
        local(tmp_path / "data", "--durability", durability, *extra, segment_bytes=segment_bytes) as server,
        DriverProcess(server.address, history, seed) as driver,
    ):
        kill_at_random(server, driver, random.Random(seed), kills=examples(24))
        driver.wait_acknowledged(100)
        driver.stop()
    assert segment_bytes in {None, (tmp_path / "data" / "wal" / "0").stat().st_size}
    report = verdict(history).require_clean()
    assert report.acknowledged > 200
    assert report.reads > 20


@pytest.mark.slow
@pytest.mark.parametrize("defect", ["drop-commits", "commit-late"])
def test_a_server_that_answers_before_it_keeps_is_caught(tmp_path: Path, defect: str) -> None:
    """The proof that a lost change would be seen."""
    history = tmp_path / "history"
    with (
        FaultyServer(tmp_path / "data", defect=defect) as server,
        DriverProcess(server.address, history, seed=23, mix=PlayerCounts(frames=12)) as driver,
    ):
        driver.wait_acknowledged(300)
        kill_at_random(server, driver, random.Random(23), kills=3)
        driver.stop()
    report = verdict(history)
    assert report.count("lost") + report.count("gone") > 0, report
    # a session whose opening was dropped is gone, and the message names only some of all
    with pytest.raises(AssertionError, match=r"(lost|gone): session 'life0.* revision \d+"):
        report.require_clean()


@pytest.mark.slow
def test_load_goes_on_when_every_session_is_lost(tmp_path: Path) -> None:
    """A server that loses sessions never runs out of load: players whose session is gone open another one."""
    history = tmp_path / "history"
    with local(None) as server, DriverProcess(server.address, history, seed=25) as driver:
        kill_at_random(server, driver, random.Random(25), kills=2)
        driver.wait_acknowledged(100)
        driver.stop()
    report = verdict(history)
    assert report.count("gone") > 0, report
    assert report.count("wrong") == 0, report


@pytest.mark.slow
def test_a_session_made_anew_is_a_lost_one(tmp_path: Path) -> None:
    """An opening makes a new session where the old one is lost: its first revision is that of the old one."""
    path = tmp_path / "history"
    log = Log(path, seed=26)
    log.end(
        log.call(Call(kind="open", session="lost", batch_size=1)),
        End(outcome="acknowledged", revision=0, position=0),
    )
    log.close()
    with local(None) as server, DriverProcess(server.address, path, seed=26) as driver:
        driver.wait_acknowledged(1)
        driver.stop()
    ends = [end.outcome for op in load([path]) if op.call.session == "lost" for _, end in op.ends]
    assert ends[:2] == ["acknowledged", "gone"], "the player that resumes it"
    assert [found.session for found in verdict(path).violations] == ["lost"]


def test_the_last_look_sees_that_a_session_was_made_anew(tmp_path: Path) -> None:
    """A session that nobody asks for after it was lost, until all are read at the end."""
    path = tmp_path / "history"
    log = Log(path, seed=27)
    table = Table(log, random.Random(27), np.random.default_rng(27), asyncio.Event(), 0.0, hurry=False)

    async def look(address: str) -> None:
        opened = log.call(Call(kind="open", session="lost", batch_size=1))
        log.end(opened, End(outcome="acknowledged", revision=0, position=0))
        await audit(table, address, {"lost": 1})

    with local(None) as server:
        asyncio.run(look(server.address))
    log.close()
    assert [(found.sort, found.session) for found in verdict(path).violations] == [("gone", "lost")]


@pytest.mark.parametrize("durability", ["sync", "async"])
def test_the_first_answer_is_given_again_after_a_kill(tmp_path: Path, durability: str) -> None:
    """Sent again to the server that came back, every last change is answered with the same bits, as replayed."""
    asked: list[dict[str, Any]] = [
        {},
        {"outputs": 2, "reset_mask": [False, True] * 4},
        {"states": 3},
        {"states": 2, "outputs": 3},
        {"states": 3, "state_rows": [1], "reset_mask": [True, False]},
        {"states": 3, "rows": [1, 0]},
        {"states": 3, "rows": [1]},
    ]
    revisions: list[dict[str, Any]] = [{}, {"expected_revision": 1}, {"expected_revision": 2}]
    x = np.random.default_rng(8).standard_normal((len(asked), 2, 4, 3)).astype(np.float32)
    with local(tmp_path / "data", "--durability", durability) as server:
        with Wire(server.address) as wire:
            names = [wire.open(MODEL, batch_size=2) for _ in asked]
            for name, inputs in zip(names, x, strict=True):
                wire.step(name, [tensor(inputs[:, 0])], expected_revision=0, request_id=5)
            requests = [
                {"inputs": [tensor(inputs[: len(fields.get("rows", "ab"))])], **fields}
                for inputs, fields in zip(x, asked, strict=True)
            ]
            first = [
                wire.step(name, expected_revision=1, request_id=6, **request)
                for name, request in zip(names, requests, strict=True)
            ]
            assert [bool(answer.states) for answer in first] == ["states" in fields for fields in asked]
        for _ in range(2):
            server.kill()
            server.restart()
            with Wire(server.address) as wire:
                for name, request, answer in zip(names, requests, first, strict=True):
                    again = wire.step(name, expected_revision=1, request_id=6, **request)
                    assert again.replayed
                    again.replayed = False
                    assert again == answer
                    other = {**request, "outputs": 3 - request.get("outputs", 0)}
                    for revision in revisions:
                        with pytest.raises(grpc.RpcError, match="it belongs to a step with other content"):
                            wire.step(name, request_id=6, **other, **revision)
                    assert wire.session(name).revision == 2
