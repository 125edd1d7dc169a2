"""`stepwell top` on a terminal, while its server goes away and comes back."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
from google.protobuf import timestamp_pb2
from rich.console import Console

import stepwell
from stepwell import ServerInfo, UnavailableError
from stepwell._base.activity import Scrape, Seen, picture
from stepwell.cli import top
from stepwell.cli.toolkit import reported
from stepwell.cli.toolkit.errors import SERVER_ERROR, Failure
from stepwell.cli.top import Calls, Source, look, screen, url_of
from stepwell.v1 import watch_pb2

SERVER = {"version": "9.8.7", "front": "native", "uptime_s": 1.0, "memory_bytes": 1, "cores": 0.0}
PICTURE = {
    "server": SERVER | {"connections": 1, "streams": 0, "store_ready": True},
    "servers": [{"metrics": "127.0.0.1:9464", "error": "", "id": "5e1f"}],
    "models": [],
    "methods": [],
    "errors": [],
    "tenants": [],
    "slow_sessions": [],
    "replicas": [],
}


@pytest.mark.parametrize(
    ("server", "address", "url"),
    [
        ("127.0.0.1:50051", "127.0.0.1:9964", "http://127.0.0.1:9964/metrics"),
        ("127.0.0.1:50051", "0.0.0.0:9964", "http://127.0.0.1:9964/metrics"),
        ("[::1]:50051", "[::]:9964", "http://[::1]:9964/metrics"),
        ("unix:/run/stepwell", "0.0.0.0:9964", "http://127.0.0.1:9964/metrics"),
        ("10.0.0.5:50051", "0.0.0.0:9964", "http://10.0.0.5:9964/metrics"),
        ("[fd00::5]:50051", "[::]:9964", "http://[fd00::5]:9964/metrics"),
        ("grpcs://a.example:50051", "0.0.0.0:9964", "http://a.example:9964/metrics"),
        ("a.example:50051", "10.0.0.6:9964", "http://10.0.0.6:9964/metrics"),
        ("a.example:50051", None, "http://a.example:9464/metrics"),
        ("127.0.0.1:50051", None, "http://127.0.0.1:9464/metrics"),
    ],
)
def test_where_the_metrics_of_a_server_are(server: str, address: str | None, url: str) -> None:
    assert url_of(server, ServerInfo("native", (), "5e1f", address)) == url


@pytest.mark.parametrize("address", ["evil.example", "a:b@c:1", "a:0", "a:1/x", "a b:1"])
def test_what_is_no_address_is_not_asked(address: str) -> None:
    with pytest.raises(Failure, match="must have its metrics at HOST:PORT"):
        url_of("127.0.0.1:50051", ServerInfo("native", (), "5e1f", address))


def test_metrics_of_another_machine_alone_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def scrape(url: str, _token: str | None, _timeout_s: float) -> Scrape:
        raise Failure(f"{url} cannot be read", SERVER_ERROR)

    client = mock.create_autospec(stepwell.Client, instance=True)
    client.server_info.return_value = ServerInfo("native", (), "5e1f", "127.0.0.1:9464")
    monkeypatch.setattr(top, "scrape", scrape)
    with pytest.raises(Failure, match=r"127\.0\.0\.1:9464 on its own machine: run 'stepwell top' there"):
        Source("a.example:50051", client, None, 1.0).read()


def test_a_time_limit_is_named_as_people_set_it() -> None:
    client = mock.create_autospec(stepwell.Client, instance=True)
    client.server_info.side_effect = UnavailableError("no server was reached within 1 s (connect_timeout_s)")
    with pytest.raises(Failure, match=r"within 1 s \(STEPWELL_CONNECT_TIMEOUT_S\)"):
        Source("127.0.0.1:1", client, None, 1.0).read()


def test_it_continues_after_a_restart_of_the_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = iter(["seen", Failure("refused", SERVER_ERROR), UnavailableError("is starting"), "back"])
    left = [4]
    seen: list[object] = []

    @contextlib.contextmanager
    def keys() -> Iterator[Callable[[float], bool]]:
        def pressed(seconds: float) -> bool:
            left[0] -= 1
            return left[0] < 0

        yield pressed

    def show() -> dict[str, Any]:
        turn = next(turns)
        if isinstance(turn, Exception):
            raise turn
        seen.append(turn)
        return PICTURE

    monkeypatch.setattr(top, "_keys", keys)
    monkeypatch.setenv("FORCE_COLOR", "1")
    top._live(show, 0.1, 10)
    assert seen == ["seen", "back"]
    out = capsys.readouterr().out
    assert "no answer, retrying: refused" in out
    assert "is starting" in out
    assert "9.8.7" in out


def scrape_of(when: float, **values: float) -> Scrape:
    lines = [f'stepwell_build_info{{version="1.0",front="native",server_id="{when}"}} 1.0']
    lines += [
        f'{name}{{model="m",stage="total",change="step",le="+Inf"}} {value}' for name, value in values.items()
    ]
    lines += ['stepwell_store_info{store_id="one"} 1.0', 'stepwell_sessions{model="m"} 7.0']
    return Scrape.of_text("\n".join(lines), when)


def test_several_servers_are_their_sum_and_one_that_is_gone_is_named() -> None:
    seen = [
        Seen(
            "a:1", scrape_of(10.0, stepwell_row_steps_total=5), scrape_of(12.0, stepwell_row_steps_total=25)
        ),
        Seen(
            "b:1", scrape_of(10.0, stepwell_row_steps_total=90), scrape_of(11.0, stepwell_row_steps_total=120)
        ),
        Seen("c:1", None, None, "cannot be read"),
    ]
    found = picture(seen, [], 0.0)
    (model,) = found["models"]
    assert model["row_steps_per_s"] == found["server"]["row_steps_per_s"] == 10 + 30
    assert model["sessions"] == 7  # of the store that both have
    assert [(one["metrics"], one["id"], one["error"]) for one in found["servers"]] == [
        ("a:1", "12.0", ""),
        ("b:1", "11.0", ""),
        ("c:1", "", "cannot be read"),
    ]
    shown = shown_of(found)
    assert shown.startswith("3 servers, stepwell 1.0 (native)")
    assert "NO ANSWER: c:1" in shown.splitlines()
    assert "NO ANSWER: a:1" not in shown


def test_the_servers_of_a_store_are_listed_if_there_are_several() -> None:
    reply = watch_pb2.WatchServerResponse(time=timestamp_pb2.Timestamp(seconds=5000))
    states = [watch_pb2.REPLICA_STATE_READY, watch_pb2.REPLICA_STATE_MISSING, 99]
    for number, state in enumerate(states):
        reply.server.replicas.add(
            id=f"id{number}",
            host=f"host{number}",
            address=f"10.0.0.{number}:50051",
            version="1.0",
            state=state,
            started_time=timestamp_pb2.Timestamp(seconds=1000),
            last_seen_time=timestamp_pb2.Timestamp(seconds=4960, nanos=500_000_000),
            resident_sessions=number,
        )
    found = reported.picture(reply, 10)
    assert [one["state"] for one in found["replicas"]] == ["ready", "missing", "not_ready"]
    assert found["replicas"][1] == {
        "id": "id1",
        "host": "host1",
        "address": "10.0.0.1:50051",
        "http_address": "",
        "version": "1.0",
        "state": "missing",
        "uptime_s": 4000.0,
        "age_s": 39.5,
        "resident_sessions": 1,
    }
    shown = [" ".join(line.split()) for line in shown_of(found).splitlines()]
    assert "10.0.0.1:50051 host1 1.0 missing 1.1 h 1 40 s" in shown
    ready, missing, _ = found["replicas"]
    assert "missing" in shown_of({**found, "replicas": [*[ready] * 10, missing]}), (
        "rows are cut off at the end"
    )
    found["replicas"] = [ready]
    assert "REPLICA" not in shown_of(found)


def shown_of(found: dict[str, Any]) -> str:
    console = Console(width=80, highlight=False, record=True, file=io.StringIO())
    console.print(screen(found, 10))
    return console.export_text()


def test_a_server_that_says_nothing_is_named_and_not_waited_for() -> None:
    silent, answered = mock.create_autospec(stepwell.Client, instance=True), threading.Event()

    def server_info(**_: object) -> ServerInfo:
        answered.wait()
        raise UnavailableError("refused", outcome="not_applied")

    silent.server_info.side_effect = server_info
    sources = [Source("a:1", silent, None, 1.0), Source("b:1", None, None, 1.0)]
    now = scrape_of(1.0)
    looks = [Calls(sources[0].look), Calls(lambda: Seen("b:1", None, now))]

    def seen() -> list[str]:
        looks[1].begin().exception()  # it has ended
        found = look(sources, looks, 0.25)
        assert found[1].now is now
        return [one.error for one in found]

    try:
        assert seen() == seen() == ["a:1 has not answered within 0.25 s", ""]
    finally:
        answered.set()
    assert looks[0].begin().result().error == "refused"
    answered.clear()
    try:
        assert seen() == ["refused", ""]
        assert seen() == ["refused", ""], "a new call is under way"
    finally:
        answered.set()
    looks[0].begin().result()
    assert silent.server_info.call_count == 2
    with pytest.raises(Failure, match="refused"):
        look(sources[:1], looks[:1], 0.25)


def test_a_restarted_server_counts_from_0() -> None:
    seen = [
        Seen("a:1", scrape_of(1.0, stepwell_row_steps_total=100), scrape_of(2.0, stepwell_row_steps_total=3))
    ]
    assert picture(seen, [], 0.0)["models"][0]["row_steps_per_s"] == 0


@pytest.mark.parametrize(
    ("counts", "p50_s", "p99_s"),
    [
        ({"0.1": 0.0, "+Inf": 0.0}, None, None),
        ({"0.1": 10.0, "0.2": 20.0, "+Inf": 20.0}, 0.1, 0.198),
        ({"0.1": 4.0, "+Inf": 10.0}, 0.1, 0.1),
    ],
)
def test_percentiles_are_those_of_prometheus(
    counts: dict[str, float], p50_s: float | None, p99_s: float | None
) -> None:
    name = 'stepwell_stage_seconds_bucket{model="m",stage="total",le='
    texts = ["\n".join([f'{name}"{le}"}} {value * sign}' for le, value in counts.items()]) for sign in (0, 1)]
    before, now = (Scrape.of_text(text, number) for number, text in enumerate(texts))
    server = picture([Seen("a:1", before, now)], [], 0.0)["server"]
    assert (server["p50_s"], server["p99_s"]) == (
        None if p50_s is None else pytest.approx(p50_s),
        None if p99_s is None else pytest.approx(p99_s),
    )
