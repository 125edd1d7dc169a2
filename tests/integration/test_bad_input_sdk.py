"""Bad input through the SDK, sync and async: the class and what the message names; no grpc error, and nothing changes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import stepwell
from stepwell import InvalidInputError, ModelNotFoundError, SessionExistsError, SessionNotFoundError
from support.served import MAX_MESSAGE_BYTES, Served

ROWS = 2
ONES = np.ones((ROWS, 3), np.float32)
H = np.ones((ROWS, 8), np.float32)
NAN, INF = float("nan"), float("inf")


def with_one(value: object, dtype: str = "float32", shape: tuple[int, ...] = (ROWS, 3)) -> Any:
    array = np.ones(shape, dtype)
    array.flat[4] = value
    return array


# Each is given a session, sync or async, of two rows; an async one returns what is to be awaited.
SESSION_CALLS: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "batch size": (
        lambda s: s.step(np.ones((3, 3))),
        InvalidInputError,
        r"must have 2 rows .*got shape \(3, 3\)",
    ),
    "features": (
        lambda s: s.step(np.ones((2, 4))),
        InvalidInputError,
        r"'x' must have shape \(2, 3\) or .*got \(2, 4\)",
    ),
    "rank 1": (
        lambda s: s.step(np.ones(2)),
        InvalidInputError,
        r"'x' must have shape \(2, 3\) or .*got \(2,\)",
    ),
    "rank 4": (lambda s: s.step(np.ones((2, 1, 1, 3))), InvalidInputError, r"got \(2, 1, 1, 3\)"),
    "a scalar": (lambda s: s.step(1.0), InvalidInputError, "the input must have a batch axis.*got a scalar"),
    "None": (
        lambda s: s.step(None),
        InvalidInputError,
        "the input must be an array of floats.*got dtype object",
    ),
    "texts": (
        lambda s: s.step([["a"] * 3] * 2),
        InvalidInputError,
        "the input must be an array of floats.*got dtype <U1",
    ),
    "ragged": (
        lambda s: s.step([[1, 2, 3], [1, 2]]),
        InvalidInputError,
        "the input must be an array of numbers",
    ),
    "dates": (lambda s: s.step(ONES.astype("M8[s]")), InvalidInputError, "got dtype datetime64"),
    "complex": (lambda s: s.step(ONES * 1j), InvalidInputError, "got dtype complex64"),
    "objects": (lambda s: s.step(ONES.astype(object)), InvalidInputError, "got dtype object"),
    "booleans": (lambda s: s.step(ONES > 0), InvalidInputError, "dtype that fits float32; got bool"),
    "empty": (
        lambda s: s.step(np.ones((0, 3))),
        InvalidInputError,
        r"the input must not be empty; got shape \(0, 3\)",
    ),
    "T = 0": (
        lambda s: s.step(np.ones((2, 0, 3))),
        InvalidInputError,
        r"must not be empty; got shape \(2, 0, 3\)",
    ),
    "a list": (lambda s: s.step([]), InvalidInputError, r"must not be empty; got shape \(0,\)"),
    "no names": (
        lambda s: s.step({}),
        InvalidInputError,
        "inputs must name at least one array; got an empty mapping",
    ),
    "name": (
        lambda s: s.step({"y": ONES}),
        InvalidInputError,
        r"must name each of \['x'\] once; got \['y'\]",
    ),
    "extra": (lambda s: s.step({"x": ONES, "y": ONES}), InvalidInputError, r"not known \['y'\]"),
    "a number as a name": (
        lambda s: s.step({0: ONES}),
        InvalidInputError,
        "names of inputs must be non-empty strings; got 0",
    ),
    "NaN": (
        lambda s: s.step(with_one(NAN)),
        InvalidInputError,
        r"'x' must hold finite numbers.*got nan at index \[1, 1\]",
    ),
    "infinity": (lambda s: s.step(with_one(-INF)), InvalidInputError, r"got -inf at index \[1, 1\]"),
    "too large": (
        lambda s: s.step(with_one(1e300, "float64")),
        InvalidInputError,
        "float32's range; got inf at index",
    ),
    "outputs": (
        lambda s: s.step(ONES, outputs="first"),
        InvalidInputError,
        r"outputs must be one of \['all', 'last', 'none'\]; got 'first'",
    ),
    "time limit": (
        lambda s: s.step(ONES, timeout_s=0),
        InvalidInputError,
        "timeout_s must be above 0.*got 0",
    ),
    "message size": (
        lambda s: s.step(np.ones((2, MAX_MESSAGE_BYTES // 24 + 1, 3), np.float32)),
        InvalidInputError,
        r"must fit the size limits of both sides \(max_message_bytes\)",
    ),
    "reply size": (
        lambda s: s.step(np.ones((2, MAX_MESSAGE_BYTES // 16 + 1, 3), np.float16)),
        InvalidInputError,
        "reply to the step must be at most|size limits",
    ),
    "state: missing": (lambda s: s.reset_states({"lstm/h": H}), InvalidInputError, r"missing: \['lstm/c'\]"),
    "state: extra": (
        lambda s: s.reset_states({"lstm/h": H, "lstm/c": H, "x": H}),
        InvalidInputError,
        r"not of this model: \['x'\]",
    ),
    "state: list": (lambda s: s.reset_states([H]), InvalidInputError, r"one array for each of .*got 1"),
    "state: shape": (
        lambda s: s.reset_states([H[:, :7], H]),
        InvalidInputError,
        r"'lstm/h' must have shape \(2, 8\); got \(2, 7\)",
    ),
    "state: rows": (
        lambda s: s.reset_states([H, H[:1]]),
        InvalidInputError,
        r"state 'lstm/c' must have 2 rows .*got shape \(1, 8\)",
    ),
    "state: NaN": (
        lambda s: s.reset_states([H, with_one(NAN, shape=(2, 8))]),
        InvalidInputError,
        r"state 'lstm/c' must hold finite numbers.*got nan at index \[0, 4\]",
    ),
    "state: too large": (
        lambda s: s.reset_states([with_one(1e300, "float64", (2, 8)), H]),
        InvalidInputError,
        "state 'lstm/h' must hold finite numbers within float32's range; got inf",
    ),
    "state: an array": (
        lambda s: s.reset_states(H),
        InvalidInputError,
        "states must be a mapping .*got ndarray",
    ),
    "rows: too large": (
        lambda s: s.reset_states(rows=[2]),
        InvalidInputError,
        r"rows must be from 0 to 1.*got \[2\]",
    ),
    "rows: negative": (
        lambda s: s.reset_states(rows=[-1]),
        InvalidInputError,
        r"rows must be from 0 to 1.*got \[-1\]",
    ),
    "rows: repeated": (
        lambda s: s.reset_states(rows=[1, 1]),
        InvalidInputError,
        r"each at most once; got \[1, 1\]",
    ),
    "rows: a mask": (
        lambda s: s.reset_states(rows=[True, False]),
        InvalidInputError,
        "got a mask of booleans",
    ),
    "rows: a float": (
        lambda s: s.reset_states(rows=[0.5]),
        InvalidInputError,
        "rows must be integers; got 0.5",
    ),
    "rows: wrong state": (
        lambda s: s.reset_states([H, H], rows=[1]),
        InvalidInputError,
        r"must have 1 rows .*got shape \(2, 8\)",
    ),
    "fork: id": (
        lambda s: s.fork("a\nb"),
        InvalidInputError,
        r"session_id must be 1 to 256 printable .*'a\\nb'",
    ),
    "fork: itself": (
        lambda s: s.fork(s.id),
        SessionExistsError,
        "new_session_id must be new; session '.*' is open",
    ),
}


@pytest.mark.parametrize("name", SESSION_CALLS)
def test_of_a_session(served: Served, name: str) -> None:
    call, kind, words = SESSION_CALLS[name]
    with served.session("seq", ROWS) as session_id, served.nothing_changes(session_id):
        session = served.client.open_session("seq", ROWS, session_id)
        with pytest.raises(kind, match=words):
            call(session)
        assert session.revision == 1


async def test_of_async_sessions(served: Served) -> None:
    """All of them, one after the other in one loop."""
    async with stepwell.aio.connect(served.address) as client:
        for name, (call, kind, words) in SESSION_CALLS.items():
            with served.session("seq", ROWS) as session_id, served.nothing_changes(session_id):
                session = await client.open_session("seq", ROWS, session_id)
                with pytest.raises(kind, match=words):
                    await call(session)
                assert session.revision == 1, name


async def test_of_an_async_session_beside_fifty(served: Served) -> None:
    """Steps awaited together share frames; the bad ones fail alone, whatever is bad about them."""
    bad = [
        np.full((1, 3), NAN),
        np.ones((1, 4)),
        np.ones((1, 3)) > 0,
        {"y": np.ones((1, 3))},
        with_one(INF, shape=(1, 9, 3)),
    ]
    async with stepwell.aio.connect(served.address) as client:
        sessions = [await client.open_session("seq") for _ in range(50 + len(bad))]
        x = served.draw("seq", 50)["x"]
        alone, _ = await client.predict("seq", x)
        answers = await asyncio.gather(
            *[session.step(x[i : i + 1] if i < 50 else bad[i - 50]) for i, session in enumerate(sessions)],
            return_exceptions=True,
        )
        assert all(isinstance(answer, InvalidInputError) for answer in answers[50:])
        assert (
            np.concatenate([np.asarray(answer) for answer in answers[:50]]).tobytes()
            == np.asarray(alone).tobytes()
        )
        assert [session.revision for session in sessions] == [1] * 50 + [0] * len(bad)
        for session in sessions:
            assert (await client.session_info(session.id)).revision == session.revision
            await session.close()


CLIENT_CALLS: dict[str, tuple[Callable[[stepwell.Client], Any], type[Exception], str]] = {
    "unknown model": (
        lambda c: c.open_session("none"),
        ModelNotFoundError,
        r"model must be one of \[.*'seq'.*got 'none'",
    ),
    "no model": (
        lambda c: c.open_session(""),
        InvalidInputError,
        "model must be the name of a model; got ''",
    ),
    "unknown model of many": (lambda c: c.open_sessions("none", 2), ModelNotFoundError, "got 'none'"),
    "unknown model to predict": (lambda c: c.predict("none", ONES), ModelNotFoundError, "got 'none'"),
    "unknown model to list": (lambda c: c.sessions(model="none"), ModelNotFoundError, "got 'none'"),
    "unknown session": (
        lambda c: c.session_info("none"),
        SessionNotFoundError,
        "that of an open session; got 'none'",
    ),
    "unknown session to close": (lambda c: c.close_session("none"), SessionNotFoundError, "got 'none'"),
    "0 as an id": (
        lambda c: c.open_session("seq", session_id=0),  # type: ignore[arg-type]
        InvalidInputError,
        "session_id must be a string; got 0",
    ),
    "an empty id": (
        lambda c: c.open_session("seq", session_id=""),
        InvalidInputError,
        "1 to 256 .*got 0 characters, ''",
    ),
    "10,000 characters": (
        lambda c: c.open_session("seq", session_id="x" * 10_000),
        InvalidInputError,
        "got 10000 characters",
    ),
    "control characters": (
        lambda c: c.open_session("seq", session_id="a\0b"),
        InvalidInputError,
        r"'a\\x00b'",
    ),
    "a lone surrogate": (
        lambda c: c.open_session("seq", session_id="a\udc80"),
        InvalidInputError,
        "printable",
    ),
    "space after": (
        lambda c: c.open_session("seq", session_id="a "),
        InvalidInputError,
        "without leading or trailing space",
    ),
    "batch size 0": (
        lambda c: c.open_session("seq", 0),
        InvalidInputError,
        "batch_size must be at least 1; got 0",
    ),
    "batch size -1": (
        lambda c: c.open_session("seq", -1),
        InvalidInputError,
        "batch_size must be at least 1; got -1",
    ),
    "batch size 1.5": (
        lambda c: c.open_session("seq", 1.5),  # type: ignore[arg-type]
        InvalidInputError,
        "batch_size must be an integer; got 1.5",
    ),
    "batch size": (
        lambda c: c.open_session("seq", 10**6),
        InvalidInputError,
        "batch_size must be 1 to .*got 1000000",
    ),
    "no sessions": (lambda c: c.open_sessions("seq", 0), InvalidInputError, "n must be at least 1; got 0"),
    "too many sessions": (
        lambda c: c.open_sessions("seq", 65_537),
        InvalidInputError,
        "1 to 65536; got 65537",
    ),
    "ids": (
        lambda c: c.open_sessions("seq", 2, session_ids=["a"]),
        InvalidInputError,
        "session_ids must have n = 2 ids; got 1",
    ),
    "state": (
        lambda c: c.open_session("seq", 2, state=[H, H[:1]]),
        InvalidInputError,
        r"'lstm/c' must have 2 rows",
    ),
    "state: NaN": (
        lambda c: c.open_session("seq", 2, state=[H, with_one(NAN, shape=(2, 8))]),
        InvalidInputError,
        "state 'lstm/c' must hold finite numbers",
    ),
    "predict: shape": (
        lambda c: c.predict("seq", np.ones((5, 2))),
        InvalidInputError,
        r"\(5, 3\) or \(5, T, 3\); got \(5, 2\)",
    ),
    "predict: NaN": (
        lambda c: c.predict("seq", with_one(NAN)),
        InvalidInputError,
        "input 'x' must hold finite numbers",
    ),
    "predict: state": (
        lambda c: c.predict("seq", ONES, [H, H[:1]]),
        InvalidInputError,
        "'lstm/c' must have 2 rows",
    ),
    "predict: token": (
        lambda c: c.predict("tokens", [[1, 9]]),
        InvalidInputError,
        "inputs must be ones that the model can run",
    ),
    "predict: float": (
        lambda c: c.predict("tokens", [[1.0]]),
        InvalidInputError,
        "dtype that fits int32; got float64",
    ),
}


@pytest.mark.parametrize("name", CLIENT_CALLS)
def test_of_a_client(served: Served, name: str) -> None:
    call, kind, words = CLIENT_CALLS[name]
    with served.nothing_changes():
        before = [info.session_id for info in served.client.sessions()]
        with pytest.raises(kind, match=words):
            call(served.client)
        assert [info.session_id for info in served.client.sessions()] == before


def test_a_state_of_another_model(served: Served) -> None:
    with served.session("gru", ROWS) as session_id, served.client.open_session("seq", ROWS) as session:
        state = served.client.open_session("gru", ROWS, session_id).get_state()
        with served.nothing_changes(session_id, session.id):
            with pytest.raises(stepwell.ModelMismatchError, match="it belongs to 'gru' of fingerprint"):
                session.reset_states(state)
            with pytest.raises(stepwell.ModelMismatchError, match="it belongs to 'gru' of fingerprint"):
                served.client.open_session("seq", ROWS, state=state)
            with pytest.raises(stepwell.ModelMismatchError, match="it belongs to 'gru' of fingerprint"):
                served.client.predict("seq", ONES, state)


def test_a_revision_that_somebody_else_has_changed(served: Served) -> None:
    with served.session("seq", ROWS) as session_id:
        mine = served.client.open_session("seq", ROWS, session_id)
        other = served.client.open_session("seq", ROWS, session_id)
        other.step(ONES)
        with served.nothing_changes(session_id):
            for call in (lambda: mine.step(ONES), mine.reset_states):
                with pytest.raises(
                    stepwell.RevisionConflictError, match="must be its revision 2; got 1"
                ) as caught:
                    call()
                assert (caught.value.expected, caught.value.actual) == (1, 2)


def test_of_a_group(served: Served) -> None:
    """Members at fault are named by their index; the others are applied, and their outputs are there."""
    x = served.draw("seq", 4, 2)["x"]
    with served.client.open_sessions("seq", 4) as group:
        known, _ = served.client.predict("seq", x)
        x[2, 1, 0] = NAN
        with served.nothing_changes(group.ids[2]):
            with pytest.raises(
                InvalidInputError, match="1 of 4 sessions failed, first: input 'x' must hold finite"
            ) as caught:
                group.step(x)
            assert list(caught.value.failures) == [2]
        outputs = caught.value.outputs
        assert isinstance(outputs, np.ndarray)
        good = [0, 1, 3]
        assert outputs[good].tobytes() == np.asarray(known)[good].tobytes()
        assert not outputs[2].any()
        assert group.revisions.tolist() == [1, 1, 0, 1]
        with served.nothing_changes(*group.ids):
            for call, words in (
                (lambda: group.step(np.ones((3, 3))), r"must have 4 rows .*got shape \(3, 3\)"),
                (lambda: group.step(np.ones((4, 2))), r"\(4, 3\) or \(4, T, 3\); got \(4, 2\)"),
                (lambda: group.reset_states(rows=[4]), r"rows must be from 0 to 3.*got \[4\]"),
                (lambda: group.reset_states([np.ones((4, 8))]), "one array for each of .*got 1"),
            ):
                with pytest.raises(InvalidInputError, match=words):
                    call()


def test_of_a_group_with_sessions_that_are_gone(served: Served) -> None:
    """Two sessions of several rows are gone: the others are stepped all the same."""
    x = served.draw("seq", 10)["x"]
    known, _ = served.client.predict("seq", x)
    with served.client.open_sessions("seq", 5, batch_size=2) as group:
        served.wire.close(group.ids[0], group.ids[3])
        with pytest.raises(SessionNotFoundError, match="2 of 5 sessions failed") as caught:
            group.step(x)
        assert list(caught.value.failures) == [0, 3]
        outputs = caught.value.outputs
        assert isinstance(outputs, np.ndarray)
        good = [2, 3, 4, 5, 8, 9]
        assert outputs[good].tobytes() == np.asarray(known)[good].tobytes()


def test_a_message_over_the_limit_harms_no_other_call(served: Served) -> None:
    """A frame that this side refuses to send leaves the stream that others share as it was."""
    with (
        stepwell.connect(served.address, max_message_bytes=1 << 20) as client,
        client.open_sessions("seq", 2) as large,
        client.open_sessions("seq", 2) as small,
    ):
        small.step(np.ones((2, 3)))
        stream = client._link._stream  # another one in its place would answer just the same
        with (
            served.nothing_changes(*large.ids),
            pytest.raises(InvalidInputError, match="max_message_bytes"),
        ):
            large.step(np.ones((2, 50_000, 3), np.float32))
        assert client._link._stream is stream
        assert stream is not None
        assert stream.error is None


async def test_a_session_that_is_another_by_now(served: Served) -> None:
    """Somebody else has closed it and opened one of the same id with more rows: its neighbours are stepped."""
    x = served.draw("seq", 3)["x"]
    known, _ = served.client.predict("seq", x)
    async with stepwell.aio.connect(served.address) as client:
        sessions = [await client.open_session("seq", session_id=f"again-{i}") for i in range(3)]
        served.wire.close("again-1")
        served.wire.open("seq", "again-1", batch_size=2)
        answers = await asyncio.gather(
            *[session.step(x[i : i + 1]) for i, session in enumerate(sessions)], return_exceptions=True
        )
        assert isinstance(answers[1], InvalidInputError)
        assert "session 'again-1' has 2, got 1" in str(answers[1])
        good = [np.asarray(answers[i]).tobytes() for i in (0, 2)]
        assert good == [np.asarray(known)[i].tobytes() for i in (0, 2)]
        served.wire.close(*[session.id for session in sessions])
