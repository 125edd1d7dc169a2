"""The player of programs of `actions`, which holds an engine against the model of sessions."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Container, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from stepwell_server.engine.api import PredictResult, Select, StateResult
from stepwell_server.errors import Overloaded, ServerError, Unavailable
from support.checks.actions import NAMES, Action, Change, Fork, ForkMany, Open, ReadMany, Shape, Simple
from support.checks.model_of_sessions import ModelOfSessions, ModelSession, Refused, Reply, initial, run
from support.engine.fake_executor import BAD, WAIT_S
from support.engine.harness import Answer, Answers, Harness

Array = npt.NDArray[Any]
Outcome = Reply | Refused

IDLE_S = 50.0
OF_A_STEP = ("select", "reset_rows", "rows", "states", "state_rows")


@dataclasses.dataclass
class Sent:
    """A sent change, and the model's answer when its turn comes."""

    names: Sequence[str]
    answers: Answers | list[ServerError]
    outcomes: Sequence[Callable[[], Outcome]]
    cancelled: bool = False


@dataclasses.dataclass
class Asked:
    """A task that was begun, and the check of its result when its turn comes."""

    task: asyncio.Task[Any]
    check: Callable[[Any], None]
    lost: Callable[[Container[str]], None]
    """The model's answer if the server died first; the argument lists the sessions that are left."""


@dataclasses.dataclass
class Repeatable:
    """A change of one session as it was sent."""

    fields: dict[str, Any]
    outcome: Callable[[], Outcome]


