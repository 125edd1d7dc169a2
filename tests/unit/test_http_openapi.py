"""The OpenAPI document: valid, whole, with the comments of the protocol, and true of the answers."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from stepwell.v1 import models_pb2, sessions_pb2, watch_pb2
from stepwell_server.rpc.http import openapi
from stepwell_server.rpc.http.routes import WATCH_PATH, Routes
from support.rpc.calls import calls
from support.rpc.http_client import SERVICES, Client

ROUTES = Routes(SERVICES)


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(openapi.document(ROUTES.all, "1.2.3"))
    return found


def test_it_is_valid(document: dict[str, Any]) -> None:
    OpenAPIV31SpecValidator(document).validate()
    assert document["info"]["version"] == "1.2.3"


def test_it_has_every_route_once(document: dict[str, Any]) -> None:
    found = {(path, method) for path, methods in document["paths"].items() for method in methods}
    routes = {(route.template, route.http_method.lower()) for route in ROUTES.all}
    assert found == routes | {(WATCH_PATH, "post")}
    names = [one["operationId"] for methods in document["paths"].values() for one in methods.values()]
    assert len(set(names)) == len(names) == len(ROUTES.all) + 1


def test_streams_are_described_as_events(document: dict[str, Any]) -> None:
    def kinds(path: str, method: str = "post") -> set[str]:
        return {*document["paths"][path][method]["responses"]["200"]["content"]}

    assert kinds("/v1/models/{name}:load") == {"application/json", "text/event-stream"}
    assert kinds("/v1/sessions:watch") == kinds(WATCH_PATH) == {"text/event-stream"}
    assert kinds("/v1/models", "get") == {"application/json"}
    body = document["paths"][WATCH_PATH]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert [*body["properties"]] == ["sessions", "server"]


def test_everything_is_described(document: dict[str, Any]) -> None:
    for file in (sessions_pb2.DESCRIPTOR, models_pb2.DESCRIPTOR, watch_pb2.DESCRIPTOR):
        for message in file.message_types_by_name.values():
            assert openapi.comments()[message.full_name], message.full_name
            for field in message.fields:
                assert openapi.comments()[field.full_name], field.full_name
    step = document["paths"]["/v1/sessions/{session_id}:step"]["post"]
    assert step["summary"].startswith("Advances a session by one time step")
    assert not re.search(r'"description": ""', json.dumps(document))


async def test_answers_fit_the_document_and_it_is_served() -> None:
    async with calls() as at:
        client = Client(at)
        status, document = await client.json("GET", "/openapi.json")
        assert status == 200

        async def checked(method: str, path: str, template: str, body: object = None) -> None:
            status, answer = await client.json(method, path, body)
            responses = document["paths"][template][method.lower()]["responses"]
            schema = responses["200" if status == 200 else "default"]["content"]["application/json"]["schema"]
            jsonschema.Draft202012Validator({**document, **schema}).validate(answer)

        session = "/v1/sessions/{session_id}"
        step = {"inputs": [{"values": [1, 2]}]}
        await checked("POST", "/v1/sessions/a", session, {"model": "plain", "max_idle": "60s"})
        await checked("POST", "/v1/sessions/a:step", f"{session}:step", step)
        await checked("GET", "/v1/sessions/a", session)
        await checked("GET", "/v1/sessions/a/state?tensor_format=2", f"{session}/state")
        await checked("GET", "/v1/sessions", "/v1/sessions")
        await checked("GET", "/v1/models", "/v1/models")
        await checked("GET", "/v1/sessions/nobody", session)
