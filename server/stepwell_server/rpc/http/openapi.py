"""The OpenAPI document of the HTTP door, from the descriptors of the protocol and the comments of its files."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor

from stepwell_server.rpc.http.events import EVENT, MEDIA_TYPE
from stepwell_server.rpc.http.routes import WATCH_PATH, WATCHES, Route

_Schema = dict[str, Any]
_COMMENTS = "comments.json"
_VARIABLE = re.compile(r"\{(\w+)\}")
_ERROR = "google.rpc.Status"
_INTEGERS = {
    FieldDescriptor.TYPE_INT32: "int32",
    FieldDescriptor.TYPE_SINT32: "int32",
    FieldDescriptor.TYPE_SFIXED32: "int32",
    FieldDescriptor.TYPE_UINT32: "uint32",
    FieldDescriptor.TYPE_FIXED32: "uint32",
}
_WIDE = {
    FieldDescriptor.TYPE_INT64: "int64",
    FieldDescriptor.TYPE_SINT64: "int64",
    FieldDescriptor.TYPE_SFIXED64: "int64",
    FieldDescriptor.TYPE_UINT64: "uint64",
    FieldDescriptor.TYPE_FIXED64: "uint64",
}
_NUMBER: _Schema = {"anyOf": [{"type": "number"}, {"enum": ["NaN", "Infinity", "-Infinity"]}]}
_OTHERS: Mapping[int, _Schema] = {
    FieldDescriptor.TYPE_DOUBLE: _NUMBER,
    FieldDescriptor.TYPE_FLOAT: _NUMBER,
    FieldDescriptor.TYPE_BOOL: {"type": "boolean"},
    FieldDescriptor.TYPE_STRING: {"type": "string"},
    FieldDescriptor.TYPE_BYTES: {"type": "string", "contentEncoding": "base64"},
}
_WELL_KNOWN: Mapping[str, _Schema] = {
    "google.protobuf.Timestamp": {"type": "string", "format": "date-time"},
    "google.protobuf.Duration": {"type": "string", "pattern": r"^-?[0-9]+(\.[0-9]+)?s$"},
}
_ERROR_SCHEMA: _Schema = {
    "type": "object",
    "description": "An error, with the HTTP status of its code.",
    "properties": {
        "code": {"type": "integer", "description": "The code of the gRPC status."},
        "message": {"type": "string"},
        "details": {
            "type": "array",
            "description": "A google.rpc.ErrorInfo with the reason, and perhaps a google.rpc.RetryInfo.",
            "items": {"type": "object", "properties": {"@type": {"type": "string"}}},
        },
    },
    "required": ["code", "message"],
}
_EVENTS = (
    "Server-sent events. Other methods than watches send them if the header accept names text/event-stream. An event error "
    "has an error, and is the last one."
)
_DESCRIPTION = (
    "Sessions of recurrent models, which the server keeps and steps. Numbers of 64 bits are strings in answers; requests "
    "may use either form. Fields that are 0, false or empty are left out."
)


def document(routes: Iterable[Route], version: str) -> bytes:
    """Return the OpenAPI document of some routes, as JSON."""
    found = _Document()
    paths: dict[str, _Schema] = {}
    watches: list[Route] = []
    for route in routes:
        paths.setdefault(route.template, {})[route.http_method.lower()] = found.operation(route)
        if route.method.name in WATCHES:
            watches.append(route)
    if watches:
        paths[WATCH_PATH] = {"post": found.joint_operation(watches)}
    whole = {
        "openapi": "3.1.0",
        "info": {"title": "Stepwell", "version": version, "description": _DESCRIPTION},
        "servers": [{"url": "/"}],
        "security": [{}, {"bearer": []}],
        "paths": paths,
        "components": {
            "schemas": dict(sorted(found.schemas.items())),
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
    }
    return json.dumps(whole, ensure_ascii=False).encode()


@functools.cache
def comments() -> Mapping[str, str]:
    """Return the comments of the protocol's files, by the full names of what they describe."""
    text = resources.files(__package__).joinpath(_COMMENTS).read_text()
    found: Mapping[str, str] = json.loads(text)
    return found


