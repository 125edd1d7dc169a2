"""The table of what is refused, part two: sessions, models, revisions, and frames of several sessions.

As part one (`test_refusals`), with status, reason and metadata where they are not the same for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration

from stepwell.v1 import models_pb2
from stepwell.v1 import sessions_pb2 as pb
from stepwell_server.rpc.page_tokens import to_token
from support.engine.fake_executor import PLAIN, RICH
from support.peers import wire
from support.peers.wire import Refusal, tensor
from support.rpc.calls import BAD_ARGUMENT, calls

pytestmark = pytest.mark.stores("memory", "fake_shared")

MODELS = {"plain": PLAIN, "rich": RICH}
ROWS = 2


def ones(*shape: int) -> Any:
    return np.ones(shape, np.float32)


GOOD = [tensor(ones(ROWS, 2))]


# Revisions of another time; the session is at revision 3, and its last change had request id 33.
REVISIONS: dict[str, tuple[int, int]] = {
    "stale": (1, 5),
    "stale, with the last request id": (1, 33),
    "the last one with another request id": (2, 34),
    "the last one with an older request id": (2, 32),
    "the last one without a request id": (2, 0),
    "of the future": (4, 5),
    "of the future, with the last request id": (4, 33),
    "of the end of days": (2**64 - 1, 33),
    "the first": (0, 5),
}


@pytest.mark.parametrize("name", REVISIONS)
async def test_revisions(name: str) -> None:
    expected, request_id = REVISIONS[name]
    async with calls() as at:
        await at.call(pb.OpenSessionRequest(model="plain", session_id="a", batch_size=ROWS))
        for revision in range(3):
            step = pb.StepRequest(session_id="a", inputs=GOOD)
            step.expected_revision, step.request_id = revision, 31 + revision
            await at.call(step)
        before = await at.everything()
        once: dict[str, Any] = {"expected_revision": expected, "request_id": request_id}
        each: dict[str, Any] = {
            "expected_revisions": [expected],
            "request_ids": [request_id] if request_id else [],
        }
        metadata = {"session_id": "a", "expected_revision": str(expected), "actual_revision": "3"}
        for refused in (
            await at.refused(pb.StepRequest(session_id="a", inputs=GOOD, **once)),
            await at.refused(pb.ResetStatesRequest(session_id="a", **once)),
            await at.refused(pb.ForkSessionRequest(session_id="a", expected_revision=expected)),
            await at.only_member(wire.step_frame(1, ["a"], GOOD, **each)),
            await at.only_member(wire.reset_frame(1, ["a"], **each)),
        ):
            message = f"expected_revision of session 'a' must be its revision 3; got {expected}"
            assert refused == Refusal("ABORTED", "REVISION_CONFLICT", message, metadata)
        assert await at.everything() == before


# Ids of sessions that cannot be, and how a message shows them.
IDS = {
    "10,000 characters": ("x" * 10_000, "10000 characters, 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx'..."),
    "257 characters": ("ä" * 257, "257 characters, 'ääääääääääääääääääääääääääääääää'..."),
    "a line break": ("user\n42", r"'user\n42'"),
    "a NUL": ("user\0", r"'user\x00'"),
    "an escape": ("\x1b[31muser", r"'\x1b[31muser'"),
    "a delete": ("user\x7f", r"'user\x7f'"),
    "a turned text": ("user\u202e42", r"'user\u202e42'"),
    "space before": (" user", "' user'"),
    "space after": ("user ", "'user '"),
    "only space": (" ", "' '"),
    "a wide space after": ("user\u3000", r"'user\u3000'"),
}
ID_RULE = "must be 1 to 256 printable characters without leading or trailing space; got "


def calls_by_id(session_id: str) -> Sequence[Any]:
    """The calls that name one session."""
    return [
        pb.StepRequest(session_id=session_id, inputs=GOOD),
        pb.ResetStatesRequest(session_id=session_id),
        pb.GetStateRequest(session_id=session_id),
        pb.GetSessionRequest(session_id=session_id),
        pb.CloseSessionRequest(session_id=session_id),
        pb.ForkSessionRequest(session_id=session_id),
        pb.ForkSessionsRequest(session_ids=[session_id]),
    ]


@pytest.mark.parametrize("name", IDS)
async def test_what_is_no_id(name: str) -> None:
    """It opens nothing, and as the name of a session it is that of none."""
    bad, shown = IDS[name]
    async with calls() as at:
        session_id = await at.opened()
        before = await at.everything()
        for argument, request in (
            ("session_id", pb.OpenSessionRequest(model="plain", session_id=bad)),
            ("session_ids", pb.OpenSessionsRequest(model="plain", session_ids=["fine", bad])),
            ("new_session_id", pb.ForkSessionRequest(session_id=session_id, new_session_id=bad)),
            ("new_session_ids", pb.ForkSessionsRequest(session_ids=[session_id], new_session_ids=[bad])),
        ):
            message = f"{argument} {ID_RULE}{shown}"
            assert await at.refused(request) == Refusal(*BAD_ARGUMENT, message)
        not_there = f"session_id must be that of an open session; got {shown}"
        gone = Refusal("NOT_FOUND", "SESSION_NOT_FOUND", not_there, {"session_id": bad[:256]})
        for request in calls_by_id(bad):
            assert await at.refused(request) == gone
        assert await at.everything() == before


@pytest.mark.parametrize(
    "session_id", ["0", "00", "a", "x" * 256, "user 42", "Jürgen/42", "日本", "🙂", "%s{}\\", "s-0"]
)
async def test_what_is_an_id_is_taken_as_it_is(session_id: str) -> None:
    async with calls() as at:
        opened = await at.call(pb.OpenSessionRequest(model="plain", session_id=session_id, batch_size=ROWS))
        assert opened.session.session_id == session_id
        assert (await at.call(pb.StepRequest(session_id=session_id, inputs=GOOD))).revision == 1
        assert (await at.call(pb.GetStateRequest(session_id=session_id))).session.session_id == session_id
        assert (await at.call(pb.CloseSessionsRequest(session_ids=[session_id]))).closed == 1


async def test_an_id_that_is_missing_is_the_callers_mistake() -> None:
    """Left out or misspelt, it arrives as empty: no session has ended, and none is to be opened anew."""
    missing = Refusal(*BAD_ARGUMENT, "session_id must be that of an open session; got none")
    async with calls() as at:
        before = await at.everything()
        for request in calls_by_id(""):
            assert await at.refused(request) == missing
        for ids in ([""], ["", "gone"]):
            for frame in (
                wire.step_frame(1, ids, [tensor(ones(len(ids), 2))], batch_sizes=[1] * len(ids)),
                wire.reset_frame(2, ids),
            ):
                refusals = wire.of_members(await at.exchange(frame), len(ids))
                assert refusals.pop(0) == missing
                assert [refused.reason for refused in refusals.values()] == ["SESSION_NOT_FOUND"] * len(
                    refusals
                )
        assert await at.everything() == before


@pytest.mark.parametrize("was_closed", [False, True])
async def test_sessions_that_are_not_there(was_closed: bool) -> None:
    async with calls() as at:
        if was_closed:
            await at.call(pb.OpenSessionRequest(model="plain", session_id="gone"))
            await at.call(pb.CloseSessionRequest(session_id="gone"))
        message = "session_id must be that of an open session; got 'gone'"
        if was_closed:
            message = "session 'gone' was closed"
        for request in calls_by_id("gone"):
            refused = await at.refused(request)
            assert refused == Refusal("NOT_FOUND", "SESSION_NOT_FOUND", message, {"session_id": "gone"})
        assert not await at.everything()


@pytest.mark.parametrize("model", ["nothing", "", "PLAIN", "plain ", "x" * 400, "a\nb"])
async def test_models_that_are_not_there(model: str) -> None:
    async with calls(MODELS) as at:
        requests: list[Any] = [
            pb.OpenSessionRequest(model=model),
            pb.OpenSessionsRequest(model=model, count=2),
            models_pb2.GetModelRequest(name=model),
            models_pb2.PredictRequest(model=model, inputs=GOOD),
        ]
        if model:  # the sessions of all models are listed without
            requests.append(pb.ListSessionsRequest(model=model))
        message = f"model must be one of ['plain', 'rich']; got {model!r}"
        for request in requests:
            refused = await at.refused(request)
            assert refused == Refusal("NOT_FOUND", "MODEL_NOT_FOUND", message, {"model": model[:256]})
        assert not await at.everything()


# Openings, forks, lists and closings; a session "in use" of model plain is at revision 1.
IN_USE = ("ALREADY_EXISTS", "SESSION_EXISTS")
MAX_IDLE_RULE = "0 for no limit, or from 1 s to 315360000 s"
ALL_RULE = "all must be true without model, session_id_prefix and idle_longer, and false with any of them"
WHOLE_CALLS: dict[str, tuple[Any, tuple[str, str, str]]] = {
    "another fingerprint": (
        pb.OpenSessionRequest(model="plain", model_fingerprint="f00d"),
        (
            "FAILED_PRECONDITION",
            "MODEL_MISMATCH",
            "model_fingerprint must be that of model 'plain', f-plain; got f00d",
        ),
    ),
    "more rows than there are": (
        pb.OpenSessionRequest(model="plain", batch_size=65),
        (*BAD_ARGUMENT, "batch_size must be 1 to resident_rows, 64; got 65"),
    ),
    "the most rows of all": (
        pb.OpenSessionsRequest(model="plain", count=1, batch_size=2**32 - 1),
        (*BAD_ARGUMENT, "batch_size must be 1 to resident_rows, 64; got 4294967295"),
    ),
    "no count": (
        pb.OpenSessionsRequest(model="plain"),
        (*BAD_ARGUMENT, "count must be 1 to 65536; got 0"),
    ),
    "too large a count": (
        pb.OpenSessionsRequest(model="plain", count=65_537),
        (*BAD_ARGUMENT, "count must be 1 to 65536; got 65537"),
    ),
    "another count than ids": (
        pb.OpenSessionsRequest(model="plain", count=3, session_ids=["fine", "good"]),
        (*BAD_ARGUMENT, "count must be 0 or the number of session_ids, 2; got 3"),
    ),
    "an id twice": (
        pb.OpenSessionsRequest(model="plain", session_ids=["fine", "good", "fine"]),
        (*BAD_ARGUMENT, "session_ids must not repeat an id; got one twice"),
    ),
    "an id that is missing": (
        pb.OpenSessionsRequest(model="plain", session_ids=["fine", ""]),
        (*BAD_ARGUMENT, f"session_ids {ID_RULE}''"),
    ),
    "an id in use among several": (
        pb.OpenSessionsRequest(model="plain", session_ids=["fine", "in use"]),
        (*IN_USE, "session_ids must be new; session 'in use' is open"),
    ),
    "an id in use that must be new": (
        pb.OpenSessionRequest(model="plain", session_id="in use", must_be_new=True, request_id=5),
        (*IN_USE, "session_id must be new; session 'in use' is open"),
    ),
    "an id in use with other rows": (
        pb.OpenSessionRequest(model="plain", session_id="in use", batch_size=3),
        (
            *IN_USE,
            "session 'in use' is open with model 'plain' and batch_size 2; got model 'plain' and batch_size 3",
        ),
    ),
    "an id in use with another model": (
        pb.OpenSessionRequest(model="rich", session_id="in use", batch_size=2),
        (
            *IN_USE,
            "session 'in use' is open with model 'plain' and batch_size 2; got model 'rich' and batch_size 2",
        ),
    ),
    "a fork onto itself": (
        pb.ForkSessionRequest(session_id="in use", new_session_id="in use"),
        (*IN_USE, "new_session_id must be new; session 'in use' is open"),
    ),
    "states of nobody": (
        pb.GetStatesRequest(),
        (*BAD_ARGUMENT, "session_ids must have 1 to 4096 entries; got 0"),
    ),
    "states of too many": (
        pb.GetStatesRequest(session_ids=[str(i) for i in range(4097)]),
        (*BAD_ARGUMENT, "session_ids must have 1 to 4096 entries; got 4097"),
    ),
    "the state of one twice": (
        pb.GetStatesRequest(session_ids=["in use", "other", "in use"]),
        (*BAD_ARGUMENT, "session_ids must name each session once; 'in use' came twice"),
    ),
    "a fork of nobody": (
        pb.ForkSessionsRequest(new_session_ids=["fine"]),
        (*BAD_ARGUMENT, "session_ids must have 1 to 65536 entries; got 0"),
    ),
    "too many forks": (
        pb.ForkSessionsRequest(session_ids=["in use"] * 65_537),
        (*BAD_ARGUMENT, "session_ids must have 1 to 65536 entries; got 65537"),
    ),
    "another number of forks": (
        pb.ForkSessionsRequest(session_ids=["in use"], new_session_ids=["fine", "good"]),
        (*BAD_ARGUMENT, "new_session_ids must be empty or one for each of session_ids (1); got 2"),
    ),
    "a fork twice": (
        pb.ForkSessionsRequest(session_ids=["in use"] * 2, new_session_ids=["fine", "fine"]),
        (*BAD_ARGUMENT, "new_session_ids must not repeat an id; got one twice"),
    ),
    "a fork onto one in use": (
        pb.ForkSessionsRequest(session_ids=["in use"] * 2, new_session_ids=["fine", "in use"]),
        (*IN_USE, "new_session_ids must be new; session 'in use' is open"),
    ),
    "a fork of one that is not there": (
        pb.ForkSessionsRequest(session_ids=["in use", "nobody"]),
        (
            "NOT_FOUND",
            "SESSION_NOT_FOUND",
            "session_id must be that of an open session; got 'nobody'",
        ),
    ),
    "revisions of other forks": (
        pb.ForkSessionsRequest(session_ids=["in use"], expected_revisions=[1, 1]),
        (*BAD_ARGUMENT, "expected_revisions must be empty or have one entry per session (1); got 2"),
    ),
    "a fork of another revision": (
        pb.ForkSessionsRequest(session_ids=["in use"] * 2, expected_revisions=[1, 2]),
        (
            "ABORTED",
            "REVISION_CONFLICT",
            "expected_revision of session 'in use' must be its revision 1; got 2",
        ),
    ),
    "a page that is too large": (
        pb.ListSessionsRequest(page_size=10_001),
        (*BAD_ARGUMENT, "page_size must be at most 10000; got 10001"),
    ),
    **{
        f"page token {token!r:.10}": (
            pb.ListSessionsRequest(page_token=token),
            (*BAD_ARGUMENT, f"page_token must be the next_page_token of the previous page; got {shown}"),
        )
        for token, shown in [
            *((token, repr(token)) for token in ("junk", "page-03", "a", "é", "\0", "=")),
            *(
                (token, repr(token))
                for token in (to_token("a") + "=", to_token("b")[:-1], to_token("c") + "A")
            ),
            ("x" * 300, f"300 characters, '{'x' * 32}'..."),
        ]
    },
    "too many to close": (
        pb.CloseSessionsRequest(session_ids=["in use"] * 4097),
        (*BAD_ARGUMENT, "session_ids must be at most 4096; got 4097"),
    ),
    "a position of some rows": (
        pb.ResetStatesRequest(session_id="in use", rows=[0], position=5),
        (
            *BAD_ARGUMENT,
            "position must be 0 without a state or with rows, because it belongs to a whole state; got 5",
        ),
    ),
    "a time that is negative": (
        pb.ListSessionsRequest(idle_longer=Duration(seconds=-1)),
        (*BAD_ARGUMENT, "idle_longer must be from 0 to 315576000000 s; got -1 s"),
    ),
    "a time that is none": (
        pb.ExportSessionsRequest(idle_longer=Duration(nanos=-1)),
        (*BAD_ARGUMENT, "idle_longer must have nanos from 0 to 999999999; got -1"),
    ),
    "nothing to close": (
        pb.CloseMatchingSessionsRequest(),
        (*BAD_ARGUMENT, f"{ALL_RULE}; got false"),
    ),
    "all and a filter": (
        pb.CloseMatchingSessionsRequest(all=True, session_id_prefix="in"),
        (*BAD_ARGUMENT, f"{ALL_RULE}; got true"),
    ),
    "too many to close in a page": (
        pb.CloseMatchingSessionsRequest(all=True, page_size=10_001),
        (*BAD_ARGUMENT, "page_size must be at most 10000; got 10001"),
    ),
    **{
        f"a limit of {shown} s": (
            pb.OpenSessionRequest(model="plain", max_idle=Duration(seconds=seconds, nanos=nanos)),
            (*BAD_ARGUMENT, f"max_idle must be {rule}; got {shown}"),
        )
        for seconds, nanos, rule, shown in (
            (0, 999_999_999, MAX_IDLE_RULE, "0.999999999 s"),
            (315_360_001, 0, MAX_IDLE_RULE, "315360001 s"),
            (2**62, 0, "from 0 to 315576000000 s", f"{2**62} s"),
        )
    },
    "a negative limit": (
        pb.OpenSessionsRequest(model="plain", count=1, max_idle=Duration(seconds=-1)),
        (*BAD_ARGUMENT, "max_idle must be from 0 to 315576000000 s; got -1 s"),
    ),
    "a limit with negative nanos": (
        pb.ForkSessionRequest(session_id="in use", max_idle=Duration(seconds=5, nanos=-1)),
        (*BAD_ARGUMENT, "max_idle must have nanos from 0 to 999999999; got -1"),
    ),
    "a limit of forks that is too short": (
        pb.ForkSessionsRequest(session_ids=["in use"], max_idle=Duration(nanos=1)),
        (*BAD_ARGUMENT, f"max_idle must be {MAX_IDLE_RULE}; got 0.000000001 s"),
    ),
    "sessions and filters to export": (
        pb.ExportSessionsRequest(session_ids=["in use"], model="plain"),
        (*BAD_ARGUMENT, "session_ids must be empty with model, session_id_prefix or idle_longer; got both"),
    ),
    "too many to export": (
        pb.ExportSessionsRequest(session_ids=["in use"] * 1001),
        (*BAD_ARGUMENT, "session_ids must be at most 1000; got 1001"),
    ),
    "a page of other sessions": (
        pb.ExportSessionsRequest(session_ids=["in use"], page_token=to_token("a")),
        (*BAD_ARGUMENT, "page_token must belong to a page of the same session_ids; got another one"),
    ),
    "too many to import": (
        pb.ImportSessionsRequest(sessions=[pb.ExportedSession(session_id="in use")] * 1001),
        (*BAD_ARGUMENT, "sessions must be at most 1000; got 1001"),
    ),
    "an import that is none": (
        pb.ImportSessionsRequest(existing=9),  # type: ignore[arg-type]
        (*BAD_ARGUMENT, "existing must be one of stepwell.v1.ExistingSession; got 9"),
    ),
    "one to close that is missing": (
        pb.CloseSessionsRequest(session_ids=["in use", ""]),
        (*BAD_ARGUMENT, "session_ids must not be empty strings; got one"),
    ),
}


@pytest.mark.parametrize("name", WHOLE_CALLS)
async def test_whole_calls(name: str) -> None:
    request, wanted = WHOLE_CALLS[name]
    async with calls(MODELS) as at:
        await at.call(pb.OpenSessionRequest(model="plain", session_id="in use", batch_size=ROWS))
        await at.call(pb.StepRequest(session_id="in use", inputs=GOOD))
        before = await at.everything()
        refused = await at.refused(request)
        assert (refused.code, refused.reason, refused.message) == wanted
        assert await at.everything() == before


# Frames over "plain 1" of one row and "plain 2" of two; fields are those of StepFrame, and of ResetFrame where it has
# them: there the inputs are states.
PAIR = ["plain 1", "plain 2"]
SIZES = "batch_sizes must be 1 to 2147483648; got "
PER_SESSION = " must be empty or have one entry per session (2); got "
UNCERTAIN = (
    "batch_sizes must be given for a frame with several missing sessions:"
    " rows cannot be assigned to sessions without "
)
FRAMES: dict[str, tuple[dict[str, Any], str]] = {
    "no sessions": ({"session_ids": []}, "session_ids must have 1 to 65536 entries; got 0"),
    "too many sessions": (
        {"session_ids": [str(i) for i in range(65_537)]},
        "session_ids must have 1 to 65536 entries; got 65537",
    ),
    "a session twice": (
        {"session_ids": ["plain 1", "plain 1"]},
        "session_ids must name each session once; 'plain 1' came twice",
    ),
    "nobody twice": (
        {"session_ids": ["plain 1", "nobody", "plain 2", "nobody"]},
        "session_ids must name each session once; 'nobody' came twice",
    ),
    "sessions of two models": (
        {"session_ids": ["plain 1", "rich 2"]},
        "session_ids must be sessions of one model; got sessions of several",
    ),
    "one revision for two": ({"expected_revisions": [1]}, f"expected_revisions{PER_SESSION}1"),
    "three revisions for two": ({"expected_revisions": [1, 1, 1]}, f"expected_revisions{PER_SESSION}3"),
    "one request id for two": ({"request_ids": [1]}, f"request_ids{PER_SESSION}1"),
    "three request ids for two": ({"request_ids": [1, 2, 3]}, f"request_ids{PER_SESSION}3"),
    "one batch size for two": ({"batch_sizes": [1]}, f"batch_sizes{PER_SESSION}1"),
    "three batch sizes for two": ({"batch_sizes": [1, 2, 3]}, f"batch_sizes{PER_SESSION}3"),
    "a batch size of 0": ({"batch_sizes": [1, 0], "inputs": ones(1, 2)}, f"{SIZES}0"),
    "a batch size of 0 and NaN": ({"batch_sizes": [0, 1], "inputs": ones(1, 2) * np.nan}, f"{SIZES}0"),
    "a last batch size of 0 and NaN": ({"batch_sizes": [1, 0], "inputs": ones(1, 2) * np.nan}, f"{SIZES}0"),
    "the largest batch sizes": ({"batch_sizes": [2**32 - 1, 2**32 - 1]}, f"{SIZES}4294967295"),
    "more rows than said": ({"batch_sizes": [1, 2], "inputs": ones(4, 2)}, "SHAPE (4, 2)"),
    "fewer rows than said": ({"batch_sizes": [1, 2], "inputs": ones(2, 2)}, "SHAPE (2, 2)"),
    "more rows than there are": ({"inputs": ones(4, 2)}, "SHAPE (4, 2)"),
    "fewer rows than there are": ({"inputs": ones(2, 2)}, "SHAPE (2, 2)"),
    "several that are gone, and it is not certain whose rows are whose": (
        {"session_ids": ["gone", "plain 1", "too"], "inputs": ones(5, 2)},
        UNCERTAIN + "['gone', 'too']",
    ),
}


@pytest.mark.parametrize("name", FRAMES)
async def test_frames_that_are_refused_as_a_whole(name: str) -> None:
    changes, message = FRAMES[name]
    fields: dict[str, Any] = {"session_ids": PAIR, "inputs": ones(3, 2)} | changes
    values = [tensor(fields.pop("inputs"))]
    step = pb.StepStreamRequest(frame_id=4, step=pb.StepFrame(inputs=values, **fields))
    reset = pb.StepStreamRequest(frame_id=5, reset=pb.ResetFrame(state=values, **fields))
    async with calls(MODELS) as at:
        await at.opened(batch_size=1)
        await at.opened(batch_size=2)
        await at.opened("rich")
        before = await at.everything()
        answers = await at.exchange(step, reset, pb.StepStreamRequest(frame_id=2**64 - 1))
        answers.sort(key=lambda answer: answer.frame_id)  # one that waits for the store is answered later
        assert [answer.frame_id for answer in answers] == [4, 5, 2**64 - 1], "the stream goes on"
        assert not any(entry.members for answer in answers for entry in answer.errors)
        for answer, said in zip(
            answers,
            (
                message.replace("SHAPE", "input 'x' must have shape (3, 2) or (3, T, 2); got"),
                message.replace("SHAPE", "state 'sum' must have shape (3, 2); got"),
                "change must be step or reset; got neither",
            ),
            strict=True,
        ):
            assert wire.of_members([answer], 1)[0] == Refusal(*BAD_ARGUMENT, said)
        assert await at.everything() == before


def gone(session_id: str, shown: str) -> Refusal:
    message = f"session_id must be that of an open session; got {shown}"
    return Refusal("NOT_FOUND", "SESSION_NOT_FOUND", message, {"session_id": session_id[:256]})


def conflict(session_id: str, expected: int) -> Refusal:
    return Refusal(
        "ABORTED",
        "REVISION_CONFLICT",
        f"expected_revision of session {session_id!r} must be its revision 1; got {expected}",
        {"session_id": session_id, "expected_revision": str(expected), "actual_revision": "1"},
    )


#: Members at fault beside good ones: the sessions, their rows, other fields, and the refusals by member.
MEMBERS: dict[str, tuple[list[str], list[int], dict[str, Any], dict[int, Refusal]]] = {
    "one is gone": (["plain 1", "gone", "plain 2"], [1, 2, 2], {}, {1: gone("gone", "'gone'")}),
    "the first is gone": (["gone", "plain 1", "plain 2"], [3, 1, 2], {}, {0: gone("gone", "'gone'")}),
    "several are gone": (
        ["gone", "plain 1", "gone too", "plain 2", ""],
        [2, 1, 3, 2, 1],
        {},
        {
            0: gone("gone", "'gone'"),
            2: gone("gone too", "'gone too'"),
            4: Refusal(*BAD_ARGUMENT, "session_id must be that of an open session; got none"),
        },
    ),
    "all are gone": (["gone", "too"], [1, 2], {}, {0: gone("gone", "'gone'"), 1: gone("too", "'too'")}),
    "one of another batch size": (
        PAIR,
        [2, 2],
        {},
        {0: Refusal(*BAD_ARGUMENT, "batch_sizes must be the sessions' own; session 'plain 1' has 1, got 2")},
    ),
    "one at another revision": (
        PAIR,
        [1, 2],
        {"expected_revisions": [9, 1], "request_ids": [5, 6]},
        {0: conflict("plain 1", 9)},
    ),
    "one that was never there and one at another revision": (
        ["plain 2", "x\n" * 5_000, "plain 1"],
        [2, 1, 1],
        {"expected_revisions": [0, 0, 1], "request_ids": [5, 6, 8]},
        {
            0: conflict("plain 2", 0),
            1: gone("x\n" * 5_000, "10000 characters, " + repr("x\n" * 16) + "..."),
        },
    ),
}


@pytest.mark.parametrize("steps", [0, 4])
@pytest.mark.parametrize("name", MEMBERS)
async def test_members_at_fault_beside_good_ones(name: str, steps: int) -> None:
    ids, sizes, fields, failing = MEMBERS[name]
    shape = (sum(sizes), steps, 2) if steps else (sum(sizes), 2)
    x = np.random.default_rng(steps).standard_normal(shape).astype(np.float32)
    starts = np.cumsum([0, *sizes]).tolist()
    async with calls() as at:
        await at.opened(batch_size=1)
        await at.opened(batch_size=2)
        before = dict(zip(PAIR, await at.everything(), strict=True))
        known: dict[int, bytes] = {}
        for i in (i for i in range(len(ids)) if i not in failing):
            state = (await at.call(pb.GetStateRequest(session_id=ids[i]))).state
            inputs = [tensor(x[starts[i] : starts[i + 1]])]
            predicted = await at.call(models_pb2.PredictRequest(model="plain", inputs=inputs, state=state))
            known[i] = predicted.outputs[0].data
        frame = wire.step_frame(1, ids, [tensor(x)], batch_sizes=sizes, **fields)
        answers = await at.exchange(frame)
        assert wire.of_members(answers, len(ids)) == failing
        assert {i: rows["y"].tobytes() for i, rows in wire.rows_of(answers, sizes).items()} == known
        after = dict(zip(PAIR, await at.everything(), strict=True))
        assert {name for name in PAIR if after[name] != before[name]} == {ids[i] for i in known}


async def test_an_id_that_a_server_made_is_in_use_as_long_as_its_session_is_there() -> None:
    """And then it is gone: no call begins it anew."""
    async with calls() as at:
        opened = await at.call(pb.OpenSessionRequest(model="plain"))
        name = opened.session.session_id
        await at.call(pb.OpenSessionRequest(model="plain", session_id="source"))
        anew = (
            pb.OpenSessionRequest(model="plain", session_id=name, must_be_new=True),
            pb.OpenSessionsRequest(model="plain", session_ids=["fine", name]),
            pb.ForkSessionRequest(session_id="source", new_session_id=name),
        )
        for request in anew:
            assert (await at.refused(request)).code == "ALREADY_EXISTS", request
        await at.call(pb.CloseSessionRequest(session_id=name))
        for request in anew:
            assert (await at.refused(request)).code == "NOT_FOUND", request
