"""Authentication of calls, the callers known to the front, and ends of streams with expired credentials. Fake clock."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from unittest.mock import Mock

import pytest

from stepwell_server.addresses import Address
from stepwell_server.core.callers import ANYBODY, Caller, Credential, KnownCaller, Role
from stepwell_server.errors import PermissionDenied, Unauthenticated
from stepwell_server.process.readiness import Report
from stepwell_server.rpc import guard
from stepwell_server.rpc.access import Access
from stepwell_server.rpc.boundary import Boundary
from stepwell_server.rpc.fronts.base import Call, CallEnded
from stepwell_server.rpc.guard import Guard
from stepwell_server.rpc.server import RpcServer
from support.clock import ManualClock
from support.rpc.calls import Front, Observer
from support.rpc.fake_call import FakeCall, Requests

ANN, BOB = Caller("ann", "acme", Role.USER), Caller("bob", "beta", Role.VIEWER)
CHIEF = Caller("chief", "acme", Role.ADMIN)


class Named:
    """Takes the header for the name of a caller."""

    def __init__(self, clock: ManualClock) -> None:
        self.asked = asyncio.Event()
        self.callers = {"ann": ANN, "bob": BOB, "chief": CHIEF}
        self.until: dict[str, float] = {}
        self.changed = False
        self.clock = clock

    def identify(self, call: Call) -> KnownCaller:
        name = str(call.metadata.get("authorization"))
        if name not in self.callers:
            raise Unauthenticated("nobody")
        return self._known(name)

    def _known(self, name: str) -> KnownCaller:
        until = self.until.get(name, float("inf"))
        return KnownCaller(self.callers[name], Credential("token", name.encode()), until)

    def renewed(self, known: KnownCaller) -> KnownCaller | None:
        name = known.credential.digest.decode()
        if self.callers.get(name) != known.caller:
            return None
        fresh = self._known(name)
        return fresh if fresh.until > self.clock.monotonic() else None

    async def refresh(self, *, at_once: bool = False) -> bool:
        changed, self.changed = self.changed or at_once, False
        return changed


class Doors:
    """A guard, and the boundary that asks it."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.named = Named(self.clock)
        self.front = Front()
        self.observer = Requests()
        self.guard = Guard(self.named, self.front, self.clock)
        self.boundary = Boundary(self.observer, 1 << 20, self.guard)
        self.tasks: list[asyncio.Task[bytes]] = []

    async def open(
        self,
        name: str,
        method: str = "StepStream",
        behaviour: Callable[[Call], Awaitable[None]] | None = None,
    ) -> asyncio.Task[bytes]:
        """A stream, which is open when this returns."""
        began = asyncio.Event()

        async def waits(call: Call) -> None:
            began.set()
            await (asyncio.Event().wait() if behaviour is None else behaviour(call))

        task = asyncio.create_task(self.boundary.stream(method, waits)(of(name)))
        await asyncio.wait_for(began.wait(), 100)
        return task

    def known(self) -> set[str]:
        return {credential.digest.decode() for credential in self.front.known}


def of(name: str | None, **metadata: str) -> FakeCall:
    call = FakeCall()
    call.metadata = metadata if name is None else {"authorization": name, **metadata}
    return call


async def code_of(task: asyncio.Task[bytes]) -> str:
    with pytest.raises(CallEnded) as raised:
        await asyncio.wait_for(task, 100)
    return raised.value.status.code.name


async def test_unknown_callers_do_not_learn_which_models_are_loading() -> None:
    front, clock, auditor = Front(), ManualClock(), Mock()
    server = RpcServer(
        front,
        clock=clock,
        observer=Observer(),
        max_message_bytes=1024,
        authenticator=Named(clock),
        auditor=auditor,
    )
    await server.start(Address("", 0))
    server.announce(Report({"models": "model 1 of 2 is being loaded (secret)"}, {}, {}))
    told = {}
    for name in ("ann", "nobody"):
        with pytest.raises(CallEnded) as ended:
            await front.methods["ListModels"].serve(of(name))
        told[name] = ended.value.status
    await server.close()
    assert (told["ann"].code.name, "(secret)" in told["ann"].message) == ("UNAVAILABLE", True)
    assert (told["nobody"].code.name, told["nobody"].message) == ("UNAUTHENTICATED", "nobody")
    assert [call.args[0] for call in auditor.refused.call_args_list] == ["ListModels"]


