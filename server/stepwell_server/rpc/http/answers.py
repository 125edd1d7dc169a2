"""The answers of the HTTP door: JSON, and errors as Envoy and grpc-gateway write them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus

from stepwell_server.errors import ServerError
from stepwell_server.rpc.fronts.base import HttpAnswer
from stepwell_server.rpc.http.json_form import dumped
from stepwell_server.rpc.status import Code, Status, to_status

Headers = Sequence[tuple[str, str]]
#: The HTTP status of each code of a call.
STATUSES: Mapping[Code, int] = {
    Code.INVALID_ARGUMENT: HTTPStatus.BAD_REQUEST,
    Code.DEADLINE_EXCEEDED: HTTPStatus.GATEWAY_TIMEOUT,
    Code.NOT_FOUND: HTTPStatus.NOT_FOUND,
    Code.ALREADY_EXISTS: HTTPStatus.CONFLICT,
    Code.PERMISSION_DENIED: HTTPStatus.FORBIDDEN,
    Code.RESOURCE_EXHAUSTED: HTTPStatus.TOO_MANY_REQUESTS,
    Code.FAILED_PRECONDITION: HTTPStatus.BAD_REQUEST,
    Code.ABORTED: HTTPStatus.CONFLICT,
    Code.UNIMPLEMENTED: HTTPStatus.NOT_IMPLEMENTED,
    Code.INTERNAL: HTTPStatus.INTERNAL_SERVER_ERROR,
    Code.UNAVAILABLE: HTTPStatus.SERVICE_UNAVAILABLE,
    Code.DATA_LOSS: HTTPStatus.INTERNAL_SERVER_ERROR,
    Code.UNAUTHENTICATED: HTTPStatus.UNAUTHORIZED,
}
_JSON: Headers = (
    ("content-type", "application/json"),
    # states and outputs belong in no cache, and no browser may take an answer for a page or a script
    ("cache-control", "no-store"),
    ("x-content-type-options", "nosniff"),
)


def json_answer(body: bytes, status: int = HTTPStatus.OK, headers: Headers = ()) -> HttpAnswer:
    """Return an answer with a JSON document."""
    return HttpAnswer(status, (*_JSON, *headers), body)


def extended(answer: HttpAnswer, headers: Headers) -> HttpAnswer:
    """Return an answer with more headers."""
    return answer._replace(headers=(*answer.headers, *headers)) if headers else answer


def of_status(status: Status, http_status: int = 0, headers: Headers = ()) -> HttpAnswer:
    """Return the answer to a call that ended with a status. `http_status`: instead of that of the code; 0: none."""
    document, retry_after_s = _details_of(status)
    if retry_after_s:
        headers = (*headers, ("retry-after", str(math.ceil(retry_after_s))))
    if status.code is Code.UNAUTHENTICATED:
        headers = (*headers, ("www-authenticate", "Bearer"))
    return json_answer(dumped(document).encode(), http_status or STATUSES[status.code], headers)


def of_error(error: ServerError, http_status: int = 0, headers: Headers = ()) -> HttpAnswer:
    """Return the answer to a request that is refused. See `of_status`."""
    return of_status(to_status(error), http_status, headers)


def _details_of(status: Status) -> tuple[dict[str, object], float]:
    """Return the JSON of a status, and the delay of a retry in seconds; 0: none."""
    document: dict[str, object] = {"code": int(status.code), "message": status.message}
    details = next((value for key, value in status.trailers if key.endswith("-bin")), b"")
    if not details:
        return document, 0.0
    # Imported here, not at the start, because a server may run long before its first error.
    from google.protobuf import json_format
    from google.rpc import error_details_pb2, status_pb2

    full = status_pb2.Status.FromString(details)
    found = json_format.MessageToDict(full, preserving_proto_field_name=True)
    retry = error_details_pb2.RetryInfo()
    delay_s = 0.0
    for detail in full.details:
        if detail.Unpack(retry):
            delay_s = retry.retry_delay.ToTimedelta().total_seconds()
    return document | {"details": found.get("details", [])}, delay_s
