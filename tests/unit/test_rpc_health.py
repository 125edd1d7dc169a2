"""Health of the server and of each model, as health checkers see it."""

from __future__ import annotations

import asyncio

import pytest
from grpc_health.v1 import health_pb2 as pb

from stepwell_server.errors import ServiceNotFound
from stepwell_server.process.readiness import LOADED, Readiness, Report
from stepwell_server.rpc.services.health import HealthServicer
from support.rpc.fake_call import FakeCall

SERVING, NOT_SERVING = pb.HealthCheckResponse.SERVING, pb.HealthCheckResponse.NOT_SERVING
UNKNOWN = pb.HealthCheckResponse.SERVICE_UNKNOWN


async def status(health: HealthServicer, service: str) -> int:
    reply = await health.check(pb.HealthCheckRequest(service=service), FakeCall())
    return int(reply.status)


class Watch:
    """A stream of `Watch`."""

    def __init__(self, health: HealthServicer, service: str) -> None:
        self.call = FakeCall()
        self.call.send(pb.HealthCheckRequest(service=service))
        self.task = asyncio.create_task(health.watch(self.call))

    async def next(self) -> int:
        reply = await asyncio.wait_for(self.call.replies.get(), 100)
        return int(pb.HealthCheckResponse.FromString(reply).status)


async def test_each_model_is_a_service_of_its_own() -> None:
    health = HealthServicer(["a.Service"])
    with pytest.raises(ServiceNotFound, match=r"or stepwell.model/NAME or stepwell.model/NAME@VERSION for a"):
        await status(health, "stepwell.model/forecast")
    health.announce(is_serving=False, models={"forecast": True, "forecast@2": True, "words": False})
    assert await status(health, "") == await status(health, "a.Service") == NOT_SERVING
    assert await status(health, "stepwell.model/forecast") == SERVING
    assert await status(health, "stepwell.model/forecast@2") == SERVING
    assert await status(health, "stepwell.model/words") == NOT_SERVING
    for name in ("stepwell.model/forecast@1", "stepwell.model/other", "forecast", "stepwell.model/"):
        with pytest.raises(ServiceNotFound, match=r"got '.*'") as refused:
            await status(health, name)
        assert "words" not in refused.value.message


async def test_models_are_listed_without_authentication() -> None:
    for lists_models, names in (
        (True, {"", "a.Service", "stepwell.model/forecast"}),
        (False, {"", "a.Service"}),
    ):
        health = HealthServicer(["a.Service"], lists_models=lists_models)
        health.announce(is_serving=True, models={"forecast": False})
        listed = await health.list(None, FakeCall())
        assert set(listed.statuses) == names  # type: ignore[attr-defined]


async def test_a_watch_reports_changes_of_its_service_only() -> None:
    health = HealthServicer(["a.Service"])
    forecast, server = Watch(health, "stepwell.model/forecast"), Watch(health, "")
    assert (await forecast.next(), await server.next()) == (UNKNOWN, NOT_SERVING)
    health.announce(is_serving=False, models={"forecast": False})
    assert await forecast.next() == NOT_SERVING
    health.announce(is_serving=False, models={"forecast": True, "words": False})
    assert await forecast.next() == SERVING
    health.announce(is_serving=False, models={"forecast": True, "words": True})
    health.announce(is_serving=True, models={"forecast": True, "words": True})
    assert await server.next() == SERVING
    health.announce(is_serving=True, models={"words": True})
    assert await forecast.next() == UNKNOWN
    health.announce(is_serving=True, models={"forecast": True})
    assert await forecast.next() == SERVING
    health.stop()
    assert (await forecast.next(), await server.next()) == (NOT_SERVING, NOT_SERVING)
    health.announce(is_serving=True, models={"forecast": True})
    assert await status(health, "stepwell.model/forecast") == await status(health, "") == NOT_SERVING
    for each in (forecast, server):
        each.task.cancel()
        await asyncio.gather(each.task, return_exceptions=True)
        assert each.call.replies.empty()


def test_a_model_has_the_status_of_its_most_advanced_version() -> None:
    readiness = Readiness()
    reports: list[Report] = []
    readiness.listen(reports.append)
    readiness.version("forecast", 2, "waiting")
    readiness.version("forecast", 1, "failed: no model")
    assert readiness.report.models == {"forecast": "waiting"}
    assert list(readiness.report.versions["forecast"]) == [1, 2]
    readiness.version("forecast", 2, "loading: trace")
    assert readiness.report.models == {"forecast": "loading: trace"}
    assert not readiness.report.is_loaded("forecast")
    readiness.version("forecast", 2, LOADED)
    readiness.version("forecast", 3, "loading: trace")
    assert readiness.report.models == {"forecast": "loaded"}
    assert readiness.report.is_loaded("forecast")
    assert [readiness.report.is_loaded("forecast", each) for each in (1, 2, 3, 4)] == [
        False,
        True,
        False,
        False,
    ]
    told = len(reports)
    readiness.version("forecast", 3, "loading: trace")
    assert len(reports) == told
    for version in (1, 2, 3):
        readiness.version("forecast", version, "")
    assert readiness.report.versions == {}
    assert not readiness.report.is_loaded("forecast")
