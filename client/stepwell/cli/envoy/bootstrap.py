"""The configuration of an Envoy in front of replicas, as a document."""

from __future__ import annotations

import dataclasses
import ipaddress
from collections.abc import Mapping, Sequence

from stepwell.cli.envoy._yaml import Value
from stepwell.cli.envoy.descriptors import encoded, services
from stepwell.cli.envoy.routing import (
    CLUSTER,
    ORIGINAL_PATH,
    SESSION_HEADER,
    refusal_of_hosts,
    retry_policy,
    routes,
)

_MIB = 1 << 20
HEALTH_PATH = "/healthz"
#: What Envoy may hold of a call in JSON while it makes messages of it, and JSON of the answer. Bodies as such may be
#: larger: they pass while they are read, up to what a replica takes.
_JSON_REQUEST_BYTES, _JSON_RESPONSE_BYTES = 8 * _MIB, 32 * _MIB
#: Calls at the same time on one connection to a replica: with more of them Envoy makes another. A replica bounds what it
#: does for one connection, and a connection here has many callers behind it.
_CALLS_OF_CONNECTION = 100
#: Calls at the same time on one connection of a caller, as Envoy's guide for the edge advises.
_CALLS_OF_CALLER = 100
#: Parts of its memory at which Envoy ends the calls that hold most, at the second all of these, and takes no new ones.
_HEAP_RESETS, _HEAP_FULL = 0.85, 0.95
#: Calls that hold less than this, as a power of two, are not looked at.
_SMALL_CALL = 20
#: HTTP statuses of what Envoy answers by itself, and the gRPC codes that say the same.
_LOCAL_CODES = ((400, 3), (403, 7), (404, 5), (413, 8), (503, 14), (504, 4))
#: What Envoy answers where it was about to send a call to another replica, and then more of it came than it keeps.
_NOT_KEPT = 507
#: Fewer than this are none of up to a hundred replicas. Envoy rounds it: a part of a percent is 0, which is never.
_PANIC_PERCENT = 1
_UNBOUNDED = 1_000_000
_TYPE = "type.googleapis.com/envoy.extensions"


@dataclasses.dataclass(frozen=True)
class Address:
    """A host, without brackets, and a port."""

    host: str
    port: int

    @property
    def is_number(self) -> bool:
        """It is an IP address: nothing has to be looked up."""
        try:
            ipaddress.ip_address(self.host)
        except ValueError:
            return False
        return True

    @property
    def is_loopback(self) -> bool:
        """Only this machine reaches it, or is reached by it."""
        return self.host == "localhost" or (self.is_number and ipaddress.ip_address(self.host).is_loopback)


@dataclasses.dataclass(frozen=True)
class CallerTls:
    """How callers reach Envoy. Paths of files where Envoy runs."""

    cert: str
    key: str
    client_ca: str = ""
    """Whose certificates callers must show. Empty: none."""


@dataclasses.dataclass(frozen=True)
class ReplicaTls:
    """How Envoy reaches replicas. Paths of files where Envoy runs."""

    ca: str
    name: str
    """What their certificates must be for."""
    cert: str = ""
    """What Envoy shows them. Empty: nothing."""
    key: str = ""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What was asked for."""

    replicas: Sequence[Address]
    """Or one name, that stands for all of them: see `is_one_name`."""
    is_one_name: bool
    listen: Address
    admin: Address | None
    caller_tls: CallerTls | None = None
    replica_tls: ReplicaTls | None = None
    hosts: Sequence[str] = ()
    """Names by which callers may call it, without ports. Empty: any."""
    cors_origins: Sequence[str] = ()
    access_log: str = "/dev/stdout"
    """Empty: none."""
    json_timeout_s: float = 60.0
    max_heap_bytes: int = 0
    """Of Envoy's memory, before it ends calls. 0: it does not look."""


def bootstrap(plan: Plan) -> Mapping[str, Value]:
    """The whole configuration."""
    document: dict[str, Value] = {
        "static_resources": {"listeners": [_listener(plan)], "clusters": [_cluster(plan)]},
        "overload_manager": _overload(plan.max_heap_bytes),
    }
    if plan.admin is not None:
        # Whoever reaches it can stop Envoy and read what passes.
        document = {"admin": {"address": _socket(plan.admin)}, **document}
    return document


