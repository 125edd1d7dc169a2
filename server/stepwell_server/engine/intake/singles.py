"""Single steps, gathered between two passes and checked together.

What is plain (one row, the model's dtype and shape, a session that is free) goes this way, with array
work for all of them at once. Whatever is not goes on as a frame of one, where every rule and every
message is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from stepwell_server.clock import Clock
from stepwell_server.core.exactly_once import ANY_REVISION
from stepwell_server.core.sessions import SessionTable
from stepwell_server.engine.api import Array, Frame, Members, Part, Select, Single, StepReply
from stepwell_server.engine.call import U64
from stepwell_server.engine.intake.plain import PlainSteps
from stepwell_server.engine.intake.port import PlainPort
from stepwell_server.engine.passes.inline import Later
from stepwell_server.errors import ServerError
from stepwell_server.program import Program

_Kind: TypeAlias = tuple[Select, bool]
"""Which time steps come back, and whether the caller gave a time axis: one bundle has one of each."""


class Singles:
    """The single steps of one model that wait for the next turn of its loop."""

    def __init__(
        self,
        table: SessionTable,
        port: PlainPort,
        clock: Clock,
        submit_frame: Callable[[Frame], None],
    ) -> None:
        self._port = port
        self._clock = clock
        self._plain = _Plain(port.program)
        self._table = table
        self._submit_frame = submit_frame
        self._waiting: list[tuple[int, Single]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, handle: int, single: Single) -> None:
        """Take a single step of a live session: run it at once, or let it wait for the next turn."""
        self._port.take_in_others(self.admit_all)
        if not self._waiting and self._port.may_run_now and self._run_solo(handle, single):
            return
        self._waiting.append((handle, single))
        self._port.wake()

    def admit_all(self) -> None:
        """Take everything that waits into the model's line."""
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        if len(waiting) == 1 and self._port.is_free and self._run_solo(*waiting[0]):
            return
        groups: dict[_Kind, _Group] = {}
        gathered: dict[int, _Kind] = {}
        for handle, single in waiting:
            plain = self._plain.of(single)
            kind = None if plain is None else (single.select, plain[1])
            if gathered.get(handle, kind) != kind:
                # what the session sent before must go first, and is in another group
                self._admit(groups.values())
                groups, gathered = {}, {}
            if plain is None or kind is None:
                self._submit_alone(single)
                continue
            group = groups.get(kind)
            if group is None:
                group = groups[kind] = _Group(len(plain[0]), with_time=plain[1])
            group.add(handle, single, plain[0])
            gathered[handle] = kind
        self._admit(groups.values())

    def _admit(self, groups: Iterable[_Group]) -> None:
        for group in groups:
            self._admit_group(group)

    def _run_solo(self, handle: int, single: Single) -> bool:
        plain = self._plain.of(single)
        if plain is None or self._table.session_id_or_none(handle) != single.session_id:
            return False
        if single.cancelled or self._clock.monotonic() >= single.deadline:
            return False
        reply = self._port.run_solo(
            handle,
            plain[0],
            expected=single.expected,
            request_id=single.request_id,
            select=single.select,
            with_time=plain[1],
        )
        if isinstance(reply, Later):
            later = reply
            later.tell(lambda error: single.settle(error or later.reply))
        elif reply is not None:
            single.settle(reply)
        return reply is not None

    def _admit_group(self, group: _Group) -> None:
        singles = group.singles
        self._port.admit(
            PlainSteps(
                session_ids=[single.session_id for single in singles],
                handles=np.array(group.handles, np.intp),
                arrays=tuple(np.concatenate(column) for column in group.columns),
                with_time=group.with_time,
                select=singles[0].select,
                receiver=_Callers(singles, self._submit_alone),
                expected=np.array(
                    [ANY_REVISION if single.expected is None else single.expected for single in singles],
                    np.uint64,
                ),
                requests=np.array([single.request_id for single in singles], np.uint64),
                deadlines=np.array([single.deadline for single in singles]),
            )
        )

    def _submit_alone(self, single: Single) -> None:
        try:
            self._submit_frame(as_frame(single))
        except ServerError as error:
            single.settle(error)


