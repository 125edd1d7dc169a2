"""Calls that only the wire has: many sessions at once, files of sessions, Triton's protocol, versions, what is refused."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
from google.protobuf.duration_pb2 import Duration

from against import answers
from against.programs import Extra
from stepwell.v1 import models_pb2, tensors_pb2
from stepwell.v1 import sessions_pb2 as pb
from stepwell_server.rpc.triton.inference import service_pb2 as triton_pb
from support.peers.wire import TIMEOUT_S, tensor, tensors
from support.triton.triton_requests import request as infer_request

if TYPE_CHECKING:
    from against.player import Player

VERSIONED = "seq"
"""The model that is served in two versions of the same architecture."""
_PASSING = {models_pb2.MODEL_STATE_LOADING, models_pb2.MODEL_STATE_DRAINING}
_INFERENCE = "/inference.GRPCInferenceService/"
_POLICIES = (
    models_pb2.SESSION_POLICY_KEEP,
    models_pb2.SESSION_POLICY_CARRY,
    models_pb2.SESSION_POLICY_RESET,
    models_pb2.SESSION_POLICY_MIGRATE,
)


class Extras:
    """Does what an `Extra` says, for a player."""

    def __init__(self, player: Player) -> None:
        self._player = player
        self._uids: dict[str, int] = {}
        """The first uid that each session of the program was seen with."""

    def do(self, extra: Extra) -> None:
        """Make its calls; the player has no frames on their way."""
        getattr(self, f"_{extra.kind.replace(' ', '_')}")(extra)
        self._player.learn()

    # --- sessions ---

    def _open_again(self, extra: Extra) -> None:
        """The same request id again: as it was, with other content, without an id of one's own."""
        player, name = self._player, extra.names[0]
        size = player.sizes.get(name, 1 + extra.number % 3)
        for session_id in (player.own(name), ""):
            request = pb.OpenSessionRequest(
                model=player.program.model,
                session_id=session_id,
                batch_size=size,
                must_be_new=bool(extra.number % 2),
                request_id=player.next_request(),
            )
            with self._made_by_the_server() as made:
                made.extend(_ids_of(player.ask("OpenSession", request)))
                made.extend(_ids_of(player.ask("OpenSession", request, "again")))
                request.batch_size += 1
                made.extend(_ids_of(player.ask("OpenSession", request, "reused")))

    def _open_many(self, extra: Extra) -> None:
        player = self._player
        request = pb.OpenSessionsRequest(
            model=player.program.model,
            batch_size=1 + extra.number % 2,
            request_id=player.next_request(),
        )
        if extra.number % 2:
            tail = f"-{extra.number}" if extra.number > 3 else ""
            request.session_ids.extend(player.own(name + tail) for name in extra.names)
            request.resume = bool(extra.number % 3)
        else:
            request.count = 1 + extra.number // 2
        with self._made_by_the_server() as made:
            reply = player.ask("OpenSessions", request)
            made.extend([] if reply is None else reply.session_ids)
            player.ask("OpenSessions", request, "again")
            request.batch_size += 1
            again = player.ask("OpenSessions", request, "reused")
            made.extend([] if again is None else again.session_ids)
            if reply is not None and not extra.number % 2:
                inputs = tensors(player.draw(1 + extra.number % 2, 2))
                player.ask("Step", pb.StepRequest(session_id=reply.session_ids[0], inputs=inputs))

    def _open_with_an_idle_limit(self, extra: Extra) -> None:
        """A long one, which does not end meanwhile, and none."""
        player = self._player
        with self._made_by_the_server() as made:
            for limit in (Duration(seconds=86_400 + extra.number), Duration()):
                request = pb.OpenSessionRequest(model=player.program.model, max_idle=limit)
                made.extend(_ids_of(player.ask("OpenSession", request)))

    @contextlib.contextmanager
    def _made_by_the_server(self) -> Iterator[list[str]]:
        """Sessions whose ids the server made are closed: their places in lists are random."""
        made: list[str] = []
        yield made
        prefix = self._player.prefix
        for session_id in dict.fromkeys(one for one in made if one and not one.startswith(prefix)):
            self._player.ask("CloseSession", pb.CloseSessionRequest(session_id=session_id))

    def _export_and_import(self, extra: Extra) -> None:
        player = self._player
        request = pb.ExportSessionsRequest(session_ids=[player.own(name) for name in extra.names])
        if extra.number % 3 == 0:
            request = pb.ExportSessionsRequest(
                session_id_prefix=player.prefix, page_bytes=1 + 500 * extra.number
            )
        exported = player.ask("ExportSessions", request)
        if exported is None:
            return
        existing = (pb.EXISTING_SESSION_REFUSE, pb.EXISTING_SESSION_SKIP, pb.EXISTING_SESSION_REPLACE)
        gone = [one.session_id for one in exported.sessions][: extra.number % 4]
        if gone:
            player.ask("CloseSessions", pb.CloseSessionsRequest(session_ids=gone))
        elif extra.number % 2 and exported.sessions:
            step = pb.StepRequest(
                session_id=exported.sessions[0].session_id, inputs=tensors(player.draw(1, 0))
            )
            player.ask("Step", step)
        again = pb.ImportSessionsRequest(sessions=exported.sessions, existing=existing[extra.number % 3])
        player.ask("ImportSessions", again)
        player.ask("ImportSessions", again, "again")
        player.learn()
        player.read([name for name in extra.names if name in player.sizes])

    def _import_what_is_damaged(self, extra: Extra) -> None:
        player = self._player
        request = pb.ExportSessionsRequest(session_ids=[player.own(name) for name in extra.names[:2]])
        exported = player.ask("ExportSessions", request)
        if exported is None or not exported.sessions:
            return
        one = exported.sessions[0]
        raw = bytearray(one.record)
        if extra.number % 2:
            raw[-1 - extra.number] ^= 0x40
        else:
            del raw[len(raw) // 2 :]
        for damaged in (bytes(raw), b"", b"no record"):
            session = pb.ExportedSession(session_id=player.own("damaged"), record=damaged)
            player.ask("ImportSessions", pb.ImportSessionsRequest(sessions=[session]))
        twice = pb.ImportSessionsRequest(sessions=[one, one], existing=pb.EXISTING_SESSION_REPLACE)
        player.ask("ImportSessions", twice)

    def _close_many(self, extra: Extra) -> None:
        player = self._player
        request = pb.CloseSessionsRequest(
            session_ids=[player.own(name) for name in extra.names[:2]],
            request_id=player.next_request() if extra.number % 2 else 0,
        )
        player.ask("CloseSessions", request)
        player.ask("CloseSessions", request, "again")

    def _close_another(self, extra: Extra) -> None:
        """With a uid: that of the session, of one that had the id before, or of none."""
        player, name = self._player, extra.names[0]
        reply = player.ask("GetSession", pb.GetSessionRequest(session_id=player.own(name)))
        uid = 7 if reply is None else reply.session.uid
        before = self._uids.setdefault(name, uid)
        chosen = (uid, before, 7)[extra.number % 3]
        request = pb.CloseSessionRequest(session_id=player.own(name), uid=chosen, request_id=extra.number % 2)
        player.ask("CloseSession", request)
        player.ask("CloseSession", request, "again")
        player.ask(
            "CloseSessions", pb.CloseSessionsRequest(session_ids=[player.own(name)], uids=[before, before])
        )

    def _close_matching(self, extra: Extra) -> None:
        player = self._player
        if extra.number < 3:
            for refused in (
                pb.CloseMatchingSessionsRequest(),
                pb.CloseMatchingSessionsRequest(model="no-such-model"),
                pb.CloseMatchingSessionsRequest(session_id_prefix=player.prefix, page_size=1 << 20),
            ):
                player.ask("CloseMatchingSessions", refused)
            return
        request = pb.CloseMatchingSessionsRequest(
            session_id_prefix=player.prefix, page_size=2 + extra.number, request_id=player.next_request()
        )
        self._pages("CloseMatchingSessions", request)

    def _list(self, extra: Extra) -> None:
        request = pb.ListSessionsRequest(
            session_id_prefix=self._player.prefix,
            page_size=1 + extra.number % 3,
            skip_total=bool(extra.number // 5),
            model=self._player.program.model if extra.number % 4 else "",
        )
        self._pages("ListSessions", request)

    def _pages(self, rpc: str, request: Any) -> None:
        while (reply := self._player.ask(rpc, request)) is not None and reply.next_page_token:
            request.page_token = reply.next_page_token

    def _values(self, extra: Extra) -> None:
        """Tensors as numbers."""
        player, name = self._player, extra.names[0]
        size = player.sizes.get(name, 1)
        inputs = tensors(player.draw(size, 1 + extra.number % 2))
        for one in inputs:
            kind = np.int32 if one.dtype == tensor(np.zeros(1, np.int32)).dtype else np.float32
            one.values.extend(np.frombuffer(one.data, kind).tolist())
            one.ClearField("data")
        formats = (
            tensors_pb2.TENSOR_FORMAT_UNSPECIFIED,
            tensors_pb2.TENSOR_FORMAT_DATA,
            tensors_pb2.TENSOR_FORMAT_VALUES,
        )
        format_ = formats[extra.number % 3]
        step = pb.StepRequest(session_id=player.own(name), inputs=inputs, tensor_format=format_)
        player.ask("Step", step)
        player.ask("GetState", pb.GetStateRequest(session_id=player.own(name), tensor_format=format_))

    def _new_stream(self, _: Extra) -> None:
        self._player.new_stream()

    # --- what is refused ---

    def _refused_step(self, extra: Extra) -> None:
        player, name = self._player, extra.names[0]
        size, number = player.sizes.get(name, 1), extra.number
        good = tensors(player.draw(size, 0))
        wrong: Sequence[dict[str, Any]] = (
            {"inputs": []},
            {"inputs": good * 2},
            {"inputs": tensors(player.draw(size + 1, 0))},
            {"inputs": good, "rows": [size]},
            {"inputs": good, "rows": [0] * size},
            {"inputs": good, "reset_mask": [True] * (size + 1)},
            {"inputs": good, "output_names": ["no such output"]},
            {"inputs": good, "state_rows": [size], "states": 2},
            {"inputs": [tensor(np.zeros((size, 3), np.float64), "nobody")]},
            {"inputs": good, "states": 99},
        )
        player.ask("Step", pb.StepRequest(session_id=player.own(name), **wrong[number]))
        for session_id in ("", "no such session", " space", "a" * 300, "\x1f"):
            player.ask("GetState", pb.GetStateRequest(session_id=session_id))
        reset = pb.ResetStatesRequest(session_id=player.own(name), rows=[size], position=number)
        player.ask("ResetStates", reset)
        state = tensors(player.draw_states(size + number % 2))
        reset = pb.ResetStatesRequest(session_id=player.own(name), state=state, position=1 << (54 + number))
        player.ask("ResetStates", reset)

    def _refused_open(self, extra: Extra) -> None:
        player, number = self._player, extra.number
        wrong: Sequence[dict[str, Any]] = (
            {"model": ""},
            {"model": "no-such-model"},
            {"model": f"{VERSIONED}@9"},
            {"model": f"{VERSIONED}:nothing"},
            {"batch_size": 1 << 30},
            {"session_id": " space"},
            {"session_id": "a" * 257},
            {"model_fingerprint": "another"},
            {"state": tensors(player.draw_states(5))},
            {"must_be_new": True, "session_id": player.own(extra.names[0]), "batch_size": 7},
        )
        fields = {"model": player.program.model, "session_id": player.own("refused"), **wrong[number]}
        player.ask("OpenSession", pb.OpenSessionRequest(**fields))
        many = pb.OpenSessionsRequest(model=player.program.model, count=70_000, session_ids=[" "] * number)
        player.ask("OpenSessions", many)

    def _refused_frame(self, extra: Extra) -> None:
        player = self._player
        ids = [player.own(name) for name in extra.names]
        rows = sum(player.sizes.get(name, 1) for name in extra.names)
        inputs = tensors(player.draw(rows, 0))
        wrong: Sequence[dict[str, Any]] = (
            {"session_ids": ids},
            {"session_ids": [*ids, ids[0]], "inputs": inputs},
            {"session_ids": [], "inputs": inputs},
            {"session_ids": ids, "inputs": inputs, "expected_revisions": [1] * (len(ids) + 1)},
            {"session_ids": ids, "inputs": inputs, "request_ids": [1] * (len(ids) + 1)},
            {"session_ids": ids, "inputs": inputs, "expected_revision": 1, "expected_revisions": [1]},
            {"session_ids": ids, "inputs": inputs, "batch_sizes": [9] * len(ids)},
            {"session_ids": ids, "inputs": inputs, "reset_mask": [True]},
            {"session_ids": ids, "inputs": inputs, "request_id_base": (1 << 64) - 1, "request_ids": [3]},
            {"session_ids": [*ids, "nobody"], "inputs": inputs},
        )
        fields = wrong[extra.number]
        names = [*extra.names, *("?" for _ in fields.get("session_ids", ids)[len(extra.names) :])]
        player.send(pb.StepStreamRequest(step=pb.StepFrame(**fields)), names)
        player.settle()
        player.send(pb.StepStreamRequest(), ())
        player.settle()

    # --- Triton ---

    def _triton_sequence(self, extra: Extra) -> None:
        player = self._player
        number = 1000 * (player.program.number + 1) + extra.number
        sequence: int | str = number if extra.number % 2 else player.own(f"triton-{extra.number}")
        revision = 0
        for step in range(4):
            fields: dict[str, Any] = {"sequence_id": sequence, "start": step == 0, "end": step == 3}
            if extra.number < 8:  # exactly once
                fields["stepwell_request_id"] = player.next_request()
                if step:
                    fields["stepwell_revision"] = revision
            request = self._infer_request(**fields, request_id=str(step))
            reply = self._send(request)
            if reply is not None:
                revision = reply.parameters["stepwell_revision"].int64_param
            if extra.number > step:
                self._send(request, "again")
            if extra.number % 4 == step:
                self._send(self._infer_request(**fields), "reused")
        self._infer(sequence_id=sequence)  # it has ended
        self._infer(sequence_id=sequence, start=True, priority=3)
        self._infer(sequence_id=sequence, end=True)

    def _triton_alone(self, extra: Extra) -> None:
        self._infer()
        self._infer(stateless=False)
        self._infer(sequence_id=0 if extra.number % 2 else "")
        player, model = self._player, self._player.program.model
        asked: Sequence[tuple[str, Any, Any]] = (
            ("ModelMetadata", triton_pb.ModelMetadataRequest(name=model), triton_pb.ModelMetadataResponse),
            ("ModelConfig", triton_pb.ModelConfigRequest(name=model), triton_pb.ModelConfigResponse),
            ("ModelReady", triton_pb.ModelReadyRequest(name="nobody"), triton_pb.ModelReadyResponse),
            ("RepositoryIndex", triton_pb.RepositoryIndexRequest(), triton_pb.RepositoryIndexResponse),
            ("ServerMetadata", triton_pb.ServerMetadataRequest(), triton_pb.ServerMetadataResponse),
        )
        for name, request, reply in asked:
            player.call(self._triton(name, reply), name, request)

    def _triton_stream(self, extra: Extra) -> None:
        """A sequence on a stream, whose answers come in their order."""
        player = self._player
        sequence = 1000 * (player.program.number + 1) + 100 + extra.number
        requests = [
            self._infer_request(
                sequence_id=sequence, start=step == 0, end=step == 3, request_id=f"stream-{step}"
            )
            for step in range(5)
        ]
        method = player.wire.channel.stream_stream(
            f"{_INFERENCE}ModelStreamInfer",
            request_serializer=triton_pb.ModelInferRequest.SerializeToString,
            response_deserializer=triton_pb.ModelStreamInferResponse.FromString,
        )
        replies: list[Any] = []
        try:
            replies += method(iter(requests), timeout=TIMEOUT_S)
            answer = answers.succeeded(*replies)
        except grpc.RpcError as error:
            answer = answers.of_error(error)
        player.take("ModelStreamInfer", "a sequence of four requests, and one after its end", answer)

    def _infer(self, **fields: Any) -> None:
        self._send(self._infer_request(**fields))

    def _send(self, request: triton_pb.ModelInferRequest, label: str = "") -> Any:
        method = self._triton("ModelInfer", triton_pb.ModelInferResponse)
        return self._player.call(method, "ModelInfer", request, label)

    def _infer_request(self, **fields: Any) -> triton_pb.ModelInferRequest:
        inputs = self._player.draw(1, 1)
        return infer_request(*inputs.items(), model=self._player.program.model, **fields)

    def _triton(self, name: str, reply: Any) -> Any:
        return self._player.wire.channel.unary_unary(
            f"{_INFERENCE}{name}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=reply.FromString,
        )

    # --- versions ---

    def _version(self, extra: Extra) -> None:
        """A session of one version, stepped and closed."""
        player = self._player
        self._wait_until_drained()
        name = player.own("version")
        model = (f"{VERSIONED}@{1 + extra.number % 2}", f"{VERSIONED}:canary")[extra.number % 3 == 0]
        opened = player.ask("OpenSession", pb.OpenSessionRequest(model=model, session_id=name))
        if opened is not None:
            inputs = tensors(player.draw(1, 2, VERSIONED))
            player.ask("Step", pb.StepRequest(session_id=name, inputs=inputs))
            player.ask("GetState", pb.GetStateRequest(session_id=name))
            player.ask("CloseSession", pb.CloseSessionRequest(session_id=name))

    def _label(self, extra: Extra) -> None:
        version = extra.number % 4  # 0 takes it away, 3 is none
        self._wait_until_drained()
        label = ("canary", "stable", "not a label!")[extra.number % 3]
        request = models_pb2.SetLabelRequest(name=VERSIONED, label=label, version=version)
        self._player.ask("SetLabel", request)

    def _default(self, extra: Extra) -> None:
        """Another default version, and what becomes of the sessions of the one before."""
        request = models_pb2.SetDefaultRequest(
            name=VERSIONED, version=1 + extra.number % 3, sessions=_POLICIES[extra.number % 4]
        )
        self._wait_until_drained()
        self._player.ask("SetDefault", request)
        self._look_at_versions()

    def _load(self, extra: Extra) -> None:
        """One of the files that are served already, as this or that version."""
        files = self._player.files
        if not files:
            return
        request = models_pb2.LoadModelRequest(
            name=VERSIONED,
            version=1 + extra.number % 3,
            path=str(files[extra.number % len(files)]),
            keep_default=bool(extra.number % 2),
            sessions=_POLICIES[extra.number % 4],
            labels=["canary"] if extra.number > 7 else [],
        )
        self._wait_until_drained()
        method = self._player.wire.model_admin.LoadModel
        self._player.call(lambda *given, **limits: [*method(*given, **limits)][-1], "LoadModel", request)
        self._look_at_versions()

    def _unload(self, extra: Extra) -> None:
        self._wait_until_drained()
        request = models_pb2.UnloadModelRequest(name=VERSIONED, version=1 + extra.number % 3)
        self._player.ask("UnloadModel", request)
        self._look_at_versions()

    def _look_at_versions(self) -> None:
        self._wait_until_drained()
        self._player.ask("GetModel", models_pb2.GetModelRequest(name=VERSIONED))
        self._player.learn()
        self._player.read([*self._player.sizes])

    def _wait_until_drained(self) -> None:
        """Until each version that is to go when its last session ends, and has none, is gone."""
        ask = self._player.wire.models.ListModels
        request, end = models_pb2.ListModelsRequest(), time.monotonic() + TIMEOUT_S
        while time.monotonic() < end:
            versions = [one for model in ask(request, timeout=TIMEOUT_S).models for one in model.versions]
            if not any(one.state in _PASSING and not one.sessions for one in versions):
                return

    def _models(self, extra: Extra) -> None:
        player = self._player
        self._wait_until_drained()
        player.ask("ListModels", models_pb2.ListModelsRequest())
        name = (player.program.model, "no-such-model")[extra.number % 2]
        player.ask("GetModel", models_pb2.GetModelRequest(name=name))
        player.ask("ListSlowSessions", models_pb2.ListSlowSessionsRequest(limit=extra.number))


def _ids_of(reply: Any) -> list[str]:
    return [] if reply is None else [reply.session.session_id]