class Play:
    """Plays a program of calls on an engine and keeps a log to compare with the model."""

    def __init__(self, at: Harness, shape: Shape) -> None:
        self.at = at
        self.shape = shape
        self.model = ModelOfSessions(IDLE_S if shape.idle else 0)
        self.log: list[Sent | Asked] = []
        self.closing: set[str] = set()
        self.appearing: set[str] = set()
        self.guess: dict[str, int] = {}
        """Revision of each session if all that was sent is applied."""
        self.last: dict[str, Repeatable] = {}
        self.rng = np.random.default_rng(7)
        self.request = 0

    @property
    def now(self) -> float:
        return self.at.clock.monotonic()

    async def do(self, action: Action) -> None:
        if isinstance(action, Open):
            await self.open(action)
        elif isinstance(action, Fork):
            await self.fork(action)
        elif isinstance(action, ReadMany):
            await self.read_many(action.names)
        elif isinstance(action, ForkMany):
            await self.fork_many(action.names, action.new[: len(action.names)])
        elif isinstance(action, Change):
            if self.appearing & set(action.names):
                await self.settle()
            self.change(action)
        else:
            await self.simple(action)

    async def open(self, action: Open) -> None:
        if action.name in self.closing or action.name not in self.model.sessions:
            await self.settle()  # what was sent to the name before it was there is answered so
        known = self.model.sessions.get(action.name)
        size = action.batch_size if known is None else known.batch_size
        state = self.values(size) if action.with_state else None
        limit_s = action.max_idle_s if self.shape.idle else 0
        try:
            opened = await self.at.engine.open_session(
                "plain",
                session_id=action.name,
                batch_size=size,
                max_idle_ms=1000 * limit_s,
                state=None if state is None else {"": state},
            )
        except Overloaded:
            self.may_be_overloaded()
            return
        wanted = self.model.open(action.name, size, state, self.now, limit_s)
        assert opened.resumed == (wanted == "resumed")
        if not opened.resumed:
            self.guess[action.name] = 0

    async def fork(self, action: Fork) -> None:
        if {action.name, action.new} & (self.closing | self.appearing):
            await self.settle()
        name, new = action.name, action.new
        self.appearing.add(new)

        def check(result: Any) -> None:
            wanted = self.model.fork(name, new, self.now)
            if isinstance(wanted, Refused):
                assert type(result).__name__ == wanted.why
            else:
                info = result.session
                assert (info.revision, info.position) == (wanted.revision, wanted.position)
                assert info.batch_size == wanted.batch_size

        def lost(there: Container[str]) -> None:
            if new in there and new not in self.model.sessions:
                self.model.fork(name, new, self.now)

        await self.ask(self.at.engine.fork(name, new_session_id=new), check, lost)

    async def read_many(self, names: Sequence[str]) -> None:
        if self.appearing & set(names):
            await self.settle()

        def check(result: Any) -> None:
            failed = {member: error for members, error in result.errors for member in members.tolist()}
            starts = dict(zip(result.members.tolist(), np.cumsum(result.sizes) - result.sizes, strict=True))
            for member, name in enumerate(names):
                session = self.model.sessions.get(name)
                if session is None:
                    assert type(failed.pop(member)).__name__ == self.model.gone(name).why
                    continue
                session.used = self.now
                if self.may_be_unavailable() and isinstance(failed.get(member), Unavailable):
                    del failed[member]  # the change before it was not kept
                    continue
                place = result.members.tolist().index(member)
                own = slice(starts[member], starts[member] + session.batch_size)
                assert result.sizes[place] == session.batch_size
                assert result.revisions[place] == session.revision
                assert result.positions[place] == session.position
                assert result.state["sum"][own].tobytes() == session.state.tobytes()
            assert not failed

        await self.ask(self.at.engine.get_states(names), check)

    def may_be_unavailable(self) -> bool:
        return False

    async def fork_many(self, names: Sequence[str], new: Sequence[str]) -> None:
        if (set(names) | set(new)) & (self.closing | self.appearing):
            await self.settle()
        self.appearing |= set(new)

        def fork() -> None:
            for name, one in zip(names, new, strict=True):
                self.model.fork(name, one, self.now)

        def check(result: Any) -> None:
            sessions = [self.model.sessions.get(name) for name in names]
            if self.model.sessions.keys() & set(new):
                assert type(result).__name__ == "SessionExists"
            elif not all(sessions):
                gone = {self.model.gone(name).why for name in names if name not in self.model.sessions}
                assert type(result).__name__ in gone
                self.used([session for session in sessions if session is not None])
            elif len({session.batch_size for session in sessions if session is not None}) > 1:
                assert type(result).__name__ == "InvalidInput"
                self.used([session for session in sessions if session is not None])
            else:
                fork()
                wanted = [self.model.sessions[one] for one in new]
                assert list(result.session_ids) == list(new)
                assert result.revisions.tolist() == [session.revision for session in wanted]
                assert result.positions.tolist() == [session.position for session in wanted]

        def lost(there: Container[str]) -> None:
            if new[0] in there and new[0] not in self.model.sessions:
                fork()

        await self.ask(self.at.engine.fork_sessions(names, new_session_ids=new), check, lost)

    def used(self, sessions: Sequence[ModelSession]) -> None:
        for session in sessions:
            session.used = self.now

    async def simple(self, action: Simple) -> None:
        if action.kind in ("read", "close") and action.name in self.appearing:
            await self.settle()
        if action.kind == "read":
            await self.ask(self.at.engine.get_state(action.name), self.check_of_read(action.name))
        elif action.kind == "close":
            self.closing.add(action.name)
            await self.close(action.name, action.number)
        elif action.kind == "predict":
            await self.predict(action.number)
        elif action.kind == "let go":
            for _ in range(action.number):
                await asyncio.sleep(0)
        elif action.kind == "gate":
            if self.shape.threads:
                self.at.hooks.close_gate()
        elif action.kind == "cancel":
            self.cancel(action.number)
        else:
            await self.settle()
            if action.kind == "tick":
                self.at.clock.advance(4.0 * action.number)
                self.model.expire(self.now)

    def check_of_read(self, name: str) -> Callable[[Any], None]:
        def check(result: Any) -> None:
            session = self.model.sessions.get(name)
            if session is None:
                assert type(result).__name__ == self.model.gone(name).why
                return
            session.used = self.now
            same_session(result, session)

        return check

    async def close(self, name: str, request: int) -> None:
        def check(result: Any) -> None:
            wanted = self.model.close(name, request)
            if isinstance(wanted, Refused):
                assert type(result).__name__ == wanted.why
            else:
                assert result is wanted, "it is a replay, or is not"

        def lost(there: Container[str]) -> None:
            if name not in there:
                self.model.close(name, request)

        await self.ask(self.at.engine.close_session(name, request_id=request), check, lost)

    async def predict(self, number: int) -> None:
        rows, steps = 1 + number, 1 + number % 4
        value, state = self.values(rows, steps), self.values(rows) if number % 2 else None
        if number == 8:
            value[3, 0, 0] = BAD

        def check(result: Any) -> None:
            ran = run(initial(rows) if state is None else state, value)
            if ran is None:
                assert type(result).__name__ == "InvalidInput"
                return
            assert isinstance(result, PredictResult)
            assert result.outputs["y"].tobytes() == ran[0].tobytes()
            assert result.state["sum"].tobytes() == ran[1].tobytes()

        given_state = None if state is None else {"": state}
        await self.ask(self.at.engine.predict("plain", {"": value}, given_state), check)

    def cancel(self, number: int) -> None:
        """Cancel one of the changes on their way; -1 is the last one sent."""
        sent = [entry for entry in self.log if isinstance(entry, Sent)]
        if not sent:
            return
        chosen = sent[number % len(sent)]
        if not isinstance(chosen.answers, list):
            self.at.cancel(chosen.answers)
            chosen.cancelled = True

    async def ask(
        self,
        call: Awaitable[Any],
        check: Callable[[Any], None],
        lost: Callable[[Container[str]], None] = lambda _there: None,
    ) -> None:
        self.log.append(Asked(asyncio.create_task(result_of(call)), check, lost))
        await asyncio.sleep(0)  # so that it takes its place in line before what comes next

    def change(self, action: Change) -> None:
        if action.kind == "again":
            for name in action.names:
                self.again(name, single=action.single)
            return
        is_reset = action.kind == "reset"
        single = action.single and not is_reset
        some_rows = action.rows if is_reset or single else None
        # a reset of some rows, and a single step, are of one session
        chosen = action.names[:1] if some_rows is not None or single else action.names
        sizes = [self.size(name) for name in chosen]
        if some_rows is not None and max(some_rows) >= sizes[0]:
            return
        parts: list[Array] = []
        outcomes: list[Callable[[], Outcome]] = []
        expected: list[int] = []
        requests: list[int] = []
        masks: list[Array] = []
        state_rows: list[int] | None = None
        for member, (name, size) in enumerate(zip(chosen, sizes, strict=True)):
            self.request += 1
            requests.append(self.request if action.with_request else 0)
            if action.kind == "reused" and (known := self.last.get(name)) is not None:
                requests[-1] = known.fields["request_ids"][0]
            wanted = self.expected(name, action.expects)
            expected.append(0 if wanted is None else wanted)
            count = size if some_rows is None else len(some_rows)
            if is_reset:
                value = self.values(count)
            else:
                value = self.values(count, *([action.steps] if action.steps else []))
                if member in action.bad:
                    value[(-1, action.steps // 2, 0) if action.steps else (-1, 0)] = BAD
            parts.append(value)
            mask = mask_of("none" if is_reset else action.anew, count, max(1, action.steps))
            masks.append(mask)
            state_rows = None
            if action.half and single:
                state_rows = list(range(count) if some_rows is None else some_rows)[::-2]
            elif action.half and member % 2:
                state_rows = []
            outcomes.append(
                self.outcome(action, name, value, some_rows, wanted, requests[-1], mask, state_rows)
            )
        fields: dict[str, Any] = {"request_ids": requests, "sizes": sizes, "batch_sizes": sizes}
        if action.expects != "nothing":
            fields["expected"] = expected
        if is_reset:
            fields |= {"reset": True, "rows": some_rows}
        else:
            fields["select"], fields["states"] = Select[action.select], Select[action.states]
        key = None if is_reset and not action.with_state else "state" if is_reset else "x"
        for member, name in enumerate(chosen):
            own = {field: v[member : member + 1] if isinstance(v, list) else v for field, v in fields.items()}
            if not is_reset:
                own["reset_rows"] = masks[member].reshape(-1)
                own["rows"] = None if some_rows is None else list(some_rows)
                own["state_rows"] = state_rows if single and action.states != "NONE" else None
                if action.half and not single and member % 2:
                    own["states"] = Select.NONE
            self.last[name] = Repeatable(own | filled(key, parts[member]), outcomes[member])
        fields |= filled(key, np.concatenate(parts))
        if not is_reset:
            fields["reset_rows"] = np.concatenate(masks).reshape(-1)
            if single:
                fields = self.last[chosen[0]].fields
            elif action.half and action.states != "NONE":
                fields["state_members"] = list(range(0, len(chosen), 2))
        self.send(chosen, fields, outcomes, single=single)
        if action.cancel:
            self.cancel(-1)

    def again(self, name: str, *, single: bool) -> None:
        known = self.last.get(name)
        if known is not None and known.fields["sizes"] == [self.size(name)]:
            some_rows = known.fields.get("rows") is not None  # frames know none
            self.send(
                [name], known.fields, [known.outcome], single=(single or some_rows) and "x" in known.fields
            )

    def send(
        self,
        chosen: Sequence[str],
        fields: dict[str, Any],
        outcomes: Sequence[Callable[[], Outcome]],
        *,
        single: bool,
    ) -> None:
        answers: Answers | list[ServerError]
        try:
            if single:
                answers = self.at.single(
                    chosen[0],
                    fields["x"],
                    expected=fields["expected"][0] if "expected" in fields else None,
                    request_id=fields["request_ids"][0],
                    **{name: fields[name] for name in OF_A_STEP},
                )
            else:
                answers = self.at.submit(chosen, **fields)
        except ServerError as error:
            answers = [error] * len(chosen)
        self.log.append(Sent(chosen, answers, outcomes))

    def outcome(
        self,
        action: Change,
        name: str,
        value: Array,
        rows: tuple[int, ...] | None,
        expected: int | None,
        request: int,
        mask: Array,
        state_rows: list[int] | None,
    ) -> Callable[[], Outcome]:
        if action.kind == "reset":
            state = value if action.with_state else None
            return lambda: self.model.reset(name, state, rows, expected, request, self.now)
        return lambda: self.model.step(
            name,
            value,
            action.select,
            expected,
            request,
            self.now,
            mask,
            rows=rows,
            states=action.states,
            state_rows=state_rows,
        )

    def expected(self, name: str, expects: str) -> int | None:
        revision = self.guess.get(name, 0)
        if expects in ("next", "nothing"):
            self.guess[name] = revision + 1
            return revision if expects == "next" else None
        return max(0, revision - 1) if expects == "stale" else revision + 3

    def size(self, name: str) -> int:
        known = self.model.sessions.get(name)
        return 2 if known is None else known.batch_size

    def values(self, *shape: int) -> Array:
        return self.rng.standard_normal((*shape, 2)).astype(np.float32)

    def may_be_overloaded(self) -> None:
        assert self.shape.resident_rows < 3 * len(NAMES), "there is room for all sessions"

    async def settle(self) -> None:
        """Wait for everything that was sent, and hold it against the model in the order it was sent."""
        self.at.hooks.open_gate()
        for entry in self.log:
            if isinstance(entry, Asked):
                result = await asyncio.wait_for(entry.task, WAIT_S)
                if isinstance(result, Overloaded):
                    self.may_be_overloaded()
                else:
                    entry.check(result)
            else:
                answers = entry.answers if isinstance(entry.answers, list) else await entry.answers.all()
                for answer, outcome in zip(answers, entry.outcomes, strict=True):
                    self.hold_against(answer, outcome, cancelled=entry.cancelled)
        await self.at.settled()
        self.begin_anew()

    def begin_anew(self) -> None:
        """Nothing is under way."""
        self.log.clear()
        self.closing.clear()
        self.appearing.clear()
        self.guess = {name: session.revision for name, session in self.model.sessions.items()}

    def hold_against(
        self, answer: Answer | ServerError, outcome: Callable[[], Outcome], *, cancelled: bool
    ) -> None:
        if isinstance(answer, Overloaded):
            self.may_be_overloaded()
            return
        if isinstance(answer, Unavailable):
            assert cancelled
            return
        wanted = outcome()
        if isinstance(wanted, Refused):
            assert type(answer).__name__ == wanted.why
            return
        assert isinstance(answer, Answer), answer
        assert (answer.revision, answer.position) == (wanted.revision, wanted.position)
        assert answer.replayed == wanted.replayed
        assert list(answer.outputs) == list(wanted.outputs)
        for name, array in wanted.outputs.items():
            assert answer.outputs[name].shape == array.shape
            assert answer.outputs[name].tobytes() == array.tobytes()
        states = {name: array for name, array in answer.states.items() if len(array)}
        assert list(states) == list(wanted.states)
        for name, array in wanted.states.items():
            assert states[name].shape == array.shape
            assert states[name].tobytes() == array.tobytes()

    async def finish(self) -> None:
        await self.settle()
        await self.at.internals.expire_idle()
        await self.at.settled()  # else the store may still have those that have expired
        infos, total = await self.at.engine.list_sessions()
        assert [info.session_id for info in infos] == sorted(self.model.sessions)
        assert total == len(self.model.sessions)
        for name, session in self.model.sessions.items():
            same_session(await self.at.engine.get_state(name), session)


def mask_of(anew: str, size: int, steps: int) -> Array:
    """Which rows of a session are reset before its step, `(size, 1)`, or before each time step, `(size, steps)`."""
    if anew in {"none", "some", "all"}:
        mask = np.zeros(size, np.bool_) if anew == "none" else np.ones(size, np.bool_)
        if anew == "some":
            mask[1::2] = False
        return mask[:, None]
    rows, times = np.arange(size)[:, None], np.arange(steps)[None]
    if anew == "now and then":
        return np.asarray((rows + times) % 3 == 1)
    return np.asarray(times + 0 * rows == steps // 2)


def filled(key: str | None, values: Array) -> dict[str, Any]:
    if key is None:
        return {}
    return {key: {"": values} if key == "state" else values}


async def result_of(call: Awaitable[Any]) -> Any:
    try:
        return await call
    except ServerError as error:
        return error


def same_session(read: StateResult, session: ModelSession) -> None:
    assert isinstance(read, StateResult)
    assert read.state["sum"].tobytes() == session.state.tobytes()
    info = read.session
    assert (info.revision, info.position) == (session.revision, session.position)
    assert (info.batch_size, info.max_idle_s) == (session.batch_size, session.max_idle_s)
