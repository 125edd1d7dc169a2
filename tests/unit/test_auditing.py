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

from stepwell.v1 import models_pb2, sessions_pb2
from stepwell.v1 import sessions_pb2 as pb
from stepwell_server.audit_log import AuditError, AuditLog
from stepwell_server.core.callers import Caller, Credential, Known, Role
from stepwell_server.errors import Overloaded, PermissionDenied, Unauthenticated
from stepwell_server.rpc import health
from stepwell_server.rpc.access import Access, require
from stepwell_server.rpc.auditing import AUDITED, MOST_NAMED, UNAUDITED, Auditor
from stepwell_server.rpc.boundary import Boundary
from stepwell_server.rpc.fronts.base import CallEnded
from stepwell_server.rpc.guard import Guard
from stepwell_server.rpc.reflection import ReflectionServicer
from stepwell_server.rpc.triton.servicer import SERVICE, unsupported_methods
from support.calls import calls
from support.clock import ManualClock
from support.fake_call import FakeCall, Requests
from support.wire import tensors


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_of_every_method_it_is_said_whether_it_is_audited() -> None:
    services = [
        sessions_pb2.DESCRIPTOR.services_by_name["SessionService"],
        models_pb2.DESCRIPTOR.services_by_name["ModelService"],
        models_pb2.DESCRIPTOR.services_by_name["ModelAdminService"],
        SERVICE,
        health.SERVICE,
    ]
    services += ReflectionServicer(services).services
    methods = {method.name for service in services for method in service.methods}
    methods |= unsupported_methods(Boundary(Requests(), 1024)).keys()
    assert methods == AUDITED.keys() | UNAUDITED.keys()
    assert not AUDITED.keys() & UNAUDITED.keys()