class _Document:
    """A document in the making, with the schemas that its operations refer to."""

    def __init__(self) -> None:
        self.schemas: dict[str, _Schema] = {_ERROR: _ERROR_SCHEMA}
        self._operations: set[str] = set()

    def operation(self, route: Route) -> _Schema:
        """Return the operation of a route."""
        method = route.method
        text = comments()[method.full_name]
        variables = _VARIABLE.findall(route.template)
        name = method.name
        if name in self._operations:  # a second path of a method
            name = f"{name}By{''.join(part.title() for part in variables[0].split('_'))}"
        self._operations.add(name)
        reply = self._reference(method.output_type)
        content = _json(reply)
        if method.name in WATCHES:
            content = _events(method.name)
        elif method.server_streaming:
            content = _json({"type": "array", "items": reply}) | _events(method.name)
        fields = method.input_type.fields_by_name
        parameters = [self._parameter(fields[variable], "path") for variable in variables]
        if not route.has_body:
            query = (field for field in method.input_type.fields if field.name not in variables)
            parameters += [self._parameter(field, "query") for field in query]
        operation: _Schema = {
            "operationId": name,
            "tags": [method.containing_service.name],
            "summary": text.partition(". ")[0].removesuffix("."),
            "description": text,
            "parameters": parameters,
            "responses": _responses("The reply.", content),
        }
        if route.has_body:
            body = self._reference(method.input_type)
            operation["requestBody"] = {"required": True, "content": _json(body)}
        return operation

    def joint_operation(self, routes: Sequence[Route]) -> _Schema:
        """Return the operation of several methods whose replies have no end."""
        properties = {
            WATCHES[route.method.name]: self._reference(route.method.input_type) for route in routes
        }
        names = " and ".join(route.method.name for route in routes)
        summary = f"{names} as one stream"
        description = (
            f"{summary}. The body has the request of one of them or of both. The stream ends when all of them have ended, or "
            "one fails."
        )
        body = {"type": "object", "properties": properties, "minProperties": 1}
        return {
            "operationId": "Watch",
            "tags": [routes[0].method.containing_service.name],
            "summary": summary,
            "description": description,
            "requestBody": {"required": True, "content": _json(body)},
            "responses": _responses("The events.", _events(*(route.method.name for route in routes))),
        }

    def _parameter(self, field: FieldDescriptor, place: str) -> _Schema:
        return {
            "name": field.name,
            "in": place,
            "required": place == "path",
            "description": comments()[field.full_name],
            "schema": self._field(field),
        }

    def _reference(self, descriptor: Descriptor | EnumDescriptor) -> _Schema:
        """Return a reference to the schema of a message or an enum, which is added if it is new."""
        name = descriptor.full_name
        if name in _WELL_KNOWN:
            return dict(_WELL_KNOWN[name])
        if name not in self.schemas:
            self.schemas[name] = {}  # a message may contain itself
            schema = self._message(descriptor) if isinstance(descriptor, Descriptor) else _enum(descriptor)
            self.schemas[name] = {"description": comments()[name], **schema}
        return _reference(name)

    def _message(self, descriptor: Descriptor) -> _Schema:
        properties = {
            field.name: {"description": comments()[field.full_name], **self._field(field)}
            for field in descriptor.fields
        }
        return {"type": "object", "properties": properties}

    def _field(self, field: FieldDescriptor) -> _Schema:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            values = self._one(field.message_type.fields_by_name["value"])
            return {"type": "object", "additionalProperties": values}
        return {"type": "array", "items": self._one(field)} if field.is_repeated else self._one(field)

    def _one(self, field: FieldDescriptor) -> _Schema:
        if field.message_type is not None:
            return self._reference(field.message_type)
        if field.enum_type is not None:
            return self._reference(field.enum_type)
        if field.type in _INTEGERS:
            return {"type": "integer", "format": _INTEGERS[field.type]}
        if field.type in _WIDE:
            return {"type": ["string", "integer"], "format": _WIDE[field.type]}
        return dict(_OTHERS[field.type])


def _enum(descriptor: EnumDescriptor) -> _Schema:
    return {"type": "string", "enum": [value.name for value in descriptor.values]}


def _events(*methods: str) -> _Schema:
    """Return the content of an answer with the replies of these methods as events."""
    names = {WATCHES.get(method, EVENT): method for method in methods}
    data = ", ".join(f"of {name} a {method}Response" for name, method in names.items())
    schema = {"type": "string", "description": f"{_EVENTS} The data, in JSON: {data}."}
    return {MEDIA_TYPE: {"schema": schema}}


def _responses(description: str, content: _Schema) -> _Schema:
    return {
        "200": {"description": description, "content": content},
        "default": {"description": "An error.", "content": _json(_reference(_ERROR))},
    }


def _reference(name: str) -> _Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(schema: _Schema) -> _Schema:
    return {"application/json": {"schema": schema}}
