"""Models of several replicas that share a store, loaded and unloaded by one client: all of them, and the default once."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stepwell
from support import secured
from support.load.driver import MODEL
from support.models import programs
from support.processes import until
from support.sdk.client_kinds import connect
from support.secured import Server
from support.servers.replica_servers import replicas
from support.servers.server_process import forecast, retrained
from support.servers.valkey_servers import Valkey

pytestmark = pytest.mark.skipif(secured.is_on(), reason="versions are the same with TLS")
SHELLS = ("sync", "async")
X = np.ones((8, 3), np.float32)


@pytest.fixture(scope="module")
def servers() -> Iterator[list[Server]]:
    with Valkey(append="everysec") as valkey, replicas(valkey, 2) as servers:
        yield servers


def versions(server: Server) -> dict[int, bool]:
    """What one replica has, and which is its default."""
    with stepwell.connect(server.address) as client:
        found = client.model(MODEL).versions
        return {each.version: each.is_default for each in found if each.state == "ready"}


@pytest.mark.slow
@pytest.mark.parametrize("shell", SHELLS)
async def test_a_version_is_loaded_on_all_and_becomes_the_default_once(
    shell: str, servers: list[Server]
) -> None:
    stages: list[str] = []
    async with connect(shell, ",".join(server.address for server in servers), timeout_s=60.0) as client:
        group = await client.open_sessions(MODEL, 8)
        before = await group.step(X)
        old = int(group.model_versions[0])
        loaded = await client.load_model(
            MODEL, retrained().path, sessions="carry", labels=["new"], progress=stages.append
        )
        assert loaded.version > old
        assert loaded.previous_version == old
        for server in servers:
            assert any(stage.startswith(f"{server.address}: ") for stage in stages)
            until(lambda server=server: versions(server) == {old: False, loaded.version: True})  # type: ignore[misc]
        after = await group.step(X)
        assert set(group.model_versions.tolist()) == {loaded.version}
        assert not np.allclose(before, after)
        pinned = await client.open_session(f"{MODEL}:new")
        assert pinned.model_version == loaded.version
        await pinned.close()
        # a number that is there is refused, unless a replica has yet to load it
        with pytest.raises(stepwell.ModelVersionExistsError):
            await client.load_model(MODEL, retrained().path, version=loaded.version, default=False)
        back = await client.set_default(MODEL, old, sessions="carry")
        assert (back.version, back.previous_version) == (old, loaded.version)
        await group.step(X)
        await group.close()
        await client.unload_model(MODEL, loaded.version, force=True)
        with stepwell.connect(servers[0].address, timeout_s=60.0) as one:
            one.load_model(MODEL, retrained().path, version=loaded.version, default=False)
        # on a busy machine the other replica has found the version in the store before, and loads it already
        with contextlib.suppress(stepwell.ModelVersionExistsError):
            again = await client.load_model(MODEL, retrained().path, version=loaded.version, default=False)
            assert again.version == loaded.version
            assert all(loaded.version in versions(server) for server in servers)
        for server in servers:
            until(lambda server=server: loaded.version in versions(server))  # type: ignore[misc]
        await client.unload_model(MODEL, loaded.version)
        for server in servers:
            until(lambda server=server: loaded.version not in versions(server))  # type: ignore[misc]
        with pytest.raises(stepwell.ModelNotFoundError):
            await client.unload_model(MODEL, loaded.version)


def unnamed(units: int) -> Any:
    """A model whose layers Keras names."""
    import keras

    layers = [keras.layers.LSTM(units, return_sequences=True), keras.layers.Dense(1)]
    return keras.Sequential([keras.Input((None, 3)), *layers])


async def test_a_retrained_model_is_carried_and_another_one_uses_no_number(servers: list[Server]) -> None:
    sizes, kept = {"unnamed": 4, "unnamed_retrained": 4, "unnamed_wider": 5}, programs.kept_with(__file__)
    first_file, retrained_file, wider_file = [
        programs.saved(name, functools.partial(unnamed, units), kept=kept).path
        for name, units in sizes.items()
    ]
    async with connect("sync", ",".join(server.address for server in servers), timeout_s=60.0) as client:
        first = await client.load_model("unnamed", first_file)
        group = await client.open_sessions("unnamed", 8)
        await group.step(X)
        with pytest.raises(stepwell.ModelMismatchError, match="units was 4 and is 5"):
            await client.update_model("unnamed", wider_file)
        updated = await client.update_model("unnamed", retrained_file)
        assert (updated.version, updated.previous_version) == (first.version + 1, first.version)
        await group.step(X)
        assert set(group.model_versions.tolist()) == {updated.version}
        await group.close()
        for server in servers:
            with stepwell.connect(server.address) as one:
                found = one.model("unnamed")
                assert (found.state, found.outputs) == (first.state, first.outputs)
        await client.unload_model("unnamed", force=True)


@pytest.mark.slow
@pytest.mark.parametrize("shell", SHELLS)
async def test_a_file_that_fails_moves_nothing(shell: str, servers: list[Server], tmp_path: Path) -> None:
    (tmp_path / "bad.keras").write_bytes(b"nothing")
    async with connect(shell, ",".join(server.address for server in servers), timeout_s=60.0) as client:
        before = [versions(server) for server in servers]
        with pytest.raises(stepwell.ModelLoadError) as caught:
            await client.load_model(MODEL, str(tmp_path / "bad.keras"))
        notes: Any = caught.value.__notes__
        assert notes == [f"this is the error of the replica {servers[0].address}. The default has not moved."]
        assert [versions(server) for server in servers] == before


@pytest.mark.slow
@pytest.mark.parametrize("shell", SHELLS)
async def test_a_replica_that_is_gone_is_passed_over(shell: str, servers: list[Server]) -> None:
    async with connect(shell, f"{servers[0].address},127.0.0.1:1", timeout_s=60.0) as client:
        loaded = await client.load_model(MODEL, retrained().path, default=False)
        assert loaded.version in versions(servers[0])
        await client.unload_model(MODEL, loaded.version)
        assert loaded.version not in versions(servers[0])
    async with connect(shell, "127.0.0.1:1,127.0.0.1:2", timeout_s=60.0) as client:
        with pytest.raises(
            stepwell.UnavailableError, match=r"no replica can be reached: 127.0.0.1:1: .*127.0.0.1:2: "
        ):
            await client.load_model(MODEL, forecast().path)
