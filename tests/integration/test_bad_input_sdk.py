"""Bad input through the SDK, sync and async: the class and what the message names; no grpc error, and nothing changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import stepwell
from stepwell import InvalidInputError, ModelNotFoundError, SessionExistsError, SessionNotFoundError
from support.servers.served import MAX_MESSAGE_BYTES, Served

ROWS = 2
ONES = np.ones((ROWS, 3), np.float32)
H = np.ones((ROWS, 8), np.float32)
NAN, INF = float("nan"), float("inf")


def with_one(value: object, dtype: str = "float32", shape: tuple[int, ...] = (ROWS, 3)) -> Any:
    array = np.ones(shape, dtype)
    array.flat[4] = value
    return array


#: A call, the words of its error, and its class if it is not `InvalidInputError`.
Case = tuple[Callable[[Any], Any], str] | tuple[Callable[[Any], Any], str, type[Exception]]


def expected(case: Case) -> tuple[Callable[[Any], Any], str, type[Exception]]:
    return (*case, InvalidInputError) if len(case) == 2 else case


# Each is given a session, sync or async, of two rows; an async one returns what is to be awaited.
SESSION_CALLS: dict[str, Case] = {
    "batch size": (lambda s: s.step(np.ones((3, 3))), r"must have 2 rows .*got \(3, 3\)$"),
    "features": (lambda s: s.step(np.ones((2, 4))), r"'x' must have shape \(2, 3\) or .*got \(2, 4\)"),
    "rank 1": (lambda s: s.step(np.ones(2)), r"'x' must have shape \(2, 3\) or .*got \(2,\)$"),
    "rank 4": (lambda s: s.step(np.ones((2, 1, 1, 3))), r"got \(2, 1, 1, 3\)"),
    "a scalar": (lambda s: s.step(1.0), "the input must have a batch axis.*got a scalar"),
    "None": (lambda s: s.step(None), "the input must be an array of floats.*got dtype object"),
    "texts": (lambda s: s.step([["a"] * 3] * 2), "the input must be an array of floats.*got dtype <U1"),
    "ragged": (lambda s: s.step([[1, 2, 3], [1, 2]]), "the input must be an array of numbers"),
    "dates": (lambda s: s.step(ONES.astype("M8[s]")), "got dtype datetime64"),
    "complex": (lambda s: s.step(ONES * 1j), "got dtype complex64"),
    "objects": (lambda s: s.step(ONES.astype(object)), "got dtype object"),
    "booleans": (lambda s: s.step(ONES > 0), "dtype that fits float32; got bool"),
    "empty": (lambda s: s.step(np.ones((0, 3))), r"the input must not be empty; got shape \(0, 3\)"),
    "T = 0": (lambda s: s.step(np.ones((2, 0, 3))), r"must not be empty; got shape \(2, 0, 3\)"),
    "a list": (lambda s: s.step([]), r"must not be empty; got shape \(0,\)"),
    "no names": (lambda s: s.step({}), "inputs must name at least one array; got an empty mapping"),
    "name": (lambda s: s.step({"y": ONES}), r"must name each of \['x'\] once; got \['y'\]"),
    "extra": (lambda s: s.step({"x": ONES, "y": ONES}), r"unknown \['y'\]"),
    "a number as a name": (lambda s: s.step({0: ONES}), "names of inputs must be non-empty strings; got 0"),
    "NaN": (lambda s: s.step(with_one(NAN)), r"'x' must hold finite numbers.*got nan at index \[1, 1\]"),
    "infinity": (lambda s: s.step(with_one(-INF)), r"got -inf at index \[1, 1\]"),
    "too large": (
        lambda s: s.step(with_one(1e300, "float64")),
        r"input 'x' must fit float32; got 1e\+300 at index",
    ),
    "outputs": (
        lambda s: s.step(ONES, outputs="first"),
        r"outputs must be one of \['all', 'last', 'none'\], or a list of names; got 'first'",
    ),
    "time limit": (lambda s: s.step(ONES, timeout_s=0), "timeout_s must be above 0.*got 0"),
    "message size": (
        lambda s: s.step(np.ones((2, MAX_MESSAGE_BYTES // 24 + 1, 3), np.float32)),
        r"must fit the size limits of client and server \(max_message_bytes\)",
    ),
    "reply size": (
        lambda s: s.step(np.ones((2, MAX_MESSAGE_BYTES // 16 + 1, 3), np.float16)),
        "reply to the step must be at most|size limits",
    ),
    "state: missing": (lambda s: s.reset_states({"lstm/h": H}), r"missing: \['lstm/c'\]"),
    "state: extra": (
        lambda s: s.reset_states({"lstm/h": H, "lstm/c": H, "x": H}),
        r"not of this model: \['x'\]",
    ),
    "state: list": (lambda s: s.reset_states([H]), r"one array for each of .*got 1"),
    "state: shape": (
        lambda s: s.reset_states([H[:, :7], H]),
        r"'lstm/h' must have shape \(2, 8\); got \(2, 7\)",
    ),
    "state: rows": (
        lambda s: s.reset_states([H, H[:1]]),
        r"state 'lstm/c' must have shape \(2, 8\); got \(1, 8\)",
    ),
    "state: NaN": (
        lambda s: s.reset_states([H, with_one(NAN, shape=(2, 8))]),
        r"state 'lstm/c' must hold finite numbers.*got nan at index \[0, 4\]",
    ),
    "state: too large": (
        lambda s: s.reset_states([with_one(1e300, "float64", (2, 8)), H]),
        r"state 'lstm/h' must fit float32; got 1e\+300 at index",
    ),
    "state: an array": (lambda s: s.reset_states(H), "states must be a mapping .*got ndarray"),
    "rows: too large": (lambda s: s.reset_states(rows=[2]), r"rows must be from 0 to 1.*got \[2\]"),
    "rows: negative": (lambda s: s.reset_states(rows=[-1]), r"rows must be from 0 to 1.*got \[-1\]"),
    "rows: repeated": (lambda s: s.reset_states(rows=[1, 1]), r"each at most once; got \[1, 1\]"),
    "rows: a mask": (
        lambda s: s.reset_states(rows=[True]),
        r"rows must be booleans of shape \(2,\), or a list of indexes; got 1 booleans",
    ),
    "rows: a float": (lambda s: s.reset_states(rows=[0.5]), "rows must be integers or booleans; got 0.5"),
    "step rows: none": (lambda s: s.step(ONES, rows=[]), "rows must select at least one row; got none"),
    "step rows: too large": (lambda s: s.step(ONES, rows=[2]), r"rows must be from 0 to 1.*got \[2\]"),
    "step rows: inputs of all": (
        lambda s: s.step(np.ones((2, 3)), rows=[1]),
        r"the input must have 1 row on its first axis \(len\(rows\)\), .*; got \(2, 3\)$",
    ),
    "reset: numbers": (
        lambda s: s.step(np.ones((2, 5, 3)), reset=[0, 1]),
        r"reset must be booleans of shape \(2,\) or \(2, 5\); got int64 of shape \(2,\)",
    ),
    "reset: of other rows": (
        lambda s: s.trace(np.ones((1, 5, 3)), reset=[True, False], rows=[1]),
        r"reset must be booleans of shape \(1,\) or \(1, 5\); got bool of shape \(2,\)",
    ),
    "reset: features for time steps": (
        lambda s: s.step(np.ones((2, 3)), reset=np.ones((2, 3), np.bool_)),
        "reset_mask must be empty or one for each of 2 rows; got 6",
    ),
    "output that is not there": (
        lambda s: s.step(np.ones((2, 3)), outputs=["q"]),
        r"output_names must be among \['y'\]; got 'q'",
    ),
    "time": (
        lambda s: s.step(np.ones((2, 3)), time="none"),
        r"time must be one of \['all', 'last'\]; got 'none'",
    ),
    "states": (
        lambda s: s.step(np.ones((2, 3)), states=True),
        r"states must be one of \['all', 'last', 'none'\]; got True",
    ),
    "rows: wrong state": (
        lambda s: s.reset_states([H, H], rows=[1]),
        r"must have shape \(1, 8\); got \(2, 8\)",
    ),
    "fork: id": (lambda s: s.fork("a\nb"), r"session_id must be 1 to 256 printable .*'a\\nb'"),
    "fork: itself": (
        lambda s: s.fork(s.id),
        "new_session_id must be new; session '.*' is open",
        SessionExistsError,
    ),
}


@pytest.mark.parametrize("name", SESSION_CALLS)
def test_of_a_session(served: Served, name: str) -> None:
    call, words, kind = expected(SESSION_CALLS[name])
    with served.session("seq", ROWS) as session_id, served.nothing_changes(session_id):
        session = served.client.open_session("seq", batch_size=ROWS, session_id=session_id)
        with pytest.raises(kind, match=words):
            call(session)
        assert session.revision == 1


async def test_of_async_sessions(served: Served) -> None:
    """All of them, one after the other in one loop."""
    async with stepwell.aio.connect(served.address) as client:
        for name, case in SESSION_CALLS.items():
            call, words, kind = expected(case)
            with served.session("seq", ROWS) as session_id, served.nothing_changes(session_id):
                session = await client.open_session("seq", batch_size=ROWS, session_id=session_id)
                with pytest.raises(kind, match=words):
                    await call(session)
                assert session.revision == 1, name


CLIENT_CALLS: dict[str, Case] = {
    "unknown model": (
        lambda c: c.open_session("none"),
        r"model must be one of \[.*'seq'.*got 'none'",
        ModelNotFoundError,
    ),
    "no model": (lambda c: c.open_session(""), "model must be the name of a model; got ''"),
    "unknown model of many": (lambda c: c.open_sessions("none", 2), "got 'none'", ModelNotFoundError),
    "unknown model to predict": (lambda c: c.predict("none", ONES), "got 'none'", ModelNotFoundError),
    "unknown model to list": (lambda c: c.sessions(model="none"), "got 'none'", ModelNotFoundError),
    "unknown session": (
        lambda c: c.session_info("none"),
        "that of an open session; got 'none'",
        SessionNotFoundError,
    ),
    "unknown session to close": (lambda c: c.close_session("none"), "got 'none'", SessionNotFoundError),
    "0 as an id": (
        lambda c: c.open_session("seq", session_id=0),
        "session_id must be a string; got 0",
    ),
    "an empty id": (lambda c: c.open_session("seq", session_id=""), "1 to 256 .*got 0 characters, ''"),
    "10,000 characters": (lambda c: c.open_session("seq", session_id="x" * 10_000), "got 10000 characters"),
    "control characters": (lambda c: c.open_session("seq", session_id="a\0b"), r"'a\\x00b'"),
    "a lone surrogate": (lambda c: c.open_session("seq", session_id="a\udc80"), "printable"),
    "space after": (lambda c: c.open_session("seq", session_id="a "), "without leading or trailing space"),
    "batch size 0": (lambda c: c.open_session("seq", batch_size=0), "batch_size must be at least 1; got 0"),
    "batch size -1": (
        lambda c: c.open_session("seq", batch_size=-1),
        "batch_size must be at least 1; got -1",
    ),
    "batch size 1.5": (
        lambda c: c.open_session("seq", batch_size=1.5),
        "batch_size must be an integer; got 1.5",
    ),
    "batch size": (
        lambda c: c.open_session("seq", batch_size=10**6),
        "batch_size must be 1 to .*got 1000000",
    ),
    "no sessions": (lambda c: c.open_sessions("seq", 0), "n must be at least 1; got 0"),
    "too many sessions": (lambda c: c.open_sessions("seq", 65_537), "1 to 65536; got 65537"),
    "ids": (lambda c: c.open_sessions("seq", 2, session_ids=["a"]), "session_ids must have n = 2 ids; got 1"),
    "resume without ids": (
        lambda c: c.open_sessions("seq", 2, resume=True),
        "session_ids must be given with resume=True; got None",
    ),
    "resume that is no bool": (
        lambda c: c.open_sessions("seq", 1, session_ids=["a"], resume="no"),
        "resume must be True or False; got 'no'",
    ),
    "state": (
        lambda c: c.open_session("seq", batch_size=2, state=[H, H[:1]]),
        r"'lstm/c' must have shape \(2, 8\)",
    ),
    "state: NaN": (
        lambda c: c.open_session("seq", batch_size=2, state=[H, with_one(NAN, shape=(2, 8))]),
        "state 'lstm/c' must hold finite numbers",
    ),
    "predict: shape": (lambda c: c.predict("seq", np.ones((5, 2))), r"\(5, 3\) or \(5, T, 3\); got \(5, 2\)"),
    "predict: NaN": (lambda c: c.predict("seq", with_one(NAN)), "input 'x' must hold finite numbers"),
    "predict: one row": (
        lambda c: c.predict("seq", ONES[0]),
        r"'x' must have shape \(3, 3\) or \(3, T, 3\); got \(3,\): did you mean x\[None\]\?",
    ),
    "predict: state": (lambda c: c.predict("seq", ONES, [H, H[:1]]), r"'lstm/c' must have shape \(2, 8\)"),
    "predict: token": (lambda c: c.predict("tokens", [[1, 9]]), "inputs must be ones that the model can run"),
    "predict: float": (lambda c: c.predict("tokens", [[1.0]]), "dtype that fits int32; got float64"),
}


@pytest.mark.parametrize("name", CLIENT_CALLS)
def test_of_a_client(served: Served, name: str) -> None:
    call, words, kind = expected(CLIENT_CALLS[name])
    with served.nothing_changes():
        before = [info.session_id for info in served.client.sessions()]
        with pytest.raises(kind, match=words):
            call(served.client)
        assert [info.session_id for info in served.client.sessions()] == before


def test_of_a_group(served: Served) -> None:
    """What is wrong with the whole is refused here; members at fault are told apart in `test_sdk_server`."""
    with served.client.open_sessions("seq", 4) as group, served.nothing_changes(*group.ids):
        for call, words in (
            (lambda: group.step(np.ones((3, 3))), r"must have 4 rows .*got \(3, 3\)$"),
            (lambda: group.step(np.ones((4, 2))), r"\(4, 3\) or \(4, T, 3\); got \(4, 2\)"),
            (lambda: group.reset_states(rows=[4]), r"rows must be from 0 to 3.*got \[4\]"),
            (lambda: group.reset_states([np.ones((4, 8))]), "one array for each of .*got 1"),
        ):
            with pytest.raises(InvalidInputError, match=words):
                call()


def test_a_message_over_the_limit_harms_no_other_call(served: Served) -> None:
    """A frame that this side refuses to send leaves the stream that others share as it was."""
    with (
        stepwell.connect(served.address, max_message_bytes=1 << 20) as client,
        client.open_sessions("seq", 2) as large,
        client.open_sessions("seq", 2) as small,
    ):
        small.step(np.ones((2, 3)))
        stream = client._driver.connections.to(
            None
        ).link._stream  # another one in its place would answer just the same
        with (
            served.nothing_changes(*large.ids),
            pytest.raises(InvalidInputError, match="max_message_bytes"),
        ):
            large.step(np.ones((2, 50_000, 3), np.float32))
        assert client._driver.connections.to(None).link._stream is stream
        assert stream is not None
        assert stream.error is None
