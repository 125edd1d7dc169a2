"""Addresses and options of a client, and how long it tries to reach a server that it never reached. The clock is a fake."""

from __future__ import annotations

import logging
import math
from typing import Any

import grpc
import pytest

import stepwell
from stepwell import config, errors
from stepwell._base import addresses
from stepwell._base.flow import Flow
from stepwell._core.observer import Observer
from stepwell._core.retrier import Retrier
from stepwell._transport import status
from stepwell._transport.connecting import Contact
from stepwell._transport.retry import Deadline, RetryPolicy
from stepwell.config import ClientConfig
from stepwell.events import RequestEvent, ResponseEvent, RetryEvent
from stepwell.v1 import models_pb2
from support.sdk.scripted_calls import ScriptedCalls

ADDRESS = "h:1"
REFUSED = "failed to connect to all addresses; last error: UNKNOWN: ipv4:1.2.3.4:1: Failed to connect to remote host: Connection refused"
CLOSED = REFUSED.replace("1.2.3.4", "5.6.7.8").replace("Connection refused", "Socket closed")
SILENT = (
    "failed to connect to all addresses; last error: UNKNOWN: ipv4:1.2.3.4:1: connection attempt timed out before "
    "receiving SETTINGS frame"
)

ADDRESSES = {
    "localhost:50051": ("localhost:50051", None),
    "10.0.0.1:1": ("10.0.0.1:1", None),
    "a-b.c_d:65535": ("a-b.c_d:65535", None),
    "[::1]:50051": ("[::1]:50051", None),
    "[fe80::1%eth0]:1": ("[fe80::1%eth0]:1", None),
    "unix:run/s.sock": ("unix:run/s.sock", None),
    f"unix://{'/x' * 53}x": (f"unix://{'/x' * 53}x", None),
    "unix:///run/s.sock": ("unix:///run/s.sock", None),
    "dns:///h:1": ("dns:///h:1", None),
    "ipv6:[::1]:1": ("ipv6:[::1]:1", None),
    "grpc://h:1": (ADDRESS, False),
    "GRPC://h:1/": (ADDRESS, False),
    "grpcs://[::1]:1": ("[::1]:1", True),
}
REFUSALS = {
    "": "the host is missing",
    ":1": "the host is missing",
    "h": "the port is missing, as in h:50051",
    "grpcs://h": "the port is missing, as in h:50051",
    "dns:///h:": "the port is missing",
    "[::1]": r"the port is missing, as in \[::1\]:50051",
    "h:0": "'0' is not a port from 1 to 65535",
    "h:65536": "'65536' is not a port",
    "h:x": "'x' is not a port",
    "[::1]x:1": "'x:1' is not a port",
    "grpc://h:1/path": "'1/path' is not a port",
    "::1:50051": r"write an IPv6 address in brackets, such as \[::1\]:50051",
    "[h]:1": r"\[h\] is not an IPv6 address",
    "a b:1": "'a b' is not the name of a host",
    "h\1:1": r"'h\\x01' is not the name of a host",
    "me@h:1": "'me@h' is not the name of a host",
    "unix:": "unix:PATH or unix:///PATH",
    f"unix:{'x' * 108}": "a path of at most 107 bytes; got one of 108",
    "unix://run": "unix:PATH or unix:///PATH",
    "http://h:1": "gRPC, which has no http:// addresses: write 'h:1'",
    "https://h:1/v1": "gRPC, which has no https:// addresses: write 'grpcs://h:1', or 'h:1' with tls=True",
    "ftp://h:1": "ftp:// is not a known scheme",
}


@pytest.mark.parametrize("given", ADDRESSES)
def test_addresses(given: str) -> None:
    target, tls = ADDRESSES[given]
    assert addresses.parse("address", given) == (target, tls)
    assert config.server_address(given) == given
    known = ClientConfig(given)
    assert (known.address, known.tls is not None) == (target, tls is True)


