"""What the audit log says, what it does not, and what happens when it cannot be written."""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
import threading
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from stepwell.v1 import models_pb2, sessions_pb2, watch_pb2
from stepwell.v1 import sessions_pb2 as pb
from stepwell_server.core.callers import Caller, Credential, KnownCaller, Role
from stepwell_server.errors import Overloaded, PermissionDenied, StartError, StoreAway, Unauthenticated
from stepwell_server.files.audit_log import MAX_LINE_BYTES, MAX_WAITING_BYTES, AuditLog
from stepwell_server.rpc.access import Access, require
from stepwell_server.rpc.audit import AUDITED, MAX_NAMED, UNAUDITED, Auditor
from stepwell_server.rpc.boundary import Boundary
from stepwell_server.rpc.fronts.base import CallEnded
from stepwell_server.rpc.guard import Guard
from stepwell_server.rpc.services import health
from stepwell_server.rpc.services.reflection import ReflectionServicer
from stepwell_server.rpc.triton.servicer import SERVICE, unsupported_methods
from support.clock import ManualClock
from support.peers.wire import tensors
from support.rpc.calls import calls
from support.rpc.fake_call import FakeCall, Requests


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


class Written:
    """An audit log, and its lines once it is closed."""

    def __init__(self, file: Path) -> None:
        self.file, self.clock, self.log = file, ManualClock(), AuditLog(file)
        self.auditor = Auditor(self.log, "drop", self.clock.monotonic)

    def lines(self) -> list[dict[str, Any]]:
        self.log.close()
        return _lines(self.file)


@pytest.fixture
def written(file: Path) -> Written:
    return Written(file)


def _call_of(name: str) -> FakeCall:
    call = FakeCall()
    call.who = Caller(name, "acme", Role.VIEWER)
    return call


