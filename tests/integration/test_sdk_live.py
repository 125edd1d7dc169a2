"""Models that get new versions under the sessions of both clients, against the real server on both fronts."""

from __future__ import annotations

import asyncio
import functools
import itertools
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stepwell
from stepwell import errors
from support.models import programs
from support.sdk.client_kinds import connect
from support.servers.both_fronts import needs_native
from support.servers.fork_server import ForkedServer

MODEL = "live"
UNITS = 8
LOAD_S = 200.0
_numbers = itertools.count(1)


def build(seed: int, outputs: int = 2) -> Any:
    """A model whose weights are the seed's."""
    import keras

    keras.utils.set_random_seed(seed)
    layers = [
        keras.Input((None, 3), name="x"),
        keras.layers.LSTM(UNITS, return_sequences=True, name="lstm"),
        keras.layers.Dense(outputs, name="y"),
    ]
    return keras.Sequential(layers, name=MODEL)


@pytest.fixture(scope="module")
def paths() -> dict[str, Path]:
    """Models by what is special about them; all are compiled."""
    kinds = {"first": (1, 2), "second": (2, 2), "third": (3, 2), "wider": (4, 5)}
    kept = programs.kept_with(__file__)
    return {
        name: programs.saved(f"live-{name}", functools.partial(build, *of), kept=kept).path
        for name, of in kinds.items()
    }


@pytest.fixture(
    scope="module",
    params=[pytest.param("native", marks=needs_native), pytest.param("python", marks=pytest.mark.slow)],
)
def server(request: pytest.FixtureRequest, paths: dict[str, Path]) -> Iterator[ForkedServer]:
    options = ["--front", request.param]
    with ForkedServer({MODEL: paths["first"]}, extra_args=options, cache_dir=programs.cache_dir()) as server:
        yield server


@pytest.fixture
def name(server: ForkedServer, paths: dict[str, Path]) -> Iterator[str]:
    """A model with one version, which is nobody else's."""
    name = f"m{next(_numbers)}"
    with stepwell.connect(server.address, timeout_s=LOAD_S) as client:
        client.load_model(name, paths["first"])
        yield name
        client.unload_model(name, force=True)


@pytest.fixture(params=["sync", "async without frames"])
async def client(request: pytest.FixtureRequest, server: ForkedServer) -> AsyncIterator[Any]:
    async with connect(request.param, server.address, timeout_s=LOAD_S) as client:
        yield client


def draw(*shape: int) -> Any:
    return np.random.default_rng().standard_normal((*shape, 3)).astype(np.float32)


async def predicted(client: Any, model: str, x: Any, state: Any = None) -> Any:
    return (await client.predict(model, x, None if state is None else dict(state)))[0]


async def test_new_weights_meet_the_old_states(client: Any, name: str, paths: dict[str, Path]) -> None:
    x = draw(4)
    async with (
        await client.open_session(name, batch_size=4) as session,
        await client.open_session(f"{name}@1", batch_size=4) as pinned,
        await client.open_sessions(name, 4) as group,
    ):
        for _ in range(3):
            for one in (session, pinned, group):
                await one.step(x)
        state = await session.get_state()
        loaded = await client.load_model(name, paths["second"], sessions="carry")
        assert (loaded.name, loaded.version) == (name, 2)
        assert loaded.moved_sessions == 5
        new = await predicted(client, f"{name}@2", x, state)
        assert not np.array_equal(new, await predicted(client, f"{name}@1", x, state))
        assert (await session.step(x)).tobytes() == new.tobytes()
        assert (await group.step(x)).tobytes() == new.tobytes()
        old = await predicted(client, f"{name}@1", x, state)
        assert (await pinned.step(x)).tobytes() == old.tobytes()
        assert (session.model_version, session.revision, session.position) == (2, 4, 4)
        assert (pinned.model_version, pinned.model_version_pinned) == (1, True)
        assert (group.model_versions.tolist(), group.revisions.tolist()) == ([2] * 4, [4] * 4)
        await client.set_default(name, 1, sessions="carry")
        await session.reset_states()
        await group.refresh()
        assert session.model_version == 1
        assert group.model_versions.tolist() == [1] * 4
        assert (await session.get_state()).fingerprint == state.fingerprint