@pytest.mark.parametrize("given", REFUSALS)
def test_no_addresses(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for connect in (stepwell.connect, stepwell.aio.connect):
        with pytest.raises(errors.InvalidInputError, match=f"^address must be .*{REFUSALS[given]}"):
            connect(given)
    monkeypatch.setenv("STEPWELL_SERVER", given)
    with pytest.raises(errors.InvalidInputError, match=r"^STEPWELL_SERVER must be "):
        stepwell.connect()


SEVERAL: dict[Any, tuple[tuple[str, ...], bool | None]] = {
    "a:1,b:2": (("a:1", "b:2"), None),
    "a:1, b:2 ,c:3": (("a:1", "b:2", "c:3"), None),
    ("a:1", "b:2"): (("a:1", "b:2"), None),
    ("a:1",): (("a:1",), None),
    "grpcs://a:1,b:2": (("a:1", "b:2"), True),
    "a:1,grpc://b:2": (("a:1", "b:2"), False),
    "[::1]:1,unix:/run/a,unix:/run/b,c": (("[::1]:1", "unix:/run/a", "unix:/run/b,c"), None),
    ("unix:/run/a", "a:1"): (("a:1", "unix:/run/a"), None),
    "unix:/run/a,b": (("unix:/run/a,b",), None),
    "dns:///h:1,dns:///g:2,a:1": (("dns:///h:1", "dns:///g:2", "a:1"), None),
}
NOT_SEVERAL: dict[Any, str] = {
    "a:1,": "address must have an address before and after each comma; got 'a:1,'",
    "a:1,,b:2": "must have an address before and after each comma",
    "a:1,b": "got 'b': the port is missing, as in b:50051",
    "a:1,a:1": "address must name each replica once; got 'a:1' twice",
    "replica:1,Replica:1": "address must name each replica once; got 'Replica:1' twice",
    "grpc://a:1,grpcs://b:1": "must be all grpc:// or all grpcs://",
    ("a:1", "b"): "got 'b': the port is missing",
    ("unix:/a,b", "c:1"): "a path in a list must not contain a comma",
    (): r"or a list of one or more of them; got \(\)",
    ("a:1", 7): r"or a list of one or more of them; got \('a:1', 7\)",
    7: "or a list of one or more of them; got 7",
}


@pytest.mark.parametrize("given", SEVERAL, ids=str)
def test_addresses_of_replicas(given: Any) -> None:
    targets, tls = SEVERAL[given]
    for connect in (stepwell.connect, stepwell.aio.connect):
        for each in [given, list(given)] if isinstance(given, tuple) else [given]:
            client: Any = connect(each)
            assert client.address == ",".join(targets)
            assert (client._config.targets, client._config.tls is not None) == (targets, tls is True)
            names = [one for one in targets if one.startswith("dns:///")]
            assert [one.address for one in client.replicas] == [one for one in targets if one not in names]


@pytest.mark.parametrize("given", NOT_SEVERAL, ids=str)
def test_no_addresses_of_replicas(given: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for connect in (stepwell.connect, stepwell.aio.connect):
        with pytest.raises(errors.InvalidInputError, match=f"^(address must )?.*{NOT_SEVERAL[given]}"):
            connect(given)
    if isinstance(given, str):
        monkeypatch.setenv("STEPWELL_SERVER", given)
        with pytest.raises(errors.InvalidInputError, match=r"^STEPWELL_SERVER must "):
            stepwell.connect()


def test_a_token_is_for_all_replicas_or_none() -> None:
    with pytest.raises(errors.InvalidInputError, match=r"got the address 'far.example:1'"):
        stepwell.connect("127.0.0.1:1,far.example:1", token="stw_secret")


def test_the_time_limit_of_connecting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPWELL_CONNECT_TIMEOUT_S", "2.5")
    assert config.connect_timeout() == ClientConfig(ADDRESS).connect_timeout_s == 2.5
    assert config.connect_timeout(7) == 7.0
    for wrong, words in {"soon": "must be a number of seconds; got 'soon'", "0": "must be above 0"}.items():
        monkeypatch.setenv("STEPWELL_CONNECT_TIMEOUT_S", wrong)
        with pytest.raises(errors.InvalidInputError, match=f"^STEPWELL_CONNECT_TIMEOUT_S {words}"):
            stepwell.connect(ADDRESS)
    monkeypatch.delenv("STEPWELL_CONNECT_TIMEOUT_S")
    assert config.connect_timeout() == 1.0


def test_a_scheme_that_says_the_contrary_of_tls() -> None:
    with pytest.raises(errors.InvalidInputError, match="tls must be None if the address starts with grpc://"):
        stepwell.connect("grpc://h:1", tls=True)


def hook(_event: object) -> None:
    pass


async def coroutine_hook(_event: object) -> None:
    pass


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no time": ({"connect_timeout_s": 0}, "connect_timeout_s must be above 0"),
    "text for time": ({"connect_timeout_s": "1"}, "connect_timeout_s must be a number of seconds"),
    "text for a switch": ({"coalesce": "no"}, "coalesce must be True or False; got 'no'"),
    "a number for a switch": ({"tracing": 0}, "tracing must be True or False; got 0"),
    "None for a switch": (
        {"allow_insecure_token": None},
        "allow_insecure_token must be True or False; got None",
    ),
    "metadata: a number": ({"metadata": 5}, "metadata must be a mapping, or pairs.*got int"),
    "metadata: no pairs": ({"metadata": [("a", "b", "c")]}, "metadata must be .*got list"),
    "metadata: a space": ({"metadata": {"a b": "c"}}, "keys of metadata must be letters.*got 'a b'"),
    "metadata: an empty key": ({"metadata": {"": "c"}}, "keys of metadata must be letters.*got ''"),
    "metadata: gRPC's": ({"metadata": {"grpc-timeout": "1S"}}, "must not be reserved by gRPC or this SDK"),
    "metadata: HTTP/2's": ({"metadata": {"Content-Type": "x"}}, "must not be reserved by gRPC or this SDK"),
    "metadata: HTTP/1's": (
        {"metadata": {"Transfer-Encoding": "x"}},
        "must not be reserved by gRPC or this SDK",
    ),
    "metadata: ours": ({"metadata": {"stepwell-x": "y"}}, "must not be reserved by gRPC or this SDK"),
    "metadata: bytes": ({"metadata": {"a": b"c"}}, r"metadata\['a'\] must be a string.*got bytes"),
    "metadata: a line": ({"metadata": {"a": "c\nd"}}, r"metadata\['a'\] must be a string of printable ASCII"),
    "metadata: a text": ({"metadata": {"a-bin": "c"}}, r"metadata\['a-bin'\] must be bytes"),
    "hooks: a list": ({"event_hooks": [hook]}, "event_hooks must be a mapping"),
    "hooks: no event": (
        {"event_hooks": {"reply": [hook]}},
        "keys of event_hooks must be among .*got 'reply'",
    ),
    "hooks: no list": (
        {"event_hooks": {"retry": hook}},
        r"event_hooks\['retry'\] must be a list of functions",
    ),
    "hooks: a text": (
        {"event_hooks": {"retry": ["f"]}},
        r"event_hooks\['retry'\] must be a list of functions",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_options_of_a_client_are_checked(name: str) -> None:
    options, words = WRONG[name]
    for connect in (stepwell.connect, stepwell.aio.connect):
        with pytest.raises(errors.InvalidInputError, match=words):
            connect(ADDRESS, **options)


def test_options_of_a_client_are_kept() -> None:
    secret = ClientConfig(ADDRESS, metadata={"Authorization": "Bearer x", "trace-bin": b"\0"})
    assert secret.metadata == (("authorization", "Bearer x"), ("trace-bin", b"\0"))
    assert "Bearer" not in repr(secret)
    assert ClientConfig(ADDRESS, event_hooks={"retry": []}).event_hooks is None
    with pytest.raises(errors.InvalidInputError, match="of a sync client must not be coroutine functions"):
        stepwell.connect(ADDRESS, event_hooks={"request": [coroutine_hook]})
    stepwell.aio.connect(ADDRESS, event_hooks={"request": [coroutine_hook]})


class Server(ScriptedCalls):
    """A server, as a client's calls meet it."""

    def __init__(self, *script: str | errors.StepwellError | None, limit_s: float = 1.0) -> None:
        super().__init__(script)
        self.contact = Contact(ADDRESS, limit_s)

    def call(self, timeout_s: float = 30.0, observer: Observer | None = None) -> object:
        retrier = Retrier(RetryPolicy(draw=lambda _low, high: high), 1024, self.contact)
        request = models_pb2.ListModelsRequest()
        flow: Flow[object] = retrier.call("ListModels", request, Deadline(timeout_s, self.clock))
        return self.run(flow if observer is None else observer.observed(flow))


def test_a_server_that_was_never_reached_is_given_up_soon() -> None:
    server = Server(REFUSED)
    with pytest.raises(errors.UnavailableError) as caught:
        server.call()
    assert server.now_s == pytest.approx(101.0)
    assert str(caught.value) == (
        f"no server was reached at {ADDRESS} within 1 s (connect_timeout_s): Connection refused; is "
        f"`stepwell serve` running there? (attempts: {server.attempts})"
    )
    assert server.attempts > 3
    assert caught.value.outcome == "not_applied"
    with pytest.raises(errors.UnavailableError, match=r"within 0\.3 s \(timeout_s\)"):
        server.call(timeout_s=0.3)
    with pytest.raises(errors.UnavailableError, match=r"within 5 s \(timeout_s\)"):
        Server(REFUSED, limit_s=math.inf).call(timeout_s=5.0)


@pytest.mark.parametrize(
    "script", [(CLOSED, REFUSED), (REFUSED, CLOSED, REFUSED, REFUSED), (REFUSED, CLOSED)]
)
def test_the_address_of_a_name_at_which_a_server_listens_gives_the_reason(script: tuple[str, ...]) -> None:
    """`localhost` may be `::1` too, where nobody listens."""
    with pytest.raises(errors.UnavailableError, match=r"Socket closed; .*if the server uses TLS"):
        Server(*script).call()


def test_what_listens_and_says_nothing_has_ten_times_as_long() -> None:
    """It may be a server on a machine that is busy."""
    server = Server(SILENT)
    server.attempt_s = 1.0
    with pytest.raises(
        errors.UnavailableError, match=r"within 10 s \(10 times connect_timeout_s\): something listens"
    ):
        server.call()
    assert 110.0 <= server.now_s <= 111.0


def test_a_server_that_comes_up_in_time_is_reached() -> None:
    assert Server(REFUSED, REFUSED, None).call() == "reply"


@pytest.mark.parametrize(
    "answer",
    [
        None,
        errors.UnavailableError("Socket closed"),
        errors.UnavailableError("stopping", reason="UNAVAILABLE"),
    ],
    ids=["a reply", "a connection that broke", "a refusal"],
)
def test_after_the_first_contact_calls_have_their_whole_time(answer: errors.StepwellError | None) -> None:
    server = Server(answer, REFUSED)
    if answer is None:
        server.call()
    before_s = server.now_s
    with pytest.raises(errors.UnavailableError) as caught:
        server.call()
    assert server.now_s - before_s == pytest.approx(30.0, abs=0.1)
    assert f"the server at {ADDRESS} cannot be reached: Connection refused" in str(caught.value)
    assert "time limit: 30 s" in str(caught.value)


HOPELESS = {
    "errors resolving no.invalid:1: [field:hostname lookup error:address lookup failed for no.invalid:1: Domain name "
    "not found]": r"its name cannot be resolved: Domain name not found; is the name right\?",
    "DNS resolution failed for no.invalid:1: C-ares status is not ARES_SUCCESS qtype=A name=no.invalid: Domain name "
    "not found": r"its name cannot be resolved: Domain name not found; is the name right\?",
    "failed to connect to all addresses; last error: UNAVAILABLE: ipv4:1.2.3.4:1: Failed parsing HTTP/2 (Expected "
    "SETTINGS frame as the first frame, got frame type 80)": "does not speak HTTP/2.*is it the port of a web server",
    "failed to connect to all addresses; last error: UNAVAILABLE: ipv4:1.2.3.4:1: Trying to connect an http1.x server "
    "(HTTP status 400)": "does not speak HTTP/2.*is it the port of a web server",
}


@pytest.mark.parametrize("text", HOPELESS)
def test_what_does_not_get_better_is_not_tried_again_before_the_first_contact(text: str) -> None:
    server = Server(text, None)
    with pytest.raises(errors.UnavailableError, match=f"reached at {ADDRESS}: .*{HOPELESS[text]}"):
        server.call()
    assert (server.attempts, server.now_s) == (1, 100.0)
    server.contact.make()
    server.attempts = 0
    assert server.call() == "reply"


def test_a_port_of_http_without_grpc_is_named_and_not_asked_again() -> None:
    text = "Received http2 header with status: 404"
    server = Server(status.from_rpc(grpc.StatusCode.UNIMPLEMENTED, text, ()))
    with pytest.raises(
        errors.UnavailableError, match=rf"at {ADDRESS} cannot be reached: .*--http-listen.*{text}"
    ):
        server.call()
    assert server.attempts == 1


def test_a_name_server_that_does_not_answer_is_asked_again() -> None:
    text = "errors resolving h:1: [field:hostname lookup error:address lookup failed for h:1: Timeout while contacting DNS servers]"
    assert Server(text, None).call() == "reply"


def test_a_time_limit_before_the_first_contact_names_the_address() -> None:
    server = Server(errors.DeadlineExceededError("Deadline Exceeded"))
    server.attempt_s = 0.5
    with pytest.raises(
        errors.DeadlineExceededError, match=rf"at {ADDRESS} within 0\.5 s .*`stepwell serve` run"
    ):
        server.call(timeout_s=0.5)


def test_what_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "stepwell")
    server = Server(REFUSED, None)
    server.call()
    server.call()
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("INFO", f"ListModels at {ADDRESS}: attempt 1 failed, retrying in 0.050 s: Connection refused"),
        ("INFO", f"connected to {ADDRESS}"),
    ]
    caplog.clear()
    with pytest.raises(errors.UnavailableError) as caught:
        Server("no", limit_s=9.0).call(timeout_s=0.04)
    assert caplog.messages[-1] == f"ListModels: gave up: {caught.value}"
    assert all(record.levelno < logging.WARNING for record in caplog.records)


def observer_of(server: Server, **hooks: Any) -> Observer:
    known = ClientConfig(ADDRESS, event_hooks=hooks).event_hooks  # type: ignore[arg-type]
    assert known is not None
    return Observer(known, ADDRESS, server.clock)


def test_events() -> None:
    seen: list[Any] = []
    server = Server(REFUSED, None)
    server.attempt_s = 0.125
    observer = observer_of(server, request=[seen.append], response=[seen.append], retry=[seen.append])
    assert server.call(observer=observer) == "reply"
    first, second = (RequestEvent(ADDRESS, "ListModels", attempt, 1) for attempt in (1, 2))
    error = seen[1].error
    assert isinstance(error, errors.UnavailableError)
    assert seen == [
        first,
        ResponseEvent(first, 0.125, error),
        RetryEvent(first, error, 0.05),
        second,
        ResponseEvent(second, 0.125, None),
    ]


@pytest.mark.parametrize("event", ["request", "response", "retry"])
@pytest.mark.parametrize(
    "error", [errors.UnavailableError("mine"), ValueError("mine")], ids=["ours", "another"]
)
def test_what_a_hook_raises_goes_to_the_caller_and_ends_the_call(event: str, error: Exception) -> None:
    def raising(_event: object) -> None:
        raise error

    server = Server(REFUSED, None)
    with pytest.raises(type(error)) as caught:
        server.call(observer=observer_of(server, **{event: [raising]}))
    assert caught.value is error
    assert server.attempts == (0 if event == "request" else 1)