class Stuck:
    """The disk of the audit log, which takes nothing until it is released."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_stuck, self.release, write = threading.Event(), threading.Event(), os.write

        def slow(descriptor: int, data: bytes) -> int:
            if threading.current_thread().name == "stepwell-audit":
                self.is_stuck.set()
                self.release.wait(100)
            return write(descriptor, data)

        monkeypatch.setattr(os, "write", slow)


def test_of_every_method_it_is_said_whether_it_is_audited() -> None:
    services = [
        sessions_pb2.DESCRIPTOR.services_by_name["SessionService"],
        models_pb2.DESCRIPTOR.services_by_name["ModelService"],
        models_pb2.DESCRIPTOR.services_by_name["ModelAdminService"],
        watch_pb2.DESCRIPTOR.services_by_name["WatchService"],
        SERVICE,
        health.SERVICE,
    ]
    services += ReflectionServicer(services).services
    methods = {method.name for service in services for method in service.methods}
    methods |= unsupported_methods(Boundary(Requests(), 1024)).keys()
    assert methods == AUDITED.keys() | UNAUDITED.keys()
    assert not AUDITED.keys() & UNAUDITED.keys()


async def test_who_did_what_to_which_sessions_and_nothing_more(written: Written) -> None:
    async with calls(auditor=written.auditor) as client:
        await client.call(pb.OpenSessionRequest(model="plain", session_id="a", request_id=7))
        opened = await client.call(pb.OpenSessionsRequest(model="plain", count=MAX_NAMED + 5))
        x = tensors({"x": np.full((1, 1, 2), 0.123456789, np.float32)})
        await client.call(pb.StepRequest(session_id="a", inputs=x))
        await client.call(pb.ResetStatesRequest(session_id="a"))
        await client.call(pb.GetStateRequest(session_id="a"))
        await client.call(pb.ForkSessionRequest(session_id="a", new_session_id="b"))
        await client.call(pb.ListSessionsRequest(session_id_prefix="a"))
        exported = await client.call(pb.ExportSessionsRequest(session_ids=["a"]))
        await client.call(pb.CloseMatchingSessionsRequest(session_id_prefix="b"))
        await client.call(pb.CloseSessionRequest(session_id="a"))
        await client.call(pb.ImportSessionsRequest(sessions=exported.sessions))
        await client.exchange(pb.StepStreamRequest(step=pb.StepFrame(session_ids=["a"], inputs=x)))
        for ids in (["a"], ["nobody", "a"], ["a", "a"]):
            await client.exchange(pb.StepStreamRequest(reset=pb.ResetFrame(session_ids=ids)))
        await client.refused(pb.CloseSessionRequest(session_id="nobody"))
        await client.refused(pb.GetSessionRequest(session_id="nobody"))
    lines = written.lines()
    found = [(line["action"], line["outcome"], line.get("sessions"), line.get("count")) for line in lines]
    assert found == [
        ("open", "OK", ["a"], 1),
        ("open", "OK", list(opened.session_ids[:MAX_NAMED]), MAX_NAMED + 5),
        ("reset", "OK", ["a"], 1),
        ("read_state", "OK", ["a"], 1),
        ("fork", "OK", ["a", "b"], 2),
        ("list", "OK", ["a"], 1),
        ("export", "OK", ["a"], 1),
        ("close", "OK", None, 1),
        ("close", "OK", ["a"], 1),
        ("import", "OK", ["a"], 1),
        ("reset", "OK", ["a"], 1),
        ("reset", "SESSION_NOT_FOUND", ["nobody", "a"], 2),
        ("reset", "INVALID_INPUT", ["a", "a"], 2),
        ("close", "SESSION_NOT_FOUND", ["nobody"], 1),
    ]
    assert lines[0] == {
        "time": lines[0]["time"],
        "action": "open",
        "who": "",
        "tenant": "",
        "role": "",
        "peer": "fake:1",
        "method": "OpenSession",
        "outcome": "OK",
        "model": "plain",
        "request_id": 7,
        "count": 1,
        "sessions": ["a"],
    }
    known = {
        "time",
        "action",
        "who",
        "tenant",
        "role",
        "peer",
        "method",
        "outcome",
        "model",
        "count",
        "sessions",
    }
    known |= {"request_id", "session_id_prefix", "new_session_id", "failed"}
    assert {key for line in lines for key in line} <= known
    assert "0.1234" not in json.dumps(lines)


async def test_a_caller_is_named_and_a_refusal_of_any_method_is_written(written: Written) -> None:
    boundary = Boundary(Requests(), 1024, auditor=written.auditor)

    async def refuse(_request: object, call: Any) -> pb.StepResponse:
        call.who = Caller("ada", "acme", Role.VIEWER)
        require(Access.USE, "Step", call.who)
        raise AssertionError

    call = FakeCall()
    call.certificate_names = ["ada.example"]
    call.metadata = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01", "authorization": "Bearer secret"}
    with pytest.raises(CallEnded):
        await boundary.unary("Step", refuse, pb.StepRequest)(call)
    (line,) = written.lines()
    del line["time"]
    assert line == {
        "action": "refused",
        "who": "ada",
        "tenant": "acme",
        "role": "viewer",
        "peer": "fake:1",
        "certificate": ["ada.example"],
        "method": "Step",
        "outcome": "PERMISSION_DENIED",
        "trace_id": "a" * 32,
    }


def test_strangers_do_not_fill_the_disk(written: Written) -> None:
    auditor, call = written.auditor, FakeCall()
    for _ in range(1005):
        auditor.refused("Step", call, Unauthenticated("nobody"))
    known = _call_of("ada")
    for error in (Unauthenticated("revoked meanwhile"), PermissionDenied("no", role="viewer")):
        auditor.refused("Step", known, error)
    written.clock.advance(0.1)
    for _ in range(3):
        auditor.refused("Step", call, Unauthenticated("nobody"))
    written.clock.advance(0.1)
    auditor.refused("Step", call, Unauthenticated("nobody"))
    lines = written.lines()
    assert len(lines) == 1004
    assert [line.get("skipped") for line in lines[999:]] == [None, None, None, 5, 2]


async def test_a_caller_who_is_refused_again_and_again_does_not_fill_the_disk(written: Written) -> None:
    async with calls(auditor=written.auditor) as client:
        for _ in range(1005):
            await client.refused(pb.CloseSessionRequest(session_id="nobody"))
        await client.call(pb.OpenSessionRequest(model="plain", session_id="a"))
        written.clock.advance(0.1)
        await client.refused(pb.CloseSessionRequest(session_id="nobody"))
    lines = written.lines()
    assert [line["outcome"] for line in lines[999:]] == ["SESSION_NOT_FOUND", "OK", "SESSION_NOT_FOUND"]
    assert [line.get("skipped") for line in lines[999:]] == [None, None, 5]


def test_callers_have_budgets_of_their_own(written: Written) -> None:
    auditor, ann, bob = written.auditor, _call_of("ann"), _call_of("bob")
    for _ in range(1005):
        auditor.refused("Step", ann, PermissionDenied("no", role="viewer"))
    auditor.refused("Step", bob, PermissionDenied("no", role="viewer"))
    # what may have changed something has its line, whatever was refused before
    auditor.failed("CloseSessions", ann, pb.CloseSessionsRequest(), StoreAway("away", 1.0))
    assert [line["who"] for line in written.lines()[999:]] == ["ann", "bob", "ann"]


def test_names_are_cut_and_lines_are_bounded(written: Written) -> None:
    auditor, call = written.auditor, FakeCall()
    wild = "\x01" * 900
    auditor.done(
        "ListSessions", call, pb.ListSessionsRequest(session_id_prefix=wild), pb.ListSessionsResponse()
    )
    many = pb.CloseSessionsRequest(session_ids=[f"\U0001f600{wild}{number}" for number in range(60_000)])
    auditor.done("CloseSessions", call, many, pb.CloseSessionsResponse(closed=3))
    call.certificate_names = [wild] * 2000
    auditor.done("ListSessions", call, pb.ListSessionsRequest(), pb.ListSessionsResponse())
    written.log.write({"anything": "x" * 100_000})
    prefix, closed, certificates, anything = written.lines()
    assert max(map(len, written.file.read_bytes().splitlines())) <= MAX_LINE_BYTES
    assert prefix["session_id_prefix"] == "\x01" * 256 + "... (900 characters)"
    assert (closed["count"], closed["cut"]) == (3, True)
    assert 0 < len(closed["sessions"]) < MAX_NAMED
    assert certificates["cut"]
    assert len(anything["anything"]) == 64


def test_the_queue_is_bounded_in_bytes(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, log = Stuck(monkeypatch), AuditLog(file)
    line = {"padding": "x" * (MAX_LINE_BYTES - 1000)}
    auditor = Auditor(log, "refuse")
    written = 0
    while not log.is_full:
        log.write(line)
        written += 1
    assert MAX_WAITING_BYTES // MAX_LINE_BYTES - 2 < written < MAX_WAITING_BYTES // MAX_LINE_BYTES + 50
    assert log.dropped == 0, "what is refused when it is full had no line yet"
    with pytest.raises(Overloaded, match="the audit log must have room"):
        auditor.started("OpenSession", FakeCall())
    for _ in range(50):
        log.write(line)
    assert log.dropped > 0
    disk.release.set()
    log.close()
    assert sum("padding" in each for each in _lines(file)) == log.written == written + 50 - log.dropped


def test_sessions_of_one_call_are_gathered_in_a_moment(written: Written) -> None:
    """Each id of a call was compared with each of its reply."""
    ids = [f"session-{number:06}" for number in range(20_000)]
    request = pb.OpenSessionsRequest(model="plain", session_ids=ids)
    looked: list[int] = []

    class Counted(str):
        __slots__ = ()

        def __eq__(self, other: object) -> bool:
            looked.append(1)
            return str.__eq__(self, str(other))

        __hash__ = str.__hash__

    reply = Mock(spec=["session_ids", "DESCRIPTOR"], session_ids=[Counted(each) for each in ids])
    reply.DESCRIPTOR = pb.OpenSessionsResponse.DESCRIPTOR
    written.auditor.done("OpenSessions", FakeCall(), request, reply)
    assert len(looked) <= 2 * len(ids)


async def test_steps_that_reset_or_read_states_have_lines(written: Written) -> None:
    x = tensors({"x": np.full((1, 1, 2), 0.5, np.float32)})
    all_states = pb.STATE_SELECTION_ALL
    async with calls(auditor=written.auditor) as client:
        await client.call(pb.OpenSessionRequest(model="plain", session_id="a"))
        await client.call(pb.StepRequest(session_id="a", inputs=x))
        await client.call(pb.StepRequest(session_id="a", inputs=x, reset_mask=[False]))
        await client.call(pb.StepRequest(session_id="a", inputs=x, reset_mask=[True]))
        await client.call(pb.StepRequest(session_id="a", inputs=x, states=all_states))
        await client.refused(pb.StepRequest(session_id="nobody", inputs=x, reset_mask=[True]))
        for fields in ({}, {"reset_mask": [False]}, {"reset_mask": [True], "states": all_states}):
            step = pb.StepFrame(session_ids=["a"], inputs=x, **fields)
            await client.exchange(pb.StepStreamRequest(step=step))
    assert [(line["action"], line["method"], line["outcome"]) for line in written.lines()[1:]] == [
        ("reset", "Step", "OK"),
        ("read_state", "Step", "OK"),
        ("reset", "Step", "SESSION_NOT_FOUND"),
        ("reset", "StepStream", "OK"),
        ("read_state", "StepStream", "OK"),
    ]


async def test_a_step_that_must_have_a_line_is_refused_where_there_is_no_room(file: Path) -> None:
    log = Mock(is_full=False)
    x = tensors({"x": np.full((1, 1, 2), 0.5, np.float32)})
    async with calls(auditor=Auditor(log, "refuse")) as client:
        await client.call(pb.OpenSessionRequest(model="plain", session_id="a"))
        log.is_full = True
        refused = await client.refused(pb.StepRequest(session_id="a", inputs=x, reset_mask=[True]))
        assert "the audit log must have room" in refused.message
        await client.call(pb.StepRequest(session_id="a", inputs=x))


async def test_who_acts_in_another_tenant_is_not_taken_for_a_caller_of_that(written: Written) -> None:
    known = KnownCaller(Caller("ann", "acme", Role.ADMIN), Credential("token", b"ann"))
    guard = Guard(Mock(identify=lambda _call: known), Mock(), ManualClock())
    boundary = Boundary(Requests(), 1024, guard, written.auditor)

    async def listed(_request: object, call: Any) -> pb.ListSessionsResponse:
        assert (call.who.tenant, str(call.who)) == ("beta", "acme/ann")
        return pb.ListSessionsResponse()

    serve = boundary.unary("ListSessions", listed, pb.ListSessionsRequest)
    call = FakeCall()
    call.metadata = {"stepwell-tenant": "beta"}
    await serve(call)
    known = known._replace(caller=Caller("ann", "acme", Role.USER))
    with pytest.raises(CallEnded):
        await serve(call)
    keys = ("action", "who", "tenant", "own_tenant", "role")
    assert [tuple(line.get(key) for key in keys) for line in written.lines()] == [
        ("list", "ann", "beta", "acme", "admin"),
        ("refused", "ann", "acme", None, "user"),
    ]


def test_what_the_server_ends_by_itself_is_its_own_doing(written: Written) -> None:
    auditor = written.auditor
    auditor.session_event("expired", "plain", ["acme\x1fa"], 1)
    auditor.session_event("expired", "plain", [], 300)
    auditor.session_event("opened", "plain", ["b"], 1)  # by a call, which has its own line
    one, many = written.lines()
    assert (one["who"], one["tenant"], one["sessions"], one["count"]) == ("server", "acme", ["a"], 1)
    assert (many["who"], many["count"], "sessions" in many) == ("server", 300, False)


async def test_what_is_written_too_slowly_is_counted_and_told_later(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    log = AuditLog(pipe, max_waiting=20)
    auditor = Auditor(log, "refuse")
    count = 0
    while not log.dropped:  # the pipe is full, and then the queue
        log.write({"number": count, "padding": "x" * 4000})
        count += 1
    assert log.is_full
    with pytest.raises(Overloaded, match="the audit log must have room"):
        auditor.started("OpenSession", FakeCall())
    auditor.started("Step", FakeCall())
    Auditor(log, "drop").started("OpenSession", FakeCall())
    os.set_blocking(reader, True)
    text = b""
    while count - 1 > text.count(b'"number"'):
        text += os.read(reader, 1 << 16)
    log.write({"number": "last"})
    while b'"last"' not in text:
        text += os.read(reader, 1 << 16)
    log.close()
    os.close(reader)
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["count"] for line in lines if line.get("action") == "missing"] == [log.dropped] == [1]
    assert len(lines) == count + 1 == log.written + 1


def test_who_asks_for_a_new_file_does_not_wait_for_the_disk_of_the_old_one(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, log = Stuck(monkeypatch), AuditLog(file, max_waiting=4)
    log.write({"number": 0})
    assert disk.is_stuck.wait(100)
    for number in range(1, 5):
        log.write({"number": number})
    assert log.is_full
    file.rename(tmp_path / "old")
    asks = threading.Thread(target=log.reopen, daemon=True)
    asks.start()
    asks.join(100)
    assert not asks.is_alive()
    disk.release.set()
    log.close()
    assert [line["number"] for line in _lines(tmp_path / "old") + _lines(file)] == [0, 1, 2, 3, 4]


def test_a_disk_without_room_drops_lines_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    log = AuditLog(Path("/dev/full"))
    with caplog.at_level(logging.ERROR):
        for number in range(3):
            log.write({"number": number})
        log.close()
    assert (log.written, log.dropped) == (0, 3)
    (record,) = caplog.records
    assert record.getMessage() == "the audit log cannot be written"


def test_a_full_disk_cuts_no_line_off_and_loses_none(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room, refused = threading.Event(), threading.Event()
    write = os.write

    def limited(descriptor: int, data: bytes) -> int:
        is_log = Path(f"/proc/self/fd/{descriptor}").resolve() == file
        if not is_log or room.is_set():
            return write(descriptor, data)
        if os.fstat(descriptor).st_size:
            refused.set()
            raise OSError(errno.ENOSPC, "full")
        return write(descriptor, data[:7])

    monkeypatch.setattr(os, "write", limited)

    def full(**limits: int) -> AuditLog:
        """Return a log whose disk is full after a part of its first line."""
        room.clear()
        refused.clear()
        log = AuditLog(file, **limits)
        log.write({"number": 1})
        assert refused.wait(100)
        while not log.is_full:
            pass
        return log

    log = full(max_waiting=5)
    with pytest.raises(Overloaded, match="must have room"):  # nothing that is to be seen goes on meanwhile
        Auditor(log, "refuse").started("OpenSession", FakeCall())
    for number in range(2, 9):
        log.write({"number": number})
    assert log.dropped == 2
    refused.clear()
    log.reopen()  # must not wait for the queue, which is full
    assert refused.wait(100)
    room.set()
    log.reopen()
    log.close()
    lines = _lines(file)
    assert [line["number"] for line in lines if "number" in line] == [1, 2, 3, 4, 5, 6]
    assert (log.written, log.dropped) == (6, 2)

    def failing(descriptor: int, size: int) -> None:
        raise OSError(errno.EIO, "gone")

    file.rename(tmp_path / "before")
    with monkeypatch.context() as worse:
        worse.setattr(os, "ftruncate", failing)
        log = full()
        refused.clear()
        log.reopen()  # not even this may end the thread
        assert refused.wait(100), "it is tried again"
        room.set()
        log.close()
    assert [line["number"] for line in _lines(file)] == [1]

    file.unlink()
    log = full()
    file.rename(tmp_path / "cut off")
    room.set()
    log.reopen()
    log.write({"number": 2})
    log.close()
    assert [line["number"] for line in _lines(file)] == [1, 2]
    assert not (tmp_path / "cut off").read_text()


def test_it_goes_on_in_a_new_file_when_the_old_one_was_renamed(file: Path, tmp_path: Path) -> None:
    file.touch(0o644)
    log = AuditLog(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    log.write({"number": 1})
    file.rename(tmp_path / "old")
    log.write({"number": 2})
    log.reopen()
    log.write({"number": 3})
    log.close()
    assert [line["number"] for line in _lines(tmp_path / "old")] == [1, 2]
    assert [line["number"] for line in _lines(file)] == [3]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    link = tmp_path / "link"
    link.symlink_to(file)
    with pytest.raises(StartError, match="must be a file that can be written"):
        AuditLog(link)
