"""Options of gRPC's channels and servers: gRPC passes over those whose names it does not know."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
from grpc._cython import cygrpc  # type: ignore[attr-defined,unused-ignore]

from stepwell._transport import channel
from stepwell.config import ClientConfig
from stepwell_server.core.front_limits import FrontLimits
from stepwell_server.rpc.fronts import python
from stepwell_server.settings.formats import MAX_INT32

SERVER = python._options(FrontLimits(1, age_s=1.0))
CLIENT = [
    *channel._options(ClientConfig("127.0.0.1:1")),
    *channel._options(ClientConfig("unix:/tmp/socket")),
]


@pytest.mark.parametrize("name", sorted({name for name, _ in (*SERVER, *CLIENT)}))
def test_grpc_knows_the_option(name: str) -> None:
    with Path(cygrpc.__file__).open("rb") as file:
        library = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        assert library.find(name.encode() + b"\0") >= 0


def test_the_largest_that_a_setting_may_be_fits_an_option() -> None:
    most = FrontLimits(MAX_INT32, streams=MAX_INT32, age_s=1e308, age_grace_s=1e308)
    assert max(value for _, value in python._options(most)) == MAX_INT32 == 2**31 - 1
