"""`stepwell envoy-config`: what it writes, what Envoy says of it, and what it refuses. See also `test_envoy`."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from hypothesis import given, settings
from hypothesis import strategies as st

from stepwell.cli import main
from stepwell.cli.envoy import filled
from stepwell.v1 import models_pb2, sessions_pb2, watch_pb2
from stepwell_server.core.front_limits import FrontLimits
from stepwell_server.rpc.fronts import python
from support.samples import examples
from support.servers.envoy import validate

REPLICAS = ("--replica", "127.0.0.1:50051", "--replica", "[::1]:50051")


def written(*options: str) -> Any:
    """The document."""
    done = CliRunner().invoke(main, ["envoy-config", *options])
    assert done.exit_code == 0, done.output
    return yaml.safe_load(done.stdout)


VARIANTS: dict[str, tuple[str, ...]] = {
    "addresses": REPLICAS,
    "names": ("--replica", "a.example.org:50051", "--replica", "b.example.org:50051"),
    "one name": ("--dns", "stepwell-replicas.default.svc:50051"),
    "without extras": (*REPLICAS, "--access-log", "off", "--admin", "off"),
    "for browsers": (*REPLICAS, "--cors-origin", "*", "--cors-origin", "https://app.example.org"),
    "one host": (*REPLICAS, "--host", "example.org", "--host", "[2001:db8::1]"),
    "with a heap": (*REPLICAS, "--max-heap", "2GiB"),
    "beyond loopback": (*REPLICAS, "--listen", "0.0.0.0:8080", "--insecure-listen"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_envoy_takes_it(name: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["envoy-config", *VARIANTS[name]])
    file = tmp_path / "envoy.yaml"
    file.write_text(done.stdout)
    code, words = validate(file)
    assert code == 0, words
    assert "deprecated" not in words.lower()


def test_a_replicas_certificate_is_asked_for_its_name() -> None:
    tls = ("--replica-tls-ca", "/tls/ca.crt")
    for options, name in (
        (("--dns", "replicas:50051", *tls), "replicas"),
        (("--replica", "a:1", "--replica", "a:2", *tls), "a"),
        (("--replica", "a:1", "--replica", "b:1", *tls, "--replica-tls-name", "stepwell"), "stepwell"),
    ):
        (cluster,) = written(*options)["static_resources"]["clusters"]
        context = cluster["transport_socket"]["typed_config"]
        assert context["sni"] == name
        checked = context["common_tls_context"]["validation_context"]
        assert checked["trusted_ca"] == {"filename": "/tls/ca.crt"}
        assert checked["match_typed_subject_alt_names"] == [{"san_type": "DNS", "matcher": {"exact": name}}]


def test_only_names_of_this_machine_are_taken_on_loopback() -> None:
    for options, domains in (
        ((), ["localhost", "127.0.0.1", "[::1]"]),
        (("--listen", "127.0.0.2:1"), ["localhost", "127.0.0.1", "[::1]", "127.0.0.2"]),
        (("--listen", "0.0.0.0:1", "--insecure-listen"), ["*"]),
        (("--host", "example.org", "--host", "[2001:db8::1]"), ["example.org", "[2001:db8::1]"]),
        (("--host", "a.example", "--host", "A.Example"), ["a.example"]),
        (("--host", "*"), ["*"]),
        (("--host", "a.example", "--host", "*"), ["*"]),
    ):
        (listener,) = written(*REPLICAS, *options)["static_resources"]["listeners"]
        manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
        host, *others = manager["route_config"]["virtual_hosts"]
        assert host["domains"] == domains
        assert [other["domains"] for other in others] == ([] if domains == ["*"] else [["*"]])


def test_steps_are_sent_once() -> None:
    (listener,) = written(*REPLICAS)["static_resources"]["listeners"]
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    host = manager["route_config"]["virtual_hosts"][0]
    retries = host["retry_policy"]
    assert retries["retry_on"] == "connect-failure,refused-stream,reset-before-request,retriable-headers"
    # what a replica says that has done nothing of a call, and nothing that it says of one that it may have applied
    assert retries["retriable_headers"] == [
        {"name": "stepwell-retry", "string_match": {"exact": "other-replica"}}
    ]
    retried = {route["name"] for route in host["routes"] if "retry_policy" in route.get("route", {})}
    assert retried == {"json-session-read", "json-read", "grpc-read"}
    refused = [route["name"] for route in host["routes"] if "direct_response" in route]
    assert refused == ["other-origin", "unknown-call"]
    for route in host["routes"][len(refused) :]:
        assert route["route"]["hash_policy"][0]["header"] == {"header_name": "stepwell-session"}
        if route["name"].endswith("-read"):
            assert route["match"]["safe_regex"]["regex"] == (
                r"/stepwell\.v1\.(Session|Model)Service/(Get|List|Predict).*"
            )


def test_no_call_is_cut_off_for_a_silence_that_it_may_keep() -> None:
    (listener,) = written(*REPLICAS, "--json-timeout-s", "20m")["static_resources"]["listeners"]
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    routes = [
        route["route"] for route in manager["route_config"]["virtual_hosts"][0]["routes"] if "route" in route
    ]
    for route in routes:
        limit, silence = (float(route[name].removesuffix("s")) for name in ("timeout", "idle_timeout"))
        assert (silence == 0) if limit == 0 else (silence > limit == 1200)
    assert {route["timeout"] for route in routes} == {"0s", "1200s"}


def test_replicas_let_themselves_be_asked_so_often_whether_they_are_there() -> None:
    (cluster,) = written(*REPLICAS)["static_resources"]["clusters"]
    (options,) = cluster["typed_extension_protocol_options"].values()
    interval = options["explicit_http_config"]["http2_protocol_options"]["connection_keepalive"]["interval"]
    allowed_ms = dict(python._options(FrontLimits(1)))["grpc.http2.min_ping_interval_without_data_ms"]
    assert float(interval.removesuffix("s")) * 1000 > 2 * allowed_ms  # gRPC hangs up on who asks more often


def test_what_callers_may_take_of_envoy() -> None:
    document = written(*REPLICAS, "--max-heap", "2GiB")
    (listener,) = document["static_resources"]["listeners"]
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    assert manager["http2_protocol_options"]["max_concurrent_streams"] == 100
    assert not any("compress" in each["name"] for each in manager["http_filters"])
    overload = document["overload_manager"]
    assert [each["typed_config"].get("max_heap_size_bytes") for each in overload["resource_monitors"]] == [
        None,
        2 << 30,
    ]
    assert [each["name"].rpartition(".")[2] for each in overload["actions"]] == [
        "reset_high_memory_stream",
        "stop_accepting_requests",
    ]
    assert "actions" not in written(*REPLICAS)["overload_manager"]


def manager_of(document: Any) -> Any:
    (listener,) = document["static_resources"]["listeners"]
    return listener["filter_chains"][0]["filters"][0]["typed_config"]


def test_the_protocol_is_in_it() -> None:
    manager = manager_of(written(*REPLICAS))
    (transcoder,) = [
        each["typed_config"] for each in manager["http_filters"] if each["name"].endswith("json_transcoder")
    ]
    files = FileDescriptorSet.FromString(base64.b64decode(transcoder["proto_descriptor_bin"]))
    pool = DescriptorPool()
    for file in files.file:
        pool.Add(file)  # type: ignore[no-untyped-call,unused-ignore]  # each after what it imports
    assert {"stepwell.v1.SessionService", "stepwell.v1.WatchService"} < set(transcoder["services"])
    for service in transcoder["services"]:
        assert pool.FindServiceByName(service).methods
    assert "reason" in pool.FindMessageTypeByName("google.rpc.ErrorInfo").fields_by_name


def test_streams_and_only_streams_live_as_long_as_they_want() -> None:
    routes = manager_of(written(*REPLICAS))["route_config"]["virtual_hosts"][0]["routes"]
    streams = [route for route in routes if route["name"] == "stream"]
    paths = {route["match"].get("path") for route in streams}
    prefixes = tuple(route["match"]["prefix"] for route in streams if "prefix" in route["match"])
    for file in (sessions_pb2.DESCRIPTOR, models_pb2.DESCRIPTOR, watch_pb2.DESCRIPTOR):
        for service in file.services_by_name.values():
            for method in service.methods:
                path, is_stream = (
                    f"/{service.full_name}/{method.name}",
                    method.client_streaming or method.server_streaming,
                )
                assert (path in paths or path.startswith(prefixes)) is is_stream
    assert "/inference.GRPCInferenceService/ModelStreamInfer" in paths
    for route in streams:
        assert route["route"]["timeout"] == route["route"]["idle_timeout"] == "0s"


def test_every_call_that_is_no_stream_has_an_http_rule() -> None:
    without = [
        method.name
        for service in sessions_pb2.DESCRIPTOR.services_by_name.values()
        for method in service.methods
        if b"/v1/" not in method.GetOptions().SerializeToString()
    ]
    assert without == ["StepStream"]


def test_it_is_written_to_a_file(tmp_path: Path) -> None:
    file = tmp_path / "my envoy.yaml"
    said = f"written: {file}; start it: envoy -c '{file}'\n"
    done = CliRunner().invoke(main, ["envoy-config", *REPLICAS, "--output", str(file)])
    assert (done.exit_code, done.stdout) == (0, said)
    assert yaml.safe_load(file.read_text()) == written(*REPLICAS)
    file.write_text("another one")
    done = CliRunner().invoke(main, ["envoy-config", *REPLICAS, "--output", str(file)])
    assert (done.exit_code, done.stdout, file.read_text()) == (2, "", "another one")
    assert f"-o must name a new file, or be given with --force; got {file}" in done.stderr
    done = CliRunner().invoke(main, ["envoy-config", *REPLICAS, "--output", str(file), "--force"])
    assert (done.exit_code, done.stdout) == (0, said)
    assert yaml.safe_load(file.read_text()) == written(*REPLICAS)
    missing = str(tmp_path / "missing" / "envoy.yaml")
    done = CliRunner().invoke(main, ["envoy-config", *REPLICAS, "--output", missing])
    assert done.exit_code == 1
    assert missing in done.stderr


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "no replica": (
        (),
        "replicas must be given either by --replica, once for each, or by --dns; got both or neither",
    ),
    "two ways": ((*REPLICAS, "--dns", "a:1"), "replicas must be given either by --replica"),
    "one twice": (("--replica", "a:1", "--replica", "a:1"), "--replica must name each replica once"),
    "callers and orders": (
        (*REPLICAS, "--listen", "127.0.0.1:9901"),
        "--admin must be another address than --listen; got 127.0.0.1:9901 for both",
    ),
    "no port": (("--replica", "a"), "must be HOST:PORT or [IPv6]:PORT; got 'a'"),
    "port 0": (("--replica", "a:0"), "'0' is not a port from 1 to 65535"),
    "no host": ((*REPLICAS, "--listen", ":8080"), "the host is missing"),
    "an address of gRPC": (("--replica", "dns:///a:1"), "must be HOST:PORT or [IPv6]:PORT"),
    "open to all": (
        (*REPLICAS, "--listen", "0.0.0.0:8080"),
        "--listen: beyond loopback it must be given with --tls-cert and --tls-key, or with --insecure-listen",
    ),
    "no key": ((*REPLICAS, "--tls-cert", "a"), "--tls-cert and --tls-key must be given together"),
    "authorities alone": (
        (*REPLICAS, "--tls-client-ca", "a"),
        "--tls-client-ca must be given with --tls-cert",
    ),
    "a replica's key alone": (
        (*REPLICAS, "--replica-tls-ca", "a", "--replica-tls-key", "b"),
        "--replica-tls-cert and --replica-tls-key must be given together",
    ),
    "a name without authorities": (
        (*REPLICAS, "--replica-tls-name", "a"),
        "--replica-tls-cert and --replica-tls-name must be given with --replica-tls-ca",
    ),
    "no name": (
        (*REPLICAS, "--replica-tls-ca", "a"),
        "--replica-tls-name must be given for replicas of several hosts; got ['127.0.0.1', '::1']",
    ),
    "no admin": ((*REPLICAS, "--admin", "on"), "--admin must be HOST:PORT or off; got 'on'"),
    "an admin for all": (
        (*REPLICAS, "--admin", "0.0.0.0:9901"),
        "--admin must be an address of this machine alone, or off; got 0.0.0.0",
    ),
    "a host with a port": (
        (*REPLICAS, "--host", "example.org:443"),
        "--host must be a name or an address without a port; got 'example.org:443'",
    ),
    "an origin without a scheme": (
        (*REPLICAS, "--cors-origin", "app.example.org"),
        "--cors-origin must be *, or SCHEME://HOST[:PORT] as browsers send it; got 'app.example.org'",
    ),
    "no time": ((*REPLICAS, "--json-timeout-s", "0"), "must be a number of seconds"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_said(name: str) -> None:
    options, words = REFUSED[name]
    done = CliRunner().invoke(main, ["envoy-config", *options])
    assert done.exit_code == 2
    assert words in " ".join(done.stderr.split())
    assert done.stdout == ""


_VALUES = st.recursive(
    st.one_of(st.text(st.characters(codec="utf-8", exclude_categories=["C"])), st.integers(), st.booleans()),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text("ab:# -{'", max_size=5), inner)),
    max_leaves=10,
)


@settings(max_examples=examples(40))
@given(_VALUES)
def test_values_come_back(value: object) -> None:
    template = "#: if shown\nvalue: [${value}]\n#: end\n#: if not shown\nvalue: hidden\n#: end\n"
    assert yaml.safe_load(filled(template, {"shown": True, "value": value})) == {"value": [value]}
    assert yaml.safe_load(filled(template, {"shown": "", "value": value})) == {"value": "hidden"}