def _overload(max_heap_bytes: int) -> Value:
    """What Envoy does before it runs out of connections or memory."""
    monitors: list[Value] = [
        {
            "name": "envoy.resource_monitors.global_downstream_max_connections",
            "typed_config": {
                "@type": f"{_TYPE}.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
                "max_active_downstream_connections": 50_000,
            },
        }
    ]
    if not max_heap_bytes:
        return {"resource_monitors": monitors}
    heap = "envoy.resource_monitors.fixed_heap"
    typed: Value = {
        "@type": f"{_TYPE}.resource_monitors.fixed_heap.v3.FixedHeapConfig",
        "max_heap_size_bytes": max_heap_bytes,
    }
    scaled: Value = {"scaling_threshold": _HEAP_RESETS, "saturation_threshold": _HEAP_FULL}
    return {
        "refresh_interval": "0.25s",
        "buffer_factory_config": {"minimum_account_to_track_power_of_two": _SMALL_CALL},
        "resource_monitors": [*monitors, {"name": heap, "typed_config": typed}],
        "actions": [
            {
                "name": "envoy.overload_actions.reset_high_memory_stream",
                "triggers": [{"name": heap, "scaled": scaled}],
            },
            {
                "name": "envoy.overload_actions.stop_accepting_requests",
                "triggers": [{"name": heap, "threshold": {"value": _HEAP_FULL}}],
            },
        ],
    }


def _listener(plan: Plan) -> Value:
    chain: dict[str, Value] = {
        "filters": [
            {"name": "envoy.filters.network.http_connection_manager", "typed_config": _connections(plan)}
        ]
    }
    if plan.caller_tls is not None:
        chain["transport_socket"] = _caller_socket(plan.caller_tls)
    return {"name": "callers", "address": _socket(plan.listen), "filter_chains": [chain]}


def _connections(plan: Plan) -> Value:
    document: dict[str, Value] = {
        "@type": f"{_TYPE}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "callers",
        # gRPC is HTTP/2; JSON and gRPC-Web come as they like.
        "codec_type": "AUTO",
        "use_remote_address": True,
        "server_header_transformation": "PASS_THROUGH",
        "request_headers_timeout": "10s",
        "http2_protocol_options": {
            "max_concurrent_streams": _CALLS_OF_CALLER,
            "initial_stream_window_size": _MIB,
            "initial_connection_window_size": 16 * _MIB,
            "connection_keepalive": {"interval": "30s", "timeout": "10s"},
        },
        # When Envoy is told to drain it says GOAWAY, and streams have so long to move.
        "drain_timeout": "5s",
        "route_config": {
            "name": "stepwell",
            "ignore_port_in_host_matching": True,
            "virtual_hosts": [_virtual_host(plan), *([refusal_of_hosts()] if plan.hosts else [])],
            # Retries and time-outs are what stands here, whatever a caller says.
            "request_headers_to_remove": ["x-envoy-retry-on", "x-envoy-retry-grpc-on", "x-envoy-max-retries"],
        },
        "http_filters": [
            _filter("health_check", "health_check.v3.HealthCheck", _own_health()),
            _filter("cors", "cors.v3.Cors"),
            _filter("grpc_web", "grpc_web.v3.GrpcWeb"),
            _filter("grpc_json_transcoder", "grpc_json_transcoder.v3.GrpcJsonTranscoder", _transcoding()),
            _filter("router", "router.v3.Router"),
        ],
    }
    document["local_reply_config"] = {
        "mappers": [
            *(_local_reply(*each) for each in _LOCAL_CODES),
            {**_local_reply(_NOT_KEPT, 14), "status_code": 503},
            {"filter": _has_status(_NOT_KEPT), "status_code": 503},
        ]
    }
    if plan.access_log:
        document["access_log"] = [_access_log(plan.access_log)]
    return document


def _virtual_host(plan: Plan) -> Value:
    host: dict[str, Value] = {"name": "stepwell", "domains": list(plan.hosts) or ["*"]}
    if plan.cors_origins:
        matches: list[Value] = [
            {"safe_regex": {"regex": ".*"}} if origin == "*" else {"exact": origin}
            for origin in plan.cors_origins
        ]
        host["typed_per_filter_config"] = {
            "envoy.filters.http.cors": {
                "@type": f"{_TYPE}.filters.http.cors.v3.CorsPolicy",
                "allow_origin_string_match": matches,
                "allow_methods": "GET, POST, DELETE, OPTIONS",
                "allow_headers": "authorization, content-type, grpc-timeout, x-grpc-web, x-user-agent, "
                f"stepwell-tenant, {SESSION_HEADER}, traceparent",
                "expose_headers": "grpc-status, grpc-message, grpc-status-details-bin",
                "max_age": "86400",
            }
        }
    return {**host, "retry_policy": retry_policy(), "routes": routes(plan.json_timeout_s, plan.cors_origins)}