async def test_sessions_are_kept_or_begin_anew(client: Any, name: str, paths: dict[str, Path]) -> None:
    x = draw(1)
    async with await client.open_session(name) as kept, await client.open_session(name) as other:
        await kept.step(x)
        await client.load_model(name, paths["second"])
        await kept.step(x)
        await other.step(x)
        assert (kept.model_version, other.model_version) == (1, 1)
        async with await client.open_session(name) as fresh:
            await fresh.step(x)
            await fresh.step(x)
            assert (fresh.model_version, fresh.model_version_pinned) == (2, False)
            await client.load_model(name, paths["third"], sessions="reset")
            assert (await fresh.step(x)).tobytes() == (await predicted(client, f"{name}@3", x)).tobytes()
            assert (fresh.model_version, fresh.revision) == (3, 3)
        await kept.step(x)
        assert kept.model_version == 1


async def test_nothing_is_lost_while_weights_change(
    server: ForkedServer, client: Any, name: str, paths: dict[str, Path]
) -> None:
    """Each step is made once, under the version that its answer names, on the state that the last one left."""
    made: list[tuple[Any, Any, int]] = []
    is_over = threading.Event()

    def play() -> None:
        with stepwell.connect(server.address) as own, own.open_session(name) as session:
            x = draw(1)
            while not is_over.is_set() or len(made) < 10:
                y = session.step(x)
                made.append((x, y, session.model_version))
            assert session.revision == len(made)

    playing = asyncio.create_task(asyncio.to_thread(play))
    for path in ("second", "third", "first"):
        await client.update_model(name, paths[path])
    is_over.set()
    await playing
    state = None
    versions = [version for _, _, version in made]
    assert versions == sorted(versions)
    # the versions before the last one are gone, and so it is asked of the others' twins
    twins = {1: "first", 2: "second", 3: "third", 4: "first"}
    for version, path in twins.items():
        await client.load_model(f"{name}-twin", paths[path], version=version, default=version == 1)
    for x, y, version in made:
        told, after = await client.predict(f"{name}-twin@{version}", x, state)
        assert told.tobytes() == y.tobytes()
        state = dict(after)
    await client.unload_model(f"{name}-twin", force=True)


async def test_a_group_is_stepped_while_weights_change(
    client: Any, name: str, paths: dict[str, Path]
) -> None:
    x = draw(64)
    async with await client.open_sessions(name, 64) as group:
        loading = asyncio.create_task(client.update_model(name, paths["second"]))
        steps = 0
        while not loading.done() or steps < 3:
            await group.step(x)
            steps += 1
        await loading
        await group.step(x)
        assert (group.model_versions.tolist(), group.revisions.tolist()) == ([2] * 64, [steps + 1] * 64)
        assert (await group.fork()).model_versions.tolist() == [2] * 64


