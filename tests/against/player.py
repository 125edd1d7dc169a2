"""Plays a program at one server: makes its requests and takes down the answers.

Two players with the same seed make the same requests, except for what the server made up: ids, uids, tokens of pages and
exported records are each server's own. Calls come one after the other. Frames go on a stream, several of them at a time;
each member's answer is taken for itself, in whichever part it comes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import Message

from against import answers
from against.answers import Answer
from against.differences import Exchange
from against.extras import Extras
from against.programs import Extra, Program, Step
from stepwell.v1 import models_pb2, tensors_pb2
from stepwell.v1 import sessions_pb2 as pb
from support.checks.action_player import mask_of
from support.checks.actions import Change, Fork, ForkMany, Open, ReadMany, Simple
from support.peers.wire import TIMEOUT_S, Array, Conversation, Wire, tensors

VOCABULARY = 9
"""Indexes of the embeddings of `served`: 0 to 8. Other ones are refused."""
_MAX_FRAMES = 4
"""On their way at a time."""
_UNKNOWN_SIZE = 2
"""Rows that are sent for a session that is not there."""
Specs = Mapping[str, models_pb2.Model]


@dataclasses.dataclass(frozen=True)
class Part:
    """A change of one session as it was sent."""

    is_reset: bool
    size: int
    arrays: Mapping[str, Array] | None
    """Inputs of a step; states of a reset, None for the initial ones."""
    select: str
    states: str
    mask: Array
    expected: int | None
    request_id: int
    is_reused: bool
    rows: Sequence[int] | None
    state_rows: Sequence[int] | None
    has_states: bool
    """Its states are among those that the frame returns."""
    output_names: Sequence[str]
    """Of a step; none: all of them."""
    position: int
    """Of a reset of all rows, with a state."""


@dataclasses.dataclass(frozen=True)
class _Flight:
    """A frame on its way."""

    request: pb.StepStreamRequest
    names: Sequence[str]
    parts: Sequence[Part]

    @property
    def kind(self) -> str:
        return "reset" if self.request.HasField("reset") else "step"


class Player:
    """One program at one server."""

    def __init__(
        self, wire: Wire, specs: Specs, program: Program, seed: int, files: Sequence[Path] = ()
    ) -> None:
        """`specs` are the served models by name; `files` are what may be loaded as a version of the first."""
        self.wire = wire
        self.specs = specs
        self.files = files
        self.program = program
        self.rng = np.random.default_rng([seed, program.number])
        self.prefix = f"p{program.number}-"
        self.sizes: dict[str, int] = {}
        """Rows of each live session, as the last list says."""
        self._guess: dict[str, int] = {}
        """Revision of each session if everything that was sent is applied."""
        self._last: dict[str, Part] = {}
        self._request = 1000 * (program.number + 1)
        self._taken: list[Exchange] = []
        self._stream: Conversation | None = None
        self._flights: dict[int, _Flight] = {}
        self._frame_id = 0
        self._extras = Extras(self)

    # --- what a program does ---

    def begin(self) -> list[Exchange]:
        """Open the first sessions."""
        for number, name in enumerate("abcdef"):
            self._open(Open(name, 1 + number % 3, with_state=False))
        return self._answered()

    def do(self, step: Step) -> list[Exchange]:
        """Do what a step says. What it has begun may be answered by a later one."""
        if isinstance(step, Change):
            self._change(step)
            return self._answered()
        self.settle()
        if isinstance(step, Open):
            self._open(step)
        elif isinstance(step, Fork):
            self._fork(step)
        elif isinstance(step, ReadMany):
            self.read(step.names)
        elif isinstance(step, ForkMany):
            self._fork_many(step.names, step.new[: len(step.names)])
        elif isinstance(step, Extra):
            self._extras.do(step)
        else:
            self._simple(step)
        return self._answered()

    def settle(self) -> None:
        """Wait until each frame is answered, and look where the sessions are."""
        if not self._flights:
            return
        self._receive()
        self.learn()

    def finish(self) -> list[Exchange]:
        """Read all sessions and close them."""
        self.settle()
        self.learn()
        self.read([*self.sizes])
        self._extras.do(Extra("close matching", (), 9))
        self.learn()
        self._hang_up()
        return self._answered()

    def before_restart(self) -> list[Exchange]:
        """Have everything answered, and give the connection up."""
        self.settle()
        self._hang_up()
        return self._answered()

    def after_restart(self, wire: Wire) -> list[Exchange]:
        """Go on with another connection."""
        self.wire = wire
        self.learn()
        self.read([*self.sizes])
        return self._answered()

    # --- what its actions share with `Extras` ---

    def own(self, name: str) -> str:
        """The id of a session of this program."""
        return self.prefix + name

    def next_request(self) -> int:
        self._request += 1
        return self._request

    def ask(
        self, rpc: str, request: Message, label: str = "", show: Callable[[Any], Answer] = answers.succeeded
    ) -> Any:
        """Make a call, and take down its answer. Returns the reply, or None."""
        stubs: Sequence[Any] = (self.wire.sessions, self.wire.models, self.wire.model_admin)
        stub = next(stub for stub in stubs if hasattr(stub, rpc))
        return self.call(getattr(stub, rpc), rpc, request, label, show)

    def call(
        self,
        method: Any,
        name: str,
        request: Any,
        label: str = "",
        show: Callable[[Any], Answer] = answers.succeeded,
    ) -> Any:
        """As `ask`, of any method."""
        reply: Any = None
        try:
            reply = method(request, timeout=TIMEOUT_S)
            answer = show(reply)
        except grpc.RpcError as error:
            answer = answers.of_error(error)
        self.take(f"{name} {label}".strip(), request, answer)
        return reply

    def take(self, call: str, request: Message | str, answer: Answer) -> None:
        shown = request if isinstance(request, str) else _shown(request)
        self._taken.append(Exchange(call, shown, answer))

    def learn(self) -> None:
        """See which sessions of the program there are."""
        request = pb.ListSessionsRequest(session_id_prefix=self.prefix, page_size=1000)
        reply = self.ask("ListSessions", request)
        self.sizes, self._guess = {}, {}
        for session in () if reply is None else reply.sessions:
            name = session.session_id.removeprefix(self.prefix)
            self.sizes[name], self._guess[name] = session.batch_size, session.revision

    def read(self, names: Sequence[str]) -> None:
        """Read states: those of each model together, for a call is about one."""
        if names:
            self.ask("GetStates", pb.GetStatesRequest(session_ids=[self.own(name) for name in names]))
        for name in names[:1]:
            self.ask("GetState", pb.GetStateRequest(session_id=self.own(name)))

    def draw(self, rows: int, steps: int, model: str = "", *, is_bad: bool = False) -> dict[str, Array]:
        """Inputs by name; without a time axis with 0 steps. If it `is_bad`, a program refuses what it can refuse."""
        drawn: dict[str, Array] = {}
        for spec in self.specs[model or self.program.model].inputs:
            shape = (rows, *((steps,) if spec.temporal and steps else ()), *spec.shape)
            value = self._values(spec, shape)
            if is_bad:
                value[-1] = 99 if np.issubdtype(value.dtype, np.integer) else np.nan
            drawn[spec.name] = value
        return drawn

    def draw_states(self, rows: int, model: str = "") -> dict[str, Array]:
        state = self.specs[model or self.program.model].state
        return {spec.name: self._values(spec, (rows, *spec.shape)) for spec in state}

    def chance(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def new_stream(self) -> None:
        """The next frame goes on another stream, which knows no sets."""
        self._hang_up()

    def send(self, request: pb.StepStreamRequest, names: Sequence[str], parts: Sequence[Part] = ()) -> None:
        """Send a frame; what it lacks is its number."""
        if self._stream is None:
            self._stream = Conversation(self.wire)
        self._frame_id += 1
        request.frame_id = self._frame_id
        self._flights[self._frame_id] = _Flight(request, names, parts)
        self._stream.send(request)
        if len(self._flights) >= _MAX_FRAMES or self.chance(0.3):
            self.settle()

    # --- actions ---

    def _values(self, spec: Any, shape: tuple[int, ...]) -> Array:
        dtype = _dtype(spec.dtype)
        if np.issubdtype(dtype, np.floating):
            return self.rng.standard_normal(shape).astype(dtype)
        return self.rng.integers(0, 2 if dtype == np.bool_ else VOCABULARY, shape).astype(dtype)

    def _open(self, action: Open) -> None:
        size = self.sizes.get(action.name, action.batch_size)
        state = tensors(self.draw_states(size)) if action.with_state else []
        reply = self.ask(
            "OpenSession",
            pb.OpenSessionRequest(
                model=self.program.model, session_id=self.own(action.name), batch_size=size, state=state
            ),
        )
        if reply is not None:
            self.sizes[action.name], self._guess[action.name] = size, reply.session.revision

    def _fork(self, action: Fork) -> None:
        request = pb.ForkSessionRequest(
            session_id=self.own(action.name),
            new_session_id=self.own(self._new_name(action.new)),
            request_id=self.next_request() if self.chance(0.5) else 0,
        )
        if self.chance(0.3):
            request.expected_revision = self._guess.get(action.name, 0) + int(self.rng.integers(2))
        self.ask("ForkSession", request)
        if request.request_id and self.chance(0.5):
            self.ask("ForkSession", request, "again")
        self.learn()

    def _new_name(self, name: str) -> str:
        """Mostly one that nothing has: the names of programs are few."""
        return f"{name}-{self.next_request()}" if name in self.sizes and self.chance(0.7) else name

    def _fork_many(self, names: Sequence[str], new: Sequence[str]) -> None:
        request = pb.ForkSessionsRequest(
            session_ids=[self.own(name) for name in names],
            new_session_ids=[self.own(self._new_name(name)) for name in new],
            request_id=self.next_request() if self.chance(0.5) else 0,
        )
        self.ask("ForkSessions", request)
        if request.request_id and self.chance(0.5):
            self.ask("ForkSessions", request, "again")
        self.learn()

    def _simple(self, action: Simple) -> None:
        name, number = self.own(action.name), action.number
        if action.kind == "read":
            self.ask("GetState", pb.GetStateRequest(session_id=name))
        elif action.kind == "close":
            self.ask("CloseSession", pb.CloseSessionRequest(session_id=name, request_id=number))
            self.learn()
        elif action.kind == "predict":
            state = tensors(self.draw_states(1 + number)) if number % 2 else []
            inputs = tensors(self.draw(1 + number, number % 4, is_bad=number == 8))
            self.ask(
                "Predict", models_pb2.PredictRequest(model=self.program.model, inputs=inputs, state=state)
            )
        else:
            self.ask("GetSession", pb.GetSessionRequest(session_id=name))

    def _change(self, action: Change) -> None:
        if action.kind == "again":
            for name in action.names:
                self._again(name, is_single=action.single)
            return
        is_reset = action.kind == "reset"
        some_rows = action.rows if is_reset or action.single else None
        is_single = action.single if some_rows is None else True
        names = action.names[:1] if is_single else action.names
        parts = []
        for member, name in enumerate(names):
            part = self._part(action, member, name, some_rows, is_single=is_single)
            if part is None:
                return
            parts.append(part)
            self._last[name] = part
        if is_single:
            self._alone(names[0], parts[0])
        else:
            self._frame(names, parts)

    def _part(
        self, action: Change, member: int, name: str, rows: tuple[int, ...] | None, *, is_single: bool
    ) -> Part | None:
        size = self.sizes.get(name, _UNKNOWN_SIZE)
        if rows is not None and max(rows) >= size:
            return None
        count = size if rows is None else len(rows)
        is_reset = action.kind == "reset"
        arrays: dict[str, Array] | None
        if is_reset:
            arrays = self.draw_states(count) if action.with_state else None
        else:
            arrays = self.draw(count, action.steps, is_bad=member in action.bad)
        known = self._last.get(name) if action.kind == "reused" else None
        request = self.next_request() if action.with_request else 0
        state_rows = None
        if action.half and is_single and action.states != "NONE":
            state_rows = list(range(count) if rows is None else rows)[::-2]
        return Part(
            is_reset=is_reset,
            size=size,
            arrays=arrays,
            select=action.select,
            states=action.states,
            mask=mask_of("none" if is_reset else action.anew, count, max(1, action.steps)).reshape(-1),
            expected=self._expected(name, action.expects),
            request_id=request if known is None else known.request_id,
            is_reused=known is not None and known.request_id != 0,
            rows=rows,
            state_rows=state_rows,
            has_states=not (action.half and not is_single and member % 2),
            output_names=[] if is_reset else self._output_names(action),
            position=5 if is_single and is_reset and rows is None and arrays is not None else 0,
        )

    def _output_names(self, action: Change) -> list[str]:
        outputs = [spec.name for spec in self.specs[self.program.model].outputs]
        return outputs[:1] if len(outputs) > 1 and action.half else []

    def _expected(self, name: str, expects: str) -> int | None:
        revision = self._guess.get(name, 0)
        if expects in {"next", "nothing"}:
            self._guess[name] = revision + 1
            return revision if expects == "next" else None
        return max(0, revision - 1) if expects == "stale" else revision + 3

    def _again(self, name: str, *, is_single: bool) -> None:
        part = self._last.get(name)
        if part is None or part.size != self.sizes.get(name, _UNKNOWN_SIZE):
            return
        if is_single or part.rows is not None:
            self._alone(name, part, "again")
        else:
            self._frame([name], [part])

    def _alone(self, name: str, part: Part, label: str = "") -> None:
        self.settle()
        fields: dict[str, Any] = {"session_id": self.own(name), "request_id": part.request_id}
        if part.expected is not None:
            fields["expected_revision"] = part.expected
        label = "reused" if part.is_reused else label
        rows = [] if part.rows is None else part.rows
        if part.is_reset:
            state = [] if part.arrays is None else tensors(part.arrays)
            request = pb.ResetStatesRequest(state=state, rows=rows, position=part.position, **fields)
            self.ask("ResetStates", request, label)
        else:
            assert part.arrays is not None
            step = pb.StepRequest(
                inputs=tensors(part.arrays),
                outputs=pb.OutputSelection.Value(f"OUTPUT_SELECTION_{part.select}"),
                states=pb.StateSelection.Value(f"STATE_SELECTION_{part.states}"),
                reset_mask=part.mask.tolist() if part.mask.any() else [],
                rows=rows,
                state_rows=part.state_rows or [],
                output_names=part.output_names,
                **fields,
            )
            self.ask("Step", step, label)
        self.learn()

    def _frame(self, names: Sequence[str], parts: Sequence[Part]) -> None:
        first = parts[0]
        given: list[Mapping[str, Array]] = [part.arrays for part in parts if part.arrays is not None]
        joined = {key: np.concatenate([one[key] for one in given]) for key in given[0]} if given else {}
        fields: dict[str, Any] = self._who(names, parts)
        if first.expected is not None:
            revisions = [part.expected or 0 for part in parts]
            if len({*revisions}) == 1 and self.chance(0.5):
                fields["expected_revision"] = revisions[0]
            else:
                fields["expected_revisions"] = revisions
        if any(part.request_id for part in parts):
            ids = [part.request_id or self.next_request() for part in parts]
            if ids == [*range(ids[0], ids[0] + len(ids))] and self.chance(0.5):
                fields["request_id_base"] = ids[0]
            else:
                fields["request_ids"] = ids
        if first.is_reset:
            frame = pb.ResetFrame(state=tensors(joined), **fields)
            self.send(pb.StepStreamRequest(reset=frame), names, parts)
            return
        members = [member for member, part in enumerate(parts) if part.has_states]
        if first.states != "NONE" and len(members) < len(parts):
            fields["state_members"] = members
        mask = np.concatenate([part.mask for part in parts])
        step = pb.StepFrame(
            inputs=tensors(joined),
            outputs=pb.OutputSelection.Value(f"OUTPUT_SELECTION_{first.select}"),
            states=pb.StateSelection.Value(f"STATE_SELECTION_{first.states}"),
            reset_mask=mask.tolist() if mask.any() else [],
            output_names=first.output_names,
            **fields,
        )
        self.send(pb.StepStreamRequest(step=step), names, parts)

    def _who(self, names: Sequence[str], parts: Sequence[Part]) -> dict[str, Any]:
        """Which sessions a frame is about."""
        fields: dict[str, Any] = {"session_ids": [self.own(name) for name in names]}
        if self.chance(0.7):
            fields["batch_sizes"] = [part.size for part in parts]
        return fields

    # --- the stream ---

    def _receive(self) -> None:
        """Take down the answers of the frames on their way, in the order of the frames."""
        assert self._stream is not None
        parts: dict[int, list[pb.StepStreamResponse]] = {frame_id: [] for frame_id in self._flights}
        left = set(self._flights)
        failure: Answer | None = None
        while left and failure is None:
            try:
                part = self._stream.receive()
            except StopIteration:
                failure = answers.broken("the stream has ended")
            except grpc.RpcError as error:
                failure = answers.of_error(error)
            else:
                parts.setdefault(part.frame_id, []).append(part)
                if part.last:
                    left.discard(part.frame_id)
        for frame_id, flight in self._flights.items():
            if failure is not None and frame_id in left:
                self.take(f"StepStream {flight.kind}", flight.request, failure)
            else:
                self._take_frame(flight, parts[frame_id])
        self._flights.clear()
        if failure is not None:
            self._hang_up()

    def _take_frame(self, flight: _Flight, parts: Sequence[pb.StepStreamResponse]) -> None:
        sizes = [part.size for part in flight.parts] or [1] * len(flight.names)
        states_of = [member for member, part in enumerate(flight.parts) if part.has_states]
        *members, frame = answers.of_frame(parts, sizes, states_of)
        shown = _shown(flight.request)
        for member, answer in enumerate(members):
            is_reused = bool(flight.parts) and flight.parts[member].is_reused
            call = f"StepStream {flight.kind}{' reused' if is_reused else ''}"
            self.take(call, f"member {member} of {shown}", answer)
        self.take("StepStream frame", shown, frame)

    def _hang_up(self) -> None:
        if self._stream is not None:
            self._stream.__exit__(None, None, None)
            self._stream = None

    def _answered(self) -> list[Exchange]:
        taken, self._taken = self._taken, []
        return taken


def _dtype(number: tensors_pb2.DataType.ValueType) -> np.dtype[Any]:
    """What numpy calls a wire type."""
    return np.dtype(tensors_pb2.DataType.Name(number).removeprefix("DATA_TYPE_").lower())


def _shown(request: Message) -> str:
    return "; ".join(f"{path}={value}" for path, value in answers.of_message(request).items())