def _own_health() -> dict[str, Value]:
    """Whether Envoy takes calls: it is not told to drain, and there is a replica to send them to."""
    return {
        "pass_through_mode": False,
        "headers": [{"name": ":path", "string_match": {"exact": HEALTH_PATH}}],
        "cluster_min_healthy_percentages": {CLUSTER: {"value": 1}},
    }


def _transcoding() -> dict[str, Value]:
    return {
        "proto_descriptor_bin": encoded(),
        "services": list(services()),
        # names of fields as the protocol has them; either form is read
        "print_options": {"preserve_proto_field_names": True},
        "convert_grpc_status": True,
        # an id may have a slash, as %2F
        "url_unescape_spec": "ALL_CHARACTERS",
        "request_validation_options": {
            "reject_unknown_method": True,
            "reject_unknown_query_parameters": True,
            "reject_binding_body_field_collisions": True,
        },
        "max_request_body_size": _JSON_REQUEST_BYTES,
        "max_response_body_size": _JSON_RESPONSE_BYTES,
    }


def _local_reply(status: int, code: int) -> Mapping[str, Value]:
    """What Envoy answers by itself, in the form in which a replica's errors come as JSON. gRPC has its own.

    A call in JSON is one of gRPC by then, but for the path that it had.
    """
    is_grpc: Mapping[str, Value] = {"name": "content-type", "string_match": {"prefix": "application/grpc"}}
    return {
        "filter": {
            "and_filter": {
                "filters": [
                    _has_status(status),
                    {
                        "or_filter": {
                            "filters": [
                                {"header_filter": {"header": {**is_grpc, "invert_match": True}}},
                                {"header_filter": {"header": {"name": ORIGINAL_PATH, "present_match": True}}},
                            ]
                        }
                    },
                ]
            }
        },
        "body_format_override": {"json_format": {"code": code, "message": "%LOCAL_REPLY_BODY%"}},
    }


def _has_status(status: int) -> Value:
    is_status: Value = {"op": "EQ", "value": {"default_value": status, "runtime_key": f"stepwell_{status}"}}
    return {"status_code_filter": {"comparison": is_status}}


def _access_log(path: str) -> Value:
    # neither headers nor query strings: tokens belong into no log
    fields = {
        "time": "%START_TIME%",
        "method": "%REQ(:METHOD)%",
        "path": "%PATH(NQ:ORIG_OR_PATH)%",
        "status": "%RESPONSE_CODE%",
        "grpc_status": "%GRPC_STATUS%",
        "flags": "%RESPONSE_FLAGS%",
        "duration_ms": "%DURATION%",
        "replica": "%UPSTREAM_HOST%",
        "attempts": "%UPSTREAM_REQUEST_ATTEMPT_COUNT%",
        "caller": "%DOWNSTREAM_REMOTE_ADDRESS%",
        "received_bytes": "%BYTES_RECEIVED%",
        "sent_bytes": "%BYTES_SENT%",
    }
    return {
        "name": "envoy.access_loggers.file",
        "typed_config": {
            "@type": f"{_TYPE}.access_loggers.file.v3.FileAccessLog",
            "path": path,
            "log_format": {"json_format": fields},
        },
    }


def _filter(name: str, kind: str, settings: Mapping[str, Value] | None = None) -> Value:
    typed: dict[str, Value] = {"@type": f"{_TYPE}.filters.http.{kind}"}
    return {"name": f"envoy.filters.http.{name}", "typed_config": typed | dict(settings or {})}