class _Callers:
    """The callers of some single steps. See `plain.Receiver`."""

    def __init__(self, singles: Sequence[Single], submit_alone: Callable[[Single], None]) -> None:
        self._singles = singles
        self._submit_alone = submit_alone

    def settle(
        self,
        members: Members,
        revisions: U64,
        positions: U64,
        outputs: Mapping[str, Array],
        *,
        replayed: bool,
    ) -> None:
        names, columns = list(outputs), list(outputs.values())
        for i, (member, revision, position) in enumerate(
            zip(members.tolist(), revisions.tolist(), positions.tolist(), strict=True)
        ):
            own = {name: column[i : i + 1] for name, column in zip(names, columns, strict=True)}
            self._singles[member].settle(StepReply(revision, position, own, replayed))

    def fail(self, members: Members, error: ServerError) -> None:
        for member in members.tolist():
            self._singles[member].settle(error)

    def cancelled(self, members: Members) -> Sequence[int]:
        return [member for member in members.tolist() if self._singles[member].cancelled]

    def send_alone(self, members: Members) -> None:
        for member in members.tolist():
            self._submit_alone(self._singles[member])


class _Group:
    """Plain single steps that fit into one bundle."""

    def __init__(self, inputs: int, *, with_time: bool) -> None:
        self.with_time = with_time
        self.handles: list[int] = []
        self.singles: list[Single] = []
        self.columns: list[list[Array]] = [[] for _ in range(inputs)]

    def add(self, handle: int, single: Single, arrays: Iterable[Array]) -> None:
        self.handles.append(handle)
        self.singles.append(single)
        for column, array in zip(self.columns, arrays, strict=True):
            column.append(array)


class _Plain:
    """Tells plain single steps from the others."""

    def __init__(self, program: Program) -> None:
        self._names = [spec.name for spec in program.inputs]
        self._wanted = [
            (np.dtype(spec.dtype), (1, *spec.shape), (1, 1, *spec.shape) if spec.temporal else None)
            for spec in program.inputs
        ]

    def of(self, single: Single) -> tuple[list[Array], bool] | None:
        """The inputs of a plain step, `(1, ...)` each, and whether they came with time; else None."""
        given = single.inputs
        if len(given) != len(self._names) or single.expected == ANY_REVISION:
            return None
        if single.batch_size not in {None, 1}:
            return None
        arrays: list[Array] = []
        with_time = False
        for name, (dtype, shape, shape_with_time) in zip(self._names, self._wanted, strict=True):
            array = given.get(name)
            if array is None:
                array = given.get("") if len(given) == 1 else None
            if array is None or array.dtype != dtype:
                return None
            if array.shape == shape_with_time:
                array, with_time = array[0], True
            elif array.shape != shape or (with_time and shape_with_time is not None):
                return None
            arrays.append(array)
        return arrays, with_time


def as_frame(single: Single) -> Frame:
    """The same step as a frame of one session."""
    frame = Frame([single.session_id], lambda part: single.settle(_reply(part)), inputs=single.inputs)
    if single.expected is not None:
        frame.expected = np.array([single.expected], np.uint64)
    if single.request_id:
        frame.request_ids = np.array([single.request_id], np.uint64)
    if single.batch_size is not None:
        frame.batch_sizes = np.array([single.batch_size], np.intp)
    frame.select = single.select
    frame.deadline = single.deadline
    frame.source = single.source
    frame.cancelled = single.cancelled
    single.frame = frame
    return frame


def _reply(part: Part) -> StepReply | ServerError:
    for failure in part.failures:
        return failure.error
    return StepReply(int(part.revisions[0]), int(part.positions[0]), part.outputs, part.replayed)