async def test_the_front_knows_callers_in_their_own_tenant() -> None:
    doors = Doors()
    admit = doors.guard.admit
    admit(call := of("ann"), "Step", Access.USE)
    assert call.who is ANN
    assert doors.front.known == {Credential("token", b"ann"): (ANN, float("inf"))}
    admit(of("chief", **{"stepwell-tenant": "beta"}), "Step", Access.USE)
    assert doors.known() == {"ann"}
    admit(of("chief"), "OpenSession", Access.USE)
    admit(of("bob"), "GetState", Access.READ)
    with pytest.raises(PermissionDenied):
        admit(of("bob"), "Step", Access.USE)
    assert doors.known() == {"ann", "bob", "chief"}
    doors.named.until["ann"] = 2000.0
    doors.named.changed = True
    await doors.guard.look()
    assert doors.front.known[Credential("token", b"ann")] == (ANN, 2000.0)
    doors.named.callers["ann"] = Caller("ann", "beta", Role.USER)
    admit(of("ann"), "StepStream", Access.USE)  # before anybody has looked
    assert doors.front.known[Credential("token", b"ann")][0].tenant == "beta"


async def test_a_call_is_authenticated_before_its_message_as_when_it_is_served() -> None:
    doors = Doors()
    judge = doors.boundary.judging("Step")
    doors.boundary.judging("Check")(of("nobody"))  # of health checkers nothing is asked
    judge(call := of("ann"))
    assert call.who is ANN
    for name, code in (("nobody", "UNAUTHENTICATED"), ("bob", "PERMISSION_DENIED")):
        with pytest.raises(CallEnded, match=code):
            judge(of(name))
        assert doors.observer.done[-1] == ("Step", code)
    assert doors.observer.refusals.total() == 2


async def test_streams_end_with_their_credential() -> None:
    doors = Doors()
    ann, chief = await doors.open("ann"), await doors.open("chief")
    read = await doors.open("bob", "ServerReflectionInfo")
    watch = await doors.open("ann", "Watch")
    del doors.named.callers["ann"]
    await doors.guard.look()
    assert not ann.done()  # nothing has said that something has changed
    doors.named.changed = True
    await doors.guard.look()
    assert await code_of(ann) == "UNAUTHENTICATED"
    assert doors.known() == {"bob", "chief"}
    doors.named.callers["bob"] = Caller("bob", "beta", Role.ADMIN)
    doors.named.changed = True
    await doors.guard.look()
    assert await code_of(read) == "UNAUTHENTICATED"
    assert not chief.done()
    assert not watch.done()
    assert doors.observer.refusals == {"UNAUTHENTICATED": 2}
    chief.cancel()
    watch.cancel()
    await asyncio.gather(chief, watch, return_exceptions=True)
    assert doors.observer.streams.total() == 0
    assert {code for _, code in doors.observer.done} == {"UNAUTHENTICATED", "CANCELLED"}


async def test_streams_end_when_their_credential_expires_unless_it_was_extended() -> None:
    doors = Doors()
    doors.named.until = {"ann": 1010.0, "chief": 1020.0}
    ann, chief = await doors.open("ann"), await doors.open("chief")
    doors.named.until["ann"] = 1015.0
    doors.clock.advance(11)
    await doors.guard.look()
    assert not ann.done()
    doors.clock.advance(5)
    await doors.guard.look()
    assert await code_of(ann) == "UNAUTHENTICATED"
    doors.named.until["chief"] = 1017.0
    doors.named.changed = True
    await doors.guard.look()
    doors.clock.advance(2)
    await doors.guard.look()
    assert await code_of(chief) == "UNAUTHENTICATED"
    assert not doors.front.known


async def test_a_client_that_leaves_at_that_time_gets_no_answer() -> None:
    doors = Doors()
    ann = await doors.open("ann")
    del doors.named.callers["ann"]
    await doors.guard.look(at_once=True)
    ann.cancel()  # as its front does
    with pytest.raises(asyncio.CancelledError):
        await ann
    assert doors.observer.done == [("StepStream", "CANCELLED")]


async def test_a_stream_that_ends_first_keeps_its_status() -> None:
    doors = Doors()

    async def fails(_: Call) -> None:
        raise Unauthenticated("its own")

    ann = await doors.open("ann", behaviour=fails)
    assert await code_of(ann) == "UNAUTHENTICATED"
    del doors.named.callers["ann"]
    await doors.guard.look(at_once=True)
    assert doors.observer.refusals == {"UNAUTHENTICATED": 1}


async def test_the_front_knows_limited_callers_and_keeps_those_with_streams(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(guard, "MAX_KNOWN", 3)
    doors = Doors()
    ann = await doors.open("ann")
    for number in range(10):
        doors.named.callers[f"user{number}"] = ANN
        doors.guard.admit(of(f"user{number}"), "Step", Access.USE)
    assert doors.known() == {"ann", "user8", "user9"}
    ann.cancel()
    await asyncio.gather(ann, return_exceptions=True)


async def test_open_methods_need_no_authentication() -> None:
    doors = Doors()
    watch = await doors.open("nobody", "Watch")
    call = FakeCall()
    with pytest.raises(CallEnded):
        await doors.boundary.stream("StepStream", lambda _: asyncio.sleep(0))(call)
    assert call.who is ANYBODY
    watch.cancel()
    await asyncio.gather(watch, return_exceptions=True)