def _cluster(plan: Plan) -> Value:
    is_static = all(replica.is_number for replica in plan.replicas)
    document: dict[str, Value] = {
        "name": CLUSTER,
        "type": "STATIC" if is_static else "STRICT_DNS",
        "connect_timeout": "1s",
        "lb_policy": "RING_HASH",
        "ring_hash_lb_config": {"minimum_ring_size": 1024},
        # With most of the replicas gone the others still serve; by default Envoy would use those that are gone too. If none
        # seems well it tries them all: a load under which all of them miss their checks must not end everything.
        "common_lb_config": {"healthy_panic_threshold": {"value": _PANIC_PERCENT}},
        "load_assignment": {
            "cluster_name": CLUSTER,
            "endpoints": [
                {"lb_endpoints": [{"endpoint": {"address": _socket(one)}} for one in plan.replicas]}
            ],
        },
        "health_checks": [
            {
                "grpc_health_check": {},
                "interval": "1s",
                "no_traffic_interval": "1s",
                "unhealthy_interval": "1s",
                "timeout": "1s",
                "unhealthy_threshold": 2,
                "healthy_threshold": 1,
            }
        ],
        # Only what Envoy sees itself: connections that break or are refused. Errors that a replica answers are answers.
        "outlier_detection": {
            "split_external_local_origin_errors": True,
            "consecutive_local_origin_failure": 3,
            "enforcing_consecutive_local_origin_failure": 100,
            "enforcing_local_origin_success_rate": 0,
            "enforcing_consecutive_5xx": 0,
            "enforcing_consecutive_gateway_failure": 0,
            "enforcing_success_rate": 0,
            "interval": "1s",
            "base_ejection_time": "2s",
            "max_ejection_time": "30s",
            "max_ejection_percent": 100,
        },
        # A stream is a request that lasts: with Envoy's defaults the 1025th would be refused.
        "circuit_breakers": {
            "thresholds": [
                {
                    "max_connections": _UNBOUNDED,
                    "max_pending_requests": _UNBOUNDED,
                    "max_requests": _UNBOUNDED,
                    "max_retries": 1000,
                }
            ]
        },
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": f"{_TYPE}.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": {
                    "http2_protocol_options": {
                        "max_concurrent_streams": _CALLS_OF_CONNECTION,
                        "initial_stream_window_size": _MIB,
                        "initial_connection_window_size": 16 * _MIB,
                        # A replica that hangs is noticed by this: what runs on it then ends with UNAVAILABLE. Not before
                        # the health checks have left it out, after four seconds: what is sent again must go elsewhere.
                        "connection_keepalive": {"interval": "3s", "timeout": "4s"},
                    }
                },
            }
        },
    }
    if not is_static:
        # looked up again every five seconds
        document["dns_lookup_family"] = "ALL" if plan.is_one_name else "AUTO"
    if plan.replica_tls is not None:
        document["transport_socket"] = _replica_socket(plan.replica_tls)
    return document


def _caller_socket(tls: CallerTls) -> Value:
    common = _certificates(tls.cert, tls.key, "h2", "http/1.1")
    context: dict[str, Value] = {
        "@type": f"{_TYPE}.transport_sockets.tls.v3.DownstreamTlsContext",
        "common_tls_context": common,
    }
    if tls.client_ca:
        common["validation_context"] = {"trusted_ca": {"filename": tls.client_ca}}
        context["require_client_certificate"] = True
    return {"name": "envoy.transport_sockets.tls", "typed_config": context}


def _replica_socket(tls: ReplicaTls) -> Value:
    common = _certificates(tls.cert, tls.key, "h2")
    kind = "IP_ADDRESS" if Address(tls.name, 0).is_number else "DNS"
    common["validation_context"] = {
        "trusted_ca": {"filename": tls.ca},
        "match_typed_subject_alt_names": [{"san_type": kind, "matcher": {"exact": tls.name}}],
    }
    context: dict[str, Value] = {
        "@type": f"{_TYPE}.transport_sockets.tls.v3.UpstreamTlsContext",
        "common_tls_context": common,
    }
    if kind == "DNS":
        context["sni"] = tls.name
    return {"name": "envoy.transport_sockets.tls", "typed_config": context}


def _certificates(cert: str, key: str, *protocols: str) -> dict[str, Value]:
    common: dict[str, Value] = {
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_2"},
        "alpn_protocols": list(protocols),
    }
    if cert:
        common["tls_certificates"] = [
            {"certificate_chain": {"filename": cert}, "private_key": {"filename": key}}
        ]
    return common


def _socket(address: Address) -> Value:
    return {"socket_address": {"address": address.host, "port_value": address.port}}
