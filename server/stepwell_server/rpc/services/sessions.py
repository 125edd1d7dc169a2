"""The calls of SessionService. Step and ResetStates are in `messages`, StepStream is in `stream`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from stepwell.v1 import sessions_pb2 as pb
from stepwell_server.engine.api import OpenResult
from stepwell_server.rpc import convert, tenancy, tensors
from stepwell_server.rpc.services import admin
from stepwell_server.rpc.status import to_proto
from stepwell_server.rpc.steps import messages
from stepwell_server.rpc.steps.stream import FrameStream, StreamLimits, Streams

if TYPE_CHECKING:
    from stepwell_server.clock import Clock
    from stepwell_server.engine.engine import Engine
    from stepwell_server.rpc.audit import Auditor
    from stepwell_server.rpc.boundary import RequestObserver
    from stepwell_server.rpc.fronts.base import Call
    from stepwell_server.rpc.tracing import Tracer


class SessionServicer(messages.UnaryChanges, admin.Administration):
    """The calls of SessionService, each by its name in snake case. Lives on the event loop."""

    def __init__(
        self,
        engine: Engine,
        clock: Clock,
        max_reply_bytes: int,
        limits: StreamLimits,
        observer: RequestObserver,
        tracer: Tracer | None = None,
        auditor: Auditor | None = None,
    ) -> None:
        super().__init__(engine, max_reply_bytes)
        self._observer = observer
        self._tracer = tracer
        self._auditor = auditor
        self._clock = clock
        self._limits = limits
        self._streams = Streams()
        self.refuse_streams = self._streams.refuse
        """End every new stream with UNAVAILABLE, before anything is read from it."""
        self.stop = self._streams.stop
        """End each stream with UNAVAILABLE once its frames are answered."""

    async def open_session(self, request: pb.OpenSessionRequest, call: Call) -> pb.OpenSessionResponse:
        """Open a session, or resume an open one."""
        opened = await self._engine.open_session(
            request.model,
            session_id=tenancy.internal_id(call.who, request.session_id),
            batch_size=request.batch_size or 1,
            state=tensors.to_optional_arrays(request.state, "state"),
            must_be_new=request.must_be_new,
            request_id=request.request_id,
            fingerprint=request.model_fingerprint,
            max_idle_ms=admin.max_idle_of(request),
            namespace=tenancy.namespace_of(call.who),
            caller=call.who,
        )
        return pb.OpenSessionResponse(
            session=convert.from_session(opened.session), resumed=opened.resumed, replayed=opened.replayed
        )

    async def open_sessions(self, request: pb.OpenSessionsRequest, call: Call) -> pb.OpenSessionsResponse:
        """Open many sessions."""
        opened = await self._engine.open_sessions(
            request.model,
            count=request.count,
            session_ids=tenancy.internal_ids(call.who, request.session_ids),
            batch_size=request.batch_size or 1,
            request_id=request.request_id,
            max_idle_ms=admin.max_idle_of(request),
            namespace=tenancy.namespace_of(call.who),
            caller=call.who,
            resume=request.resume,
        )
        return pb.OpenSessionsResponse(
            session_ids=tenancy.external_ids(opened.session_ids),
            model_fingerprint=opened.fingerprint,
            replayed=opened.replayed,
            revisions=opened.revisions.tolist() if opened.revisions.any() else (),
            model_version=opened.version,
            positions=opened.positions.tolist() if opened.positions.any() else (),
            resumed=() if opened.resumed is None else opened.resumed.tolist(),
            model_versions=() if opened.versions is None else opened.versions.tolist(),
            uids=convert.once(opened.uids),
        )

    async def close_session(self, request: pb.CloseSessionRequest, call: Call) -> pb.CloseSessionResponse:
        """Close a session."""
        replayed = await self._engine.close_session(
            tenancy.internal_id(call.who, request.session_id),
            request_id=request.request_id,
            uid=request.uid,
            deadline=call.deadline,
        )
        return pb.CloseSessionResponse(replayed=replayed)

    async def close_sessions(self, request: pb.CloseSessionsRequest, call: Call) -> pb.CloseSessionsResponse:
        """Close many sessions."""
        closed = await self._engine.close_sessions(
            tenancy.internal_ids(call.who, request.session_ids),
            request_id=request.request_id,
            uids=np.array(request.uids, np.uint64) if request.uids else None,
        )
        return pb.CloseSessionsResponse(closed=closed)

    async def get_session(self, request: pb.GetSessionRequest, call: Call) -> pb.GetSessionResponse:
        """Describe a session."""
        info = await self._engine.session_info(tenancy.internal_id(call.who, request.session_id))
        return pb.GetSessionResponse(session=convert.from_session(info))

    async def get_state(self, request: pb.GetStateRequest, call: Call) -> pb.GetStateResponse:
        """Read the state of a session."""
        as_values = tensors.wants_values(request.tensor_format)
        read = await self._engine.get_state(
            tenancy.internal_id(call.who, request.session_id), deadline=call.deadline
        )
        if as_values:
            tensors.require_room_as_values(read.state)
        response = pb.GetStateResponse(
            session=convert.from_session(read.session), model_structure=read.structure
        )
        tensors.add_tensors(response.state, read.state, as_values=as_values)
        return response

    async def fork_session(self, request: pb.ForkSessionRequest, call: Call) -> pb.ForkSessionResponse:
        """Open a session with the state of another one."""
        forked: OpenResult = await self._engine.fork(
            tenancy.internal_id(call.who, request.session_id),
            new_session_id=tenancy.internal_id(call.who, request.new_session_id),
            expected=request.expected_revision if request.HasField("expected_revision") else None,
            request_id=request.request_id,
            max_idle_ms=admin.max_idle_of(request),
            deadline=call.deadline,
            caller=call.who,
        )
        return pb.ForkSessionResponse(session=convert.from_session(forked.session), replayed=forked.replayed)

    async def get_states(self, request: pb.GetStatesRequest, call: Call) -> pb.GetStatesResponse:
        """Read the states of many sessions."""
        as_values = tensors.wants_values(request.tensor_format)
        read = await self._engine.get_states(
            tenancy.internal_ids(call.who, request.session_ids),
            with_state=not request.without_state,
            deadline=call.deadline,
            reply_limit=self._max_reply_bytes,
            reply_bytes=len(request.session_ids) * messages.MEMBER_BYTES + messages.REPLY_BYTES,
        )
        if as_values:
            tensors.require_room_as_values(read.state)
        is_whole = len(read.members) == len(request.session_ids)
        response = pb.GetStatesResponse(
            model=read.model,
            model_fingerprint=read.fingerprint,
            all_members=is_whole,
            members=() if is_whole else read.members.tolist(),
            batch_sizes=read.sizes.tolist(),
            revisions=read.revisions.tolist(),
            positions=read.positions.tolist(),
            errors=[pb.MemberError(members=some.tolist(), error=to_proto(why)) for some, why in read.errors],
            model_version=read.version,
            model_structure=read.structure,
        )
        tensors.add_tensors(response.state, read.state, as_values=as_values)
        return response

    async def fork_sessions(self, request: pb.ForkSessionsRequest, call: Call) -> pb.ForkSessionsResponse:
        """Open sessions with the states of other ones."""
        count = len(request.session_ids)
        forked = await self._engine.fork_sessions(
            tenancy.internal_ids(call.who, request.session_ids),
            new_session_ids=tenancy.internal_ids(call.who, request.new_session_ids),
            expected=convert.to_numbers(request.expected_revisions, np.uint64, "expected_revisions", count),
            request_id=request.request_id,
            max_idle_ms=admin.max_idle_of(request),
            deadline=call.deadline,
            caller=call.who,
        )
        return pb.ForkSessionsResponse(
            session_ids=tenancy.external_ids(forked.session_ids),
            model=forked.model,
            model_fingerprint=forked.fingerprint,
            batch_size=forked.batch_size,
            revisions=forked.revisions.tolist(),
            positions=forked.positions.tolist(),
            replayed=forked.replayed,
            model_version=forked.version,
            uids=convert.once(forked.uids),
        )

    async def step_stream(self, call: Call) -> None:
        """Step or reset many sessions, frame by frame."""
        stream = FrameStream(
            self._engine,
            self._clock,
            self._max_reply_bytes,
            self._limits,
            self._observer,
            call,
            self._tracer,
            self._auditor,
        )
        await self._streams.run(stream)
