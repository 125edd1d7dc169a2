"""The paths of the HTTP door, from the `google.api.http` options of the protocol's methods."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from urllib.parse import unquote

from google.api import annotations_pb2
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor

WATCHES: Mapping[str, str] = {"WatchSessions": "sessions", "WatchServer": "server"}
"""The methods whose replies have no end, and the names of their events."""
WATCH_PATH = "/v1/watch"
"""Path of all of them together, as one stream. The body has the request of each by the name of its events."""
_VARIABLE = re.compile(r"\{(\w+)\}")


@dataclasses.dataclass(frozen=True, slots=True)
class Route:
    """One path of a method."""

    method: MethodDescriptor
    http_method: str
    """GET, POST or DELETE."""
    template: str
    """The path as the protocol writes it: `/v1/sessions/{session_id}:step`."""
    segments: Sequence[str]
    """The segments of the path without the verb, the first one empty. A variable is a segment of its own."""
    verb: str
    """The word behind the colon of the last segment; empty: none."""
    has_body: bool
    """Whether the body is the request message. Otherwise all fields are in path and query."""

    @property
    def path(self) -> str:
        """The gRPC path of its method."""
        return f"/{self.method.containing_service.full_name}/{self.method.name}"

    def variables(self, segments: Sequence[str]) -> dict[str, str] | None:
        """Return the variables in the segments of a path, still percent-encoded; None: the path is another one."""
        found: dict[str, str] = {}
        for own, other in zip(self.segments, segments, strict=True):
            variable = _VARIABLE.fullmatch(own)
            if variable is None:
                if own != other:
                    return None
            elif not other:
                return None
            else:
                found[variable[1]] = other
        return found


@dataclasses.dataclass(frozen=True, slots=True)
class Match:
    """A route, and the variables in a path."""

    route: Route
    variables: Mapping[str, str]


class NoRoute(Exception):
    """No method has this path; the message says so."""


class WrongMethod(Exception):
    """The path exists for other HTTP methods."""

    def __init__(self, allowed: Sequence[str]) -> None:
        super().__init__(allowed)
        self.allowed = allowed


class BadPath(ValueError):
    """The path is not percent-encoded UTF-8."""


class Routes:
    """All routes of some services."""

    def __init__(self, services: Iterable[ServiceDescriptor]) -> None:
        self.all = [
            route for service in services for method in service.methods for route in routes_of(method)
        ]
        self.watches = {
            WATCHES[route.method.name]: route for route in self.all if route.method.name in WATCHES
        }
        """The routes of the methods in `WATCHES`, by the names of their events."""
        self._verbs = {route.verb for route in self.all}
        self._by_form: dict[tuple[int, str], list[Route]] = {}
        for route in self.all:
            self._by_form.setdefault((len(route.segments), route.verb), []).append(route)

    def find(self, http_method: str, path: str) -> Match:
        """Return the route of a path, which is percent-encoded and has no query.

        Raises:
            NoRoute: no method has the path.
            WrongMethod: methods have the path, but not with this HTTP method.
            BadPath: the path is not UTF-8.
        """
        *head, last = path.split("/")
        name, colon, verb = last.rpartition(":")
        if not (colon and verb in self._verbs):
            name, verb = last, ""
        segments = [*head, name]
        matches = [
            Match(route, variables)
            for route in self._by_form.get((len(segments), verb), ())
            if (variables := route.variables(segments)) is not None
        ]
        if not matches:
            raise NoRoute(f"Could not resolve {path} to a method")
        match = next((match for match in matches if match.route.http_method == http_method), None)
        if match is None:
            raise WrongMethod(sorted(match.route.http_method for match in matches))
        if match.route.has_body and not verb and ":" in name:
            # a mistyped verb would otherwise open a session of that name
            raise NoRoute("no such call; in the id of a session to open, a colon is %3A")
        return Match(match.route, {name: _decoded(text) for name, text in match.variables.items()})


def routes_of(method: MethodDescriptor) -> list[Route]:
    """Return the routes of a method. Methods whose clients stream have none."""
    rule = method.GetOptions().Extensions[annotations_pb2.http]
    found = []
    for one in (rule, *rule.additional_bindings):
        kind = one.WhichOneof("pattern")
        if kind is None:
            continue
        template = str(getattr(one, kind))
        place, _, verb = template.partition(":")
        segments = place.split("/")
        found.append(Route(method, kind.upper(), template, segments, verb, one.body == "*"))
    return found


def _decoded(text: str) -> str:
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise BadPath(f"the path must be percent-encoded UTF-8; got {text!r}") from None