async def test_who_did_what_to_which_sessions_and_nothing_more(file: Path) -> None:
    log = AuditLog(file)
    async with calls(auditor=Auditor(log, "drop")) as client:
        await client.call(pb.OpenSessionRequest(model="plain", session_id="a", request_id=7))
        opened = await client.call(pb.OpenSessionsRequest(model="plain", count=MOST_NAMED + 5))
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
    log.close()
    lines = _lines(file)
    found = [(line["action"], line["outcome"], line.get("sessions"), line.get("count")) for line in lines]
    assert found == [
        ("open", "OK", ["a"], 1),
        ("open", "OK", list(opened.session_ids[:MOST_NAMED]), MOST_NAMED + 5),
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


async def test_a_caller_is_named_and_a_refusal_of_any_method_is_written(file: Path) -> None:
    log = AuditLog(file)
    boundary = Boundary(Requests(), 1024, auditor=Auditor(log, "drop"))

    async def refuse(_request: object, call: Any) -> pb.StepResponse:
        call.who = Caller("ada", "acme", Role.VIEWER)
        require(Access.USE, "Step", call.who)
        raise AssertionError

    call = FakeCall()
    call.certificate_names = ["ada.example"]
    call.metadata = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01", "authorization": "Bearer secret"}
    with pytest.raises(CallEnded):
        await boundary.unary("Step", refuse, pb.StepRequest)(call)
    log.close()
    (line,) = _lines(file)
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


def test_strangers_do_not_fill_the_disk(file: Path) -> None:
    log, clock = AuditLog(file), ManualClock()
    auditor, call = Auditor(log, "drop", clock.monotonic), FakeCall()
    for _ in range(1005):
        auditor.refused("Step", call, Unauthenticated("nobody"))
    known = FakeCall()
    known.who = Caller("ada", "acme", Role.VIEWER)
    for error in (Unauthenticated("revoked meanwhile"), PermissionDenied("no", role="viewer")):
        auditor.refused("Step", known, error)
    clock.advance(0.1)
    for _ in range(3):
        auditor.refused("Step", call, Unauthenticated("nobody"))
    clock.advance(0.1)
    auditor.refused("Step", call, Unauthenticated("nobody"))
    log.close()
    lines = _lines(file)
    assert len(lines) == 1004
    assert [line.get("skipped") for line in lines[999:]] == [None, None, None, 5, 2]


async def test_who_acts_in_another_tenant_is_not_taken_for_a_caller_of_that(file: Path) -> None:
    log, known = AuditLog(file), Known(Caller("ann", "acme", Role.ADMIN), Credential("token", b"ann"))
    guard = Guard(Mock(identify=lambda _call: known), Mock(), ManualClock())
    boundary = Boundary(Requests(), 1024, guard, Auditor(log, "drop"))

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
    log.close()
    keys = ("action", "who", "tenant", "own_tenant", "role")
    assert [tuple(line.get(key) for key in keys) for line in _lines(file)] == [
        ("list", "ann", "beta", "acme", "admin"),
        ("refused", "ann", "acme", None, "user"),
    ]


def test_what_the_server_ends_by_itself_is_its_own_doing(file: Path) -> None:
    log = AuditLog(file)
    auditor = Auditor(log, "drop")
    auditor.session_event("expired", "plain", ["acme\x1fa"], 1)
    auditor.session_event("expired", "plain", [], 300)
    auditor.session_event("opened", "plain", ["b"], 1)  # by a call, which has its own line
    log.close()
    one, many = _lines(file)
    assert (one["who"], one["tenant"], one["sessions"], one["count"]) == ("server", "acme", ["a"], 1)
    assert (many["who"], many["count"], "sessions" in many) == ("server", 300, False)


async def test_what_is_written_too_slowly_is_counted_and_told_later(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    log = AuditLog(pipe, most_waiting=20)
    auditor = Auditor(log, "refuse")
    count = 0
    while not log.dropped:  # the pipe is full, and then the queue
        log.write({"number": count, "padding": "x" * 4000})
        count += 1
    assert log.is_full
    with pytest.raises(Overloaded, match="the audit log must have room"):
        auditor.begins("OpenSession", FakeCall())
    auditor.begins("Step", FakeCall())
    Auditor(log, "drop").begins("OpenSession", FakeCall())
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
    is_stuck, goes_on, write = threading.Event(), threading.Event(), os.write

    def slow(descriptor: int, data: bytes) -> int:
        if threading.current_thread().name == "stepwell-audit":
            is_stuck.set()
            goes_on.wait(100)
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", slow)
    log = AuditLog(file, most_waiting=4)
    log.write({"number": 0})
    assert is_stuck.wait(100)
    for number in range(1, 5):
        log.write({"number": number})
    assert log.is_full
    file.rename(tmp_path / "old")
    asks = threading.Thread(target=log.reopen, daemon=True)
    asks.start()
    asks.join(100)
    assert not asks.is_alive()
    goes_on.set()
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
    log = AuditLog(file, most_waiting=5)
    log.write({"number": 1})
    assert refused.wait(100)
    while not log.is_full:
        pass
    with pytest.raises(Overloaded, match="must have room"):  # nothing that is to be seen goes on meanwhile
        Auditor(log, "refuse").begins("OpenSession", FakeCall())
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

    room.clear()
    refused.clear()
    file.rename(tmp_path / "before")
    with monkeypatch.context() as worse:
        worse.setattr(os, "ftruncate", failing)
        log = AuditLog(file)
        log.write({"number": 1})
        assert refused.wait(100)
        while not log.is_full:
            pass
        refused.clear()
        log.reopen()  # not even this may end the thread
        assert refused.wait(100), "it is tried again"
        room.set()
        log.close()
    assert [line["number"] for line in _lines(file)] == [1]

    room.clear()
    refused.clear()
    file.unlink()
    log = AuditLog(file)
    log.write({"number": 1})
    assert refused.wait(100)
    while not log.is_full:
        pass
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
    with pytest.raises(AuditError, match="must be a file that can be written"):
        AuditLog(link)
