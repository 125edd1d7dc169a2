"""The server is killed while its sessions are carried to another version: each is wholly before that or wholly after.

The short version of what `make soak` does.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from support.load.moving_defaults import MovingDefaults
from support.servers.fault_servers import local

pytestmark = pytest.mark.plain("it loads models, for which a secured server wants an admin")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("durability", "extra"), [("sync", ()), ("async", ("--resident-rows", "900"))], ids=["sync", "async"]
)
def test_kills_within_carries(tmp_path: Path, durability: str, extra: tuple[str, ...]) -> None:
    """A tenth of the sessions is idle: their records are brought forward over all moves at once."""
    with (
        local(tmp_path / "data", "--durability", durability, *extra) as server,
        MovingDefaults(server, seed=31, busy=900, idle=100) as carrying,
    ):
        for _ in range(5):
            carrying.kill()
        carrying.wait(moves=3, frames=3)
        carrying.finish()