async def test_what_cannot_be_loaded_changes_nothing(
    client: Any, name: str, paths: dict[str, Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.keras"
    await asyncio.to_thread(broken.write_bytes, b"PK no archive")
    async with await client.open_session(name) as session:
        cases: tuple[tuple[type[Exception], str | None, Path, dict[str, Any]], ...] = (
            (errors.ModelLoadError, None, broken, {}),
            (errors.ModelMismatchError, "'y'", paths["wider"], {"sessions": "carry"}),
            (errors.ModelVersionExistsError, "1", paths["second"], {"version": 1}),
            (errors.RefusedError, "--allow-model-upload", paths["second"], {"upload": True}),
            (errors.MigrationFailedError, None, paths["second"], {"sessions": "migrate"}),
        )
        for kind, text, file, options in cases:
            with pytest.raises(kind, match=text):
                await client.load_model(name, file, **options)
        await session.step(draw(1))
        assert session.model_version == 1
        info = await client.model(name)
        assert (info.version, [one.version for one in info.versions if one.state == "ready"]) == (1, [1])


async def test_versions_and_labels_come_and_go(client: Any, name: str, paths: dict[str, Path]) -> None:
    loaded = await client.load_model(name, paths["second"], default=False, labels=["canary"])
    assert loaded.version == 2
    versions = {one.version: one for one in (await client.model(name)).versions}
    assert [(one.is_default, one.labels, one.state) for one in versions.values()] == [
        (True, (), "ready"),
        (False, ("canary",), "ready"),
    ]
    assert versions[2].fingerprint == loaded.fingerprint != versions[1].fingerprint
    async with await client.open_session(f"{name}:canary") as canary:
        assert (canary.model, canary.model_version, canary.model_version_pinned) == (name, 2, True)
        await client.set_label(name, "canary", 1)
        await canary.step(draw(1))
        assert canary.model_version == 2
        for version in (1, 2):
            with pytest.raises(errors.ModelInUseError):
                await client.unload_model(name, version)
        async with await client.open_session(name, session_id=f"{name}-again") as session:
            assert (await client.open_session(name, session_id=session.id)).resumed
    await client.remove_label(name, "canary")
    with pytest.raises(errors.ModelNotFoundError):
        await client.open_session(f"{name}:canary")
    await client.unload_model(name, 2)
    with pytest.raises(errors.ModelNotFoundError):
        await client.open_session(f"{name}@2")


async def test_a_keras_model_is_pushed(client: Any, name: str) -> None:
    """The same object, trained on: what a trainer has."""
    model = build(1)
    x = draw(1)
    async with await client.open_session(name) as session:
        await session.step(x)
        state = await session.get_state()
        model.set_weights([2 * weight for weight in model.get_weights()])
        assert (await client.update_model(name, model)).version == 2
        y = await session.step(x)
        assert session.model_version == 2
        assert y.tobytes() == (await predicted(client, name, x, state)).tobytes()
        whole = np.asarray(model(np.stack([x, x], 1)))[:, 0]
        assert np.allclose(await predicted(client, name, x), whole, atol=1e-6)


def test_a_file_is_sent_to_a_server_that_takes_it(paths: dict[str, Path]) -> None:
    options = ["--allow-model-upload"]
    with (
        ForkedServer({MODEL: paths["first"]}, extra_args=options, cache_dir=programs.cache_dir()) as server,
        stepwell.connect(server.address, timeout_s=LOAD_S) as client,
        client.open_session(MODEL) as session,
    ):
        assert client.update_model(MODEL, paths["second"], upload=True).version == 2
        session.step(draw(1))
        assert session.model_version == 2


def test_a_server_of_ones_own_has_several_versions_from_the_start_and_gets_more(
    paths: dict[str, Path],
) -> None:
    models = {f"{MODEL}@1": paths["first"], f"{MODEL}@4": paths["second"]}
    with stepwell.local(models, cache_dir=programs.cache_dir(), timeout_s=LOAD_S) as client:
        assert [one.version for one in client.model(MODEL).versions] == [1, 4]
        with client.open_session(MODEL) as session:
            assert session.model_version == 4
            assert client.update_model(MODEL, paths["third"]).version == 5
            session.step(draw(1))
            assert session.model_version == 5
        assert stepwell.local(models, cache_dir=programs.cache_dir(), timeout_s=LOAD_S) is client
    for name in (f"{MODEL}@", f"{MODEL}@0", f"{MODEL}@01", f"{MODEL}@x", f"{MODEL}:canary"):
        with pytest.raises(errors.InvalidInputError, match="or NAME@VERSION"):
            stepwell.local({name: paths["first"]})


@pytest.mark.slow
def test_weights_that_were_pushed_outlive_the_server(tmp_path: Path, paths: dict[str, Path]) -> None:
    """Their file is gone, and so the server keeps what it made of it."""
    model, x = build(7), draw(1)
    with (
        ForkedServer({MODEL: paths["first"]}, tmp_path / "data", cache_dir=programs.cache_dir()) as server,
        stepwell.connect(server.address, timeout_s=LOAD_S) as client,
    ):
        session = client.open_session(MODEL, session_id="anna")
        session.step(x)
        client.update_model(MODEL, model)
        y = session.step(x)
        state = session.get_state()
        server.kill()
        server.restart()
        assert client.model(MODEL).version == 2
        again = client.open_session(MODEL, session_id="anna")
        assert (again.resumed, again.model_version, again.revision) == (True, 2, 2)
        assert again.get_state() == state
        assert client.predict(MODEL, x, dict(state))[0].tobytes() == again.step(x).tobytes()
        assert not np.array_equal(y, again.step(x))


def test_watches_and_tapes_see_a_version_that_resets(
    server: ForkedServer, name: str, paths: dict[str, Path]
) -> None:
    with (
        stepwell.connect(server.address, timeout_s=LOAD_S) as client,
        client.open_session(name, session_id=f"{name}-watched") as session,
        session.watch(states=True) as watch,
        stepwell.connect(server.address, timeout_s=LOAD_S) as other,
        other.open_session(name, session_id=session.id).record("last", source="watch") as watched,
        session.record("last") as own,
    ):
        first = next(watch)  # after the step it would be the only event, at position 5
        session.step(draw(1, 5))
        assert [first.position, next(watch).position] == [0, 5]
        client.load_model(name, paths["second"], sessions="reset")
        event = next(watch)
        assert (event.kind, event.revision, event.position, event.model_version) == ("present", 1, 0, 2)
        state = session.get_state()
        for tensor, values in event.states.items():
            np.testing.assert_array_equal(values, state[tensor])
        session.step(draw(1))
        while len(watched) < 6:
            session.refresh()
    for tape in (own, watched):
        assert tape.positions.tolist() == [1, 2, 3, 4, 5, 1]
        assert [(mark.index, mark.kind) for mark in tape.marks] == [(5, "reset"), (5, "version")]
