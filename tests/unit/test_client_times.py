"""No time that a server says makes a call of the SDK, or a command, fail."""

from __future__ import annotations

import datetime as dt
import json
import math

import pytest
from google.protobuf import duration_pb2, timestamp_pb2

from stepwell import SessionInfo
from stepwell.cli.sessions import session_cells, session_facts, session_json
from stepwell.v1 import sessions_pb2
from stepwell_server.engine.api import SessionInfo as Info
from stepwell_server.rpc.convert import from_session

LAST = dt.datetime(9999, 12, 31, 23, 59, 59, tzinfo=dt.UTC)


def shown(message: sessions_pb2.Session) -> SessionInfo:
    """What the SDK makes of a session, after everything that is shown of it was made."""
    info = SessionInfo._from_message(message)
    assert repr(info)
    assert info._repr_html_()
    assert session_cells(info, everybodys=True)
    assert session_facts(info)
    assert json.dumps(session_json(info), allow_nan=False)
    return info


@pytest.mark.parametrize(
    ("seconds", "nanos", "found"),
    [
        (0, 1_500_000, dt.datetime(1970, 1, 1, microsecond=1500, tzinfo=dt.UTC)),
        (1_800_000_000, 999_999_999, dt.datetime(2027, 1, 15, 8, microsecond=999_999, tzinfo=dt.UTC)),
        (2**63 - 1, 0, LAST),
        (253_402_300_800, -1, LAST),
        (-(2**63), 0, dt.datetime(1, 1, 1, tzinfo=dt.UTC)),
        (0, 2**31 - 1, dt.datetime(1970, 1, 1, microsecond=999_999, tzinfo=dt.UTC)),
    ],
)
def test_any_timestamp_becomes_a_time(seconds: int, nanos: int, found: dt.datetime) -> None:
    time = timestamp_pb2.Timestamp(seconds=seconds, nanos=nanos)
    max_idle = duration_pb2.Duration(seconds=2**63 - 1, nanos=2**31 - 1)
    info = shown(
        sessions_pb2.Session(session_id="s", created_time=time, last_used_time=time, max_idle=max_idle)
    )
    assert info.created_time == info.last_used_time == found


@pytest.mark.parametrize(
    ("seconds", "found"),
    [
        (1.5, dt.datetime(1970, 1, 1, 0, 0, 1, 500_000, tzinfo=dt.UTC)),
        (math.nan, dt.datetime(1970, 1, 1, tzinfo=dt.UTC)),
        (-1.0, dt.datetime(1970, 1, 1, tzinfo=dt.UTC)),
        (-math.inf, dt.datetime(1970, 1, 1, tzinfo=dt.UTC)),
        (math.inf, LAST),
        (1e12, LAST),
        (1e300, LAST),
    ],
)
def test_any_number_of_a_session_becomes_a_timestamp(seconds: float, found: dt.datetime) -> None:
    info = Info(
        "s", "m", "f", 1, 2**63 - 1, 2**63 - 1, seconds, seconds, resident=False, max_idle_s=abs(seconds)
    )
    message = sessions_pb2.Session.FromString(from_session(info).SerializeToString())
    assert message.created_time.ToDatetime(dt.UTC) == found, "other clients need times in range, too"
    assert message.max_idle.ToTimedelta() >= dt.timedelta(0)
    assert shown(message).created_time == found
