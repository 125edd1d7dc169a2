"""Which call goes to which replica, for how long, and what Envoy tries again.

Calls that name one session go to the replica that the hash of its id stands for, so that it is in that replica's memory
already. That is a matter of speed alone: every replica serves every session.
"""

from __future__ import annotations

from collections.abc import Sequence

from stepwell.cli.envoy._yaml import Value
from stepwell.cli.envoy.descriptors import streams

CLUSTER = "stepwell"
SESSION_HEADER = "stepwell-session"
#: With what a replica says that nothing of a call was done, and that another replica may do it: it starts, or stops.
GO_ELSEWHERE = ("stepwell-retry", "other-replica")
#: How long the caller of a call in JSON may send nothing of it, beside the time that the answer may take.
_SENDING_S = 300
#: What Envoy's transcoder puts there: the path as the caller wrote it.
ORIGINAL_PATH = "x-envoy-original-path"
#: A path that names a session; the group is its id as it stands there. Ids may have colons.
_SESSION_PATH = r"/v1/sessions/([^?/]+?)(?::(?:step|reset|fork))?(?:/state)?(?:\?.*)?"
_OPEN = "/stepwell.v1.SessionService/OpenSession"
#: A path with a colon at which no known call begins: the transcoder takes it and what follows for a part of an id.
_UNKNOWN_CALL = r"/v1/sessions/[^?/]*:.*"
#: Calls that change nothing, which may be sent again whatever became of them. Some of them count as use of a session.
_READS = r"/stepwell\.v1\.(Session|Model)Service/(Get|List|Predict).*"
#: Streams of protocols that Stepwell serves beside its own.
_OTHER_STREAMS = (
    "/inference.GRPCInferenceService/ModelStreamInfer",
    "/grpc.health.v1.Health/Watch",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
)


def routes(json_timeout_s: float, origins: Sequence[str]) -> list[Value]:
    """The routes, in the order in which they are tried.

    Args:
        origins: of the pages that may call from a browser; * for all.
        json_timeout_s: how long a call in JSON may take, which says no deadline itself.
    """
    limit, silence = f"{json_timeout_s:g}s", f"{json_timeout_s + _SENDING_S:g}s"
    by_header = _hashed_by(SESSION_HEADER, terminal=True)
    by_path = _hashed_by(ORIGINAL_PATH, rewritten=_SESSION_PATH)
    is_of_session: Value = {"name": ORIGINAL_PATH, "string_match": {"safe_regex": {"regex": _SESSION_PATH}}}
    is_json: Value = {"name": ORIGINAL_PATH, "present_match": True}
    return [
        *_refusal_of_others(origins),
        _refusal_of_unknown_calls(),
        # Streams live as long as their clients want, and are silent meanwhile.
        *(
            {"name": "stream", "match": {"path": path}, "route": _route("0s", "0s", [by_header])}
            for path in (*streams(), *_OTHER_STREAMS)
        ),
        *_calls("json-session", [is_of_session], limit, silence, [by_header, by_path]),
        *_calls("json", [is_json], limit, silence, [by_header]),
        # A gRPC caller has a deadline of its own, which the replica keeps, and waits for a long answer in silence.
        *_calls("grpc", [], "0s", "0s", [by_header]),
    ]


def _refusal_of_others(origins: Sequence[str]) -> list[Value]:
    """The route of what pages of other origins send: a browser sends much of it without asking whether it may."""
    if "*" in origins:
        return []
    is_one: list[Value] = [{"name": "origin", "present_match": True}]
    is_other: list[Value] = [
        {"name": "origin", "string_match": {"exact": origin}, "invert_match": True} for origin in origins
    ]
    text = "the page's origin must be one that --cors-origin of stepwell envoy-config names"
    return [
        {
            "name": "other-origin",
            "match": {"prefix": "/", "headers": [*is_one, *is_other]},
            "direct_response": _forbidden(text),
        }
    ]


def _refusal_of_unknown_calls() -> Value:
    """The route of `/v1/sessions/ID:stpe`, which would open a session of that id; in one that is meant it is `%3A`."""
    text = "no such call; in the id of a session to open, a colon is %3A"
    headers: list[Value] = [{"name": ORIGINAL_PATH, "string_match": {"safe_regex": {"regex": _UNKNOWN_CALL}}}]
    return {
        "name": "unknown-call",
        "match": {"path": _OPEN, "headers": headers},
        "direct_response": {"status": 404, "body": {"inline_string": text}},
    }


def refusal_of_hosts() -> Value:
    """The host of what is called by a name that Envoy has not.

    A page whose own name leads to this machine (DNS rebinding) is of one origin with it, for a browser.
    """
    text = "the host that is called must be one that --host of stepwell envoy-config names"
    refusal: Value = {"name": "other-host", "match": {"prefix": "/"}, "direct_response": _forbidden(text)}
    return {"name": "others", "domains": ["*"], "routes": [refusal]}


def _forbidden(text: str) -> Value:
    return {"status": 403, "body": {"inline_string": text}}


def _calls(
    name: str, headers: list[Value], timeout: str, silence: str, hash_policy: list[Value]
) -> list[Value]:
    """The routes of calls with these headers: of those that change nothing, and of the others."""
    reads: dict[str, Value] = {"safe_regex": {"regex": _READS}}
    others: dict[str, Value] = {"prefix": "/"}
    if headers:
        reads["headers"] = others["headers"] = headers
    return [
        {"name": f"{name}-read", "match": reads, "route": _route(timeout, silence, hash_policy, ",reset")},
        {"name": name, "match": others, "route": _route(timeout, silence, hash_policy)},
    ]


def _route(timeout: str, silence: str, hash_policy: list[Value], retries: str = "") -> Value:
    """How calls go on: `timeout` from the whole request to the whole answer, `silence` between any two parts of either."""
    route: dict[str, Value] = {"cluster": CLUSTER, "timeout": timeout, "hash_policy": hash_policy}
    route["idle_timeout"] = silence  # Envoy's own is five minutes
    if retries:
        route["retry_policy"] = retry_policy(retries)
    return route


def retry_policy(more: str = "") -> Value:
    """What Envoy tries again, with another replica: only what no replica has seen or done anything of, and `more`.

    Whether a step that was sent was applied, Envoy cannot know: who sent it tries again, with the same request id. If
    no replica takes it the last one's answer is the caller's.
    """
    name, value = GO_ELSEWHERE
    return {
        "retry_on": f"connect-failure,refused-stream,reset-before-request,retriable-headers{more}",
        "retriable_headers": [{"name": name, "string_match": {"exact": value}}],
        "num_retries": 5,
        "retry_back_off": {"base_interval": "0.005s", "max_interval": "0.1s"},
        "retry_host_predicate": [
            {
                "name": "envoy.retry_host_predicates.previous_hosts",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.retry.host.previous_hosts.v3"
                    ".PreviousHostsPredicate"
                },
            }
        ],
        # places of the ring, not replicas: one replica has many next to each other
        "host_selection_retry_max_attempts": 30,
    }


def _hashed_by(name: str, *, rewritten: str = "", terminal: bool = False) -> Value:
    header: dict[str, Value] = {"header_name": name}
    if rewritten:
        header["regex_rewrite"] = {"pattern": {"regex": f"^{rewritten}$"}, "substitution": r"\1"}
    policy: dict[str, Value] = {"header": header}
    if terminal:
        policy["terminal"] = True  # those after it are for who does not send the header
    return policy
