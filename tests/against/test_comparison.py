"""What `make against` compares, and what it leaves out: recorded answers that differ in one field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from against import answers, builds, differences, programs
from against.answers import Answer
from against.differences import Difference, Exchange, Place, Report, WantedError
from against.malformed_calls import depends_on_time, patient
from stepwell.v1 import errors_pb2, models_pb2, tensors_pb2
from stepwell.v1 import sessions_pb2 as pb
from support.checks.actions import Change
from support.peers import malformed_messages
from support.peers.http2 import framed

PLACE = Place("native front, memory store", "program 3 of seq", 7)
WANTED = """
[[difference]]
call = "Step reused"
what = "end"
base = "ABORTED REVISION_CONFLICT"
tree = "INVALID_ARGUMENT .*"
reason = "as the protocol says"
"""


def tensor(*numbers: int, name: str = "y", rows: int = 1) -> tensors_pb2.Tensor:
    shape = [rows, len(numbers) // rows]
    return tensors_pb2.Tensor(name=name, dtype=tensors_pb2.DATA_TYPE_UINT8, shape=shape, data=bytes(numbers))


def stepped(**changed: Any) -> pb.StepResponse:
    fields: dict[str, Any] = {"revision": 4, "position": 9, "model_version": 1} | changed
    return pb.StepResponse(outputs=[tensor(1, 2)], states=[tensor(3, name="h")], **fields)


def paths(base: Answer, tree: Answer) -> list[str]:
    return [one.what for one in differences.between("Step", base, tree)]


def failed(code: int = 10, text: str = "m", reason: str = "R", facts: str = "1", delay_s: int = 0) -> Answer:
    status = status_pb2.Status(code=code, message=text)
    status.details.add().Pack(
        error_details_pb2.ErrorInfo(reason=reason, domain="stepwell", metadata={"revision": facts})
    )
    if delay_s:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromSeconds(delay_s)
        status.details.add().Pack(retry)
    return answers.failed(code, text, status.SerializeToString())


def with_output(output: tensors_pb2.Tensor) -> Message:
    reply = stepped()
    reply.outputs[0].CopyFrom(output)
    return reply


def with_outputs(names: str) -> Message:
    return pb.StepResponse(outputs=[tensor(1, name=name) for name in names])


def with_state(changed: bytes) -> Message:
    data = bytes(4000) + changed + bytes(999)
    return pb.GetStateResponse(state=[tensors_pb2.Tensor(name="h", shape=[5000], data=data)])


def session(session_id: str = "a", uid: int = 1, created_s: int | None = 5) -> Message:
    made = pb.Session(session_id=session_id, revision=3, uid=uid)
    if created_s is not None:
        made.created_time.FromSeconds(created_s)
    return pb.GetSessionResponse(session=made)


def with_unknown_field(content: int) -> Message:
    return pb.CloseSessionsResponse.FromString(bytes([0xA3, 6, 8, content, 0xA4, 6]))


#: An id that a server made, and another one.
OF_SERVERS = [f"s-0123abcd-{letter * 22}" for letter in "xy"]
INT8 = tensors_pb2.Tensor(name="y", dtype=tensors_pb2.DATA_TYPE_INT8, shape=[1, 2], data=b"\1\2")
#: Two replies or errors, and the paths of what differs.
PAIRS: dict[str, tuple[Message | Answer, Message | Answer, list[str]]] = {
    "nothing": (stepped(), stepped(), []),
    "a revision": (stepped(), stepped(revision=5), ["revision"]),
    "a position": (stepped(), stepped(position=8), ["position"]),
    "a replay": (stepped(), stepped(replayed=True), ["replayed"]),
    "a version": (stepped(), stepped(model_version=2), ["model_version"]),
    "a byte of a tensor": (stepped(), with_output(tensor(1, 3)), ["outputs[y]"]),
    "a shape": (stepped(), with_output(tensor(1, 2, rows=2)), ["outputs[y]"]),
    "a type": (stepped(), with_output(INT8), ["outputs[y]"]),
    "one bit far inside a state": (with_state(b"\0"), with_state(b"\1"), ["state[h]"]),
    "the order of outputs": (with_outputs("ab"), with_outputs("ba"), ["outputs in order"]),
    "a missing output": (with_outputs("ab"), with_outputs("a"), ["outputs[b]", "outputs in order"]),
    "a status": (failed(), failed(code=9), ["end"]),
    "a status and all else": (failed(), failed(code=3, text="n", reason="S", facts="2"), ["end"]),
    "a reason": (failed(), failed(reason="S"), ["end"]),
    "a message": (failed(), failed(text="n"), ["error text"]),
    "a fact": (failed(), failed(facts="2"), ["metadata.revision"]),
    "whether there is a delay": (failed(), failed(delay_s=1), ["retry_after_ms"]),
    "how long a delay is": (failed(delay_s=1), failed(delay_s=2), []),
    "a field that the tree does not know": (
        with_unknown_field(5),
        with_unknown_field(6),
        ["unknown field 100"],
    ),
    "the same such field": (with_unknown_field(5), with_unknown_field(5), []),
    "what is random or from the clock": (session(), session(uid=2, created_s=77), []),
    "a time that is missing": (session(), session(created_s=None), ["session.created_time"]),
    "an id": (session(), session("b"), ["session.session_id"]),
    "ids that servers make": (session(OF_SERVERS[0]), session(OF_SERVERS[1]), []),
    "such ids in messages": (
        failed(text=f"no session {OF_SERVERS[0]!r}"),
        failed(text=f"no session {OF_SERVERS[1]!r}"),
        [],
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_what_differs_is_noticed(name: str) -> None:
    *pair, expected = PAIRS[name]
    base, tree = (answers.succeeded(one) if isinstance(one, Message) else one for one in pair)
    assert paths(base, tree) == expected


def test_every_field_that_is_left_out_has_a_reason_and_exists() -> None:
    from stepwell_server.rpc.triton.inference import service_pb2

    files = (pb, models_pb2, errors_pb2, tensors_pb2, service_pb2, error_details_pb2)
    known = {
        f"{message.name}.{field}"
        for file in files
        for message in file.DESCRIPTOR.message_types_by_name.values()
        for field in message.fields_by_name
    }
    assert set(answers.NORMALISED) <= known
    assert all(answers.NORMALISED.values())
    assert all(reason for _, _, reason in answers.TEXTS)


# --- frames ---


def part(*members: int, last: bool = True, rows: int = 1, first: int = 0) -> pb.StepStreamResponse:
    """A part for these members, whose outputs are their numbers."""
    numbers = [member + first for member in members for _ in range(rows)]
    return pb.StepStreamResponse(
        frame_id=1,
        members=members,
        revisions=[5] * len(members),
        positions=[6] * len(members),
        outputs=[tensor(*numbers, rows=len(numbers))],
        last=last,
    )


def test_a_frame_in_other_parts_is_the_same_answer() -> None:
    whole = answers.of_frame([part(0, 1, 2, rows=2)], [2, 2, 2], [])
    parted = answers.of_frame([part(2, rows=2, last=False), part(0, 1, rows=2)], [2, 2, 2], [])
    assert whole == parted
    assert [answer.end for answer in whole] == ["OK"] * 4


def test_members_that_change_places_are_noticed() -> None:
    one = answers.of_frame([part(0, 1)], [1, 1], [])
    two = answers.of_frame([part(0, 1, first=1)], [1, 1], [])
    assert [paths(*pair) for pair in zip(one, two, strict=True)] == [["outputs[y]"], ["outputs[y]"], []]


def test_a_member_without_an_answer_or_with_two_is_noticed() -> None:
    good = answers.of_frame([part(0, 1)], [1, 1], [])
    lost = answers.of_frame([part(0)], [1, 1], [])
    twice = answers.of_frame([part(0, last=False), part(0, 1)], [1, 1], [])
    assert [paths(*pair) for pair in zip(good, lost, strict=True)] == [[], ["end"], []]
    assert [paths(*pair) for pair in zip(good, twice, strict=True)] == [[], [], ["order"]]


def test_a_member_that_fails_has_its_own_error() -> None:
    error = errors_pb2.Error(code=10, reason="REVISION_CONFLICT", message="m", metadata={"actual": "3"})
    answer = part(0)
    answer.errors.add(members=[1], error=error)
    one, two, frame = answers.of_frame([answer], [1, 1], [])
    assert (one.end, two.end, frame.fields["order"]) == ("OK", "ABORTED REVISION_CONFLICT", "as it must be")
    assert two.fields["metadata.actual"] == "3"


# --- the list of wanted differences, and the report ---


def report(tmp_path: Path, text: str = WANTED) -> Report:
    path = tmp_path / "wanted.toml"
    path.write_text(text)
    return Report(differences.wanted(path))


def compare(into: Report, call: str, base: Answer, tree: Answer) -> bool:
    return into.compare(PLACE, Exchange(call, "session_id=a", base), Exchange(call, "session_id=a", tree))


CONFLICT = failed(reason="REVISION_CONFLICT")
INVALID = failed(code=3, reason="INVALID_INPUT")


def test_a_listed_difference_is_counted_with_its_reason(tmp_path: Path) -> None:
    found = report(tmp_path)
    assert compare(found, "Step reused", CONFLICT, INVALID)
    assert found.is_good
    assert "  1: as the protocol says" in list(found.lines())


@pytest.mark.parametrize(
    ("call", "base", "tree"),
    [
        ("Step", CONFLICT, INVALID),
        ("Step reused twice", CONFLICT, INVALID),
        ("Step reused", INVALID, CONFLICT),
        ("Step reused", CONFLICT, failed(code=5)),
        ("Step reused", CONFLICT, failed(reason="REVISION_CONFLICT", text="other words")),
    ],
)
def test_any_other_difference_fails_and_both_answers_are_printed(
    call: str, base: Answer, tree: Answer, tmp_path: Path
) -> None:
    found = report(tmp_path)
    assert not compare(found, call, base, tree)
    assert not found.is_good
    printed = "\n".join(found.lines())
    assert "unwanted differences: 1 calls" in printed
    assert f"DIFFERENCE native front, memory store, program 3 of seq, step 7: {call}" in printed
    assert "request: session_id=a" in printed
    for answer in (base, tree):
        assert all(f"    {line}" in printed for line in answer.lines())


def test_another_request_is_a_difference(tmp_path: Path) -> None:
    found = report(tmp_path)
    assert not found.compare(PLACE, Exchange("Step", "a", CONFLICT), Exchange("Step", "b", CONFLICT))


def test_a_report_counts_kinds_and_shows_the_first_of_each_in_full(tmp_path: Path) -> None:
    found = report(tmp_path)
    for number in range(3):
        for call in ("Step", "ResetStates"):
            compare(found, call, failed(text=f"no id 'a{number}' of {number}"), failed(text="other words"))
    lines = [*found.lines()]
    at = lines.index("  6: error text: no id # of # in the base, other words in the tree")
    assert lines[at + 1] == "    Step: 3, ResetStates: 3"
    assert lines[-1] == "... and 5 calls more"
    for number in range(differences.MAX_SHOWN):
        compare(found, "Step", CONFLICT, failed(code=number % 15, reason="OTHER_" + "X" * number))
    assert len(found.shown) == differences.MAX_SHOWN


def test_a_report_counts_each_field_that_differs(tmp_path: Path) -> None:
    found = report(tmp_path)
    compare(found, "Step", answers.succeeded(stepped()), answers.succeeded(stepped(revision=5, position=8)))
    counted = [line for line in found.lines() if line.startswith("  1: ")]
    assert counted[-2:] == [
        "  1: position: # in the base, # in the tree",
        "  1: revision: # in the base, # in the tree",
    ]


def test_a_program_goes_on_after_a_wanted_difference_unless_its_entry_says_otherwise(tmp_path: Path) -> None:
    assert compare(report(tmp_path), "Step reused", CONFLICT, INVALID)
    found = report(tmp_path, WANTED + "ends_program = true\n")
    assert not compare(found, "Step reused", CONFLICT, INVALID)
    assert found.is_good
    assert "programs that such a difference has ended: 1" in [*found.lines()]


@pytest.mark.parametrize(
    "text",
    [
        '[[difference]]\nwhat = "end"\n',
        '[[difference]]\nwhat = "end"\nreason = " "\n',
        '[[difference]]\nwhy = "end"\nreason = "r"\n',
        '[[difference]]\nwhat = "("\nreason = "r"\n',
    ],
)
def test_an_entry_without_a_reason_or_with_what_is_no_pattern_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(WantedError, match="difference 1"):
        report(tmp_path, text)


def test_the_committed_list_is_in_order() -> None:
    assert all(entry.reason for entry in differences.wanted())
    any_difference = Difference("Step", "revision", "1", "2")
    assert not any(entry.covers(any_difference) for entry in differences.wanted())


def test_a_base_that_is_no_commit_is_refused() -> None:
    with pytest.raises(builds.BuildError, match="this repository has no commit 'no-such-commit'"):
        builds.of_commit("no-such-commit", print)


# --- what is sent ---


def test_a_seed_draws_the_same_programs_again_and_another_one_others() -> None:
    drawn, again, others = (programs.draw(10, seed, ["seq", "tokens"]) for seed in (7, 7, 8))
    assert drawn == again
    assert drawn != others
    assert len(drawn) == 10
    assert {program.model for program in drawn} == {"seq", "tokens"}
    steps = [step for program in drawn for step in program.steps]
    assert {step.kind for step in steps if isinstance(step, Change)} == {"step", "reset", "again", "reused"}


def test_some_programs_have_a_restart_some_of_them_a_kill() -> None:
    drawn = programs.with_restarts(programs.draw(8, 7, ["seq"]), 2)
    assert [program.number for program in drawn if program.restart_at is not None] == [1, 3, 5, 7]
    assert [program.is_killed for program in drawn if program.restart_at is not None] == [True, False] * 2


def call(path: str, request: Message, *headers: tuple[str, str]) -> malformed_messages.Call:
    return malformed_messages.Call(path, framed(request.SerializeToString()), headers, 1)


def test_what_depends_on_time_is_not_sent() -> None:
    listing, stepping = (
        f"/{malformed_messages.SESSIONS}/ListSessions",
        f"/{malformed_messages.SESSIONS}/StepStream",
    )
    soon, late = pb.ListSessionsRequest(), pb.ListSessionsRequest()
    soon.idle_longer.FromSeconds(1)
    late.idle_longer.FromSeconds(100_000)
    hurried = pb.StepStreamRequest(step=pb.StepFrame(timeout_ms=50))
    assert depends_on_time(call(listing, soon))
    assert depends_on_time(call(stepping, hurried))
    assert depends_on_time(call(listing, late, ("grpc-timeout", "1n")))
    assert not depends_on_time(call(listing, late, ("grpc-timeout", "3S")))
    plain = call(stepping, pb.StepStreamRequest(step=pb.StepFrame()))
    assert not depends_on_time(plain)
    assert depends_on_time(plain._replace(body=2 * plain.body))
    assert not depends_on_time(malformed_messages.Call("/no/Method", b"\0\0", (), 1))


@pytest.mark.parametrize(
    ("body", "limit"), [(framed(b"12"), "100S"), (framed(b"12") + b"\0\0", "3S"), (b"", "3S"), (b"\0", "3S")]
)
def test_only_a_call_that_may_wait_for_the_rest_of_a_message_has_a_short_time(
    body: bytes, limit: str
) -> None:
    assert patient(malformed_messages.Call("/a/B", body, [("grpc-timeout", "3S")], 1)).headers == [
        ("grpc-timeout", limit)
    ]
