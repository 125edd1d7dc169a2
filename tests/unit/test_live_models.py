"""Versions that are loaded while the server serves: in which order, what is refused, and what a failure leaves."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stepwell_server.catalog.control import LoadedVersion, LoadRequest, VersionState
from stepwell_server.compile.errors import ModelError
from stepwell_server.engine.api import DefaultMove, SessionPolicy
from stepwell_server.errors import (
    InvalidInput,
    ModelInUse,
    ModelLoadFailed,
    ModelNotFound,
    QuotaExceeded,
    ServerError,
    SpecsDiffer,
    Unavailable,
    VersionExists,
    VersionNotFound,
)
from support.engine.catalog_on_fakes import CatalogHarness, ModelQuota


@pytest.fixture
def at(tmp_path: Path) -> CatalogHarness:
    return CatalogHarness(tmp_path)


async def test_the_first_version_is_the_default_and_the_next_one_becomes_it(at: CatalogHarness) -> None:
    stages: list[str] = []
    first = await at.live.load(LoadRequest(name="m", path=at.file(), keep_default=True), stages.append)
    assert (first, stages) == (LoadedVersion(1, 0, 0), ["load", "warm up", "switch"])
    second = await at.load(policy=SessionPolicy.CARRY, labels=["new", "newest"])
    assert second == LoadedVersion(2, 1, 3)
    assert at.states() == {1: VersionState.READY, 2: VersionState.READY}
    (_, now) = at.live.status("m")
    assert (now.is_default, now.labels, now.fingerprint) == (True, ("new", "newest"), "of m.keras")
    assert (now.path, now.loaded) == (str(at.folder / "m.keras"), 5.0)
    assert at.watcher.told == [
        ("loaded", "m", "compiled"),
        ("moved", "m", "carry", 3),
        ("loaded", "m", "compiled"),
    ]


async def test_a_version_may_stay_loaded_without_being_the_default(at: CatalogHarness) -> None:
    await at.load()
    assert await at.load(version=7, keep_default=True, labels=["canary"]) == LoadedVersion(7, 0, 0)
    assert [(one.version, one.is_default) for one in at.live.status("m")] == [(1, True), (7, False)]
    assert not [told for told in at.engine.told if told[0] in {"unload", "default"}]
    assert (await at.load()).version == 8


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"name": "a b"}, "name must be a name of 1 to 128"),
        ({"version": 2**63}, f"version must be 0, for the next one, to {2**63 - 1}; got {2**63}"),
        ({"path": ""}, "path or upload must be given; got neither"),
        ({"upload": "u"}, "path or upload must be given; got both"),
        ({"keep_default": True, "unload_previous": True}, "must be left out with keep_default"),
        ({"migration": "f"}, "migration must be left out unless sessions is migrate; got 'f'"),
        ({"labels": ["7"]}, "label must be 1 to 64 letters, digits, _, - or ., not digits alone; got '7'"),
        ({"labels": ["x"] * 17}, "labels must be at most 16; got 17"),
        ({"path": "m.keras"}, "path must be absolute, on the server's disk; got 'm.keras'"),
        ({"path": "/m.h5"}, "path must end in .keras or .onnx or .stepwell; got '/m.h5'"),
        ({"path": "/nowhere/m.keras"}, "path must be that of a file; got '/nowhere/m.keras': No such file"),
    ],
)
async def test_invalid_load_requests_are_refused(
    at: CatalogHarness, values: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidInput) as raised:
        await at.load(**values)
    assert words in raised.value.message
    assert not at.engine.told
    assert not at.compiler.done
    assert at.live.statuses() == {}
    assert not at.watcher.told


async def test_folders_and_special_files_are_refused(at: CatalogHarness) -> None:
    (at.folder / "d.keras").mkdir()
    os.mkfifo(at.folder / "f.keras")
    for name, words in (("d.keras", "is a folder; give the file in it"), ("f.keras", "is no regular file")):
        with pytest.raises(InvalidInput, match=words):
            await at.load(path=str(at.folder / name))


async def test_with_a_folder_of_models_other_paths_are_neither_loaded_nor_revealed(tmp_path: Path) -> None:
    root = tmp_path / "models"
    root.mkdir()
    at = CatalogHarness(tmp_path, root=root)
    outside = at.file("out.keras")
    (root / "link.keras").symlink_to(outside)
    (root / "in.keras").write_bytes(b"a model")
    for path in (outside, str(root / "link.keras"), str(root / ".." / "out.keras"), f"{tmp_path}/none.keras"):
        with pytest.raises(InvalidInput) as raised:
            await at.load(path=path)
        assert raised.value.message == (
            f"path must lead to a file in --models, {root}, after links are followed; got {path!r}"
        )
    assert (await at.load(path=str(root / "in.keras"))).version == 1


async def test_a_numbered_version_that_cannot_be_served_is_remembered_until_it_can(
    at: CatalogHarness,
) -> None:
    await at.load()
    at.compiler.error = ModelError("m.keras: it sees the future")
    with pytest.raises(ModelLoadFailed) as raised:
        await at.load(version=2)
    assert raised.value.message == "version 2 of model 'm' cannot be loaded: m.keras: it sees the future"
    (ready, failed) = at.live.status("m")
    assert (ready.is_default, failed.state, failed.reason) == (
        True,
        VersionState.FAILED,
        raised.value.message,
    )
    assert failed.path == str(at.folder / "m.keras")
    assert at.watcher.told[1:] == [("failed", "m")]
    at.compiler.error = None
    assert at.how[-2:] == [("m", 2, "loading: load"), ("m", 2, f"failed: {raised.value.message}")]
    assert (await at.load(version=2)).version == 2
    assert at.how[-4:] == [
        *(("m", 2, f"loading: {stage}") for stage in ("warm up", "switch")),
        ("m", 2, "loaded"),
        ("m", 1, ""),
    ]
    assert at.states() == {2: VersionState.READY}


async def test_before_the_engine_starts_it_gets_the_version_and_nothing_is_judged(at: CatalogHarness) -> None:
    stages: list[str] = []
    request = LoadRequest(
        name="m", version=3, path="relative.keras", is_charged=False, is_before_start=True, keep_default=True
    )
    at.engine.move_refusal = SpecsDiffer("it is judged")
    for version in (3, 4):
        await at.live.load(dataclasses.replace(request, version=version), stages.append)
    assert at.engine.told == [("begin", "m", 3), ("begin", "m", 4)]
    assert stages == ["load", "load"]
    assert at.how[-1] == ("m", 4, "loaded")
    assert at.watcher.told == [("loaded", "m", "compiled")] * 2


@pytest.mark.parametrize("is_fatal", [True, False])
async def test_a_failure_that_ends_the_start_is_not_logged(
    at: CatalogHarness, is_fatal: bool, caplog: pytest.LogCaptureFixture
) -> None:
    at.compiler.error = ModelError("m.keras: it sees the future")
    with pytest.raises(ModelLoadFailed):
        await at.load(version=1, is_charged=False, is_before_start=True, is_fatal=is_fatal)
    assert ("a model cannot be loaded" in caplog.text) is not is_fatal


async def test_a_version_without_room_for_its_rows_is_refused(at: CatalogHarness) -> None:
    at.engine.refusal = MemoryError("there is no room for 9 rows of model m")
    with pytest.raises(ModelLoadFailed) as raised:
        await at.load(version=1)
    why = "version 1 of model 'm' cannot be loaded: there is no room for 9 rows of model m"
    assert raised.value.message == why
    (failed,) = at.live.status("m")
    assert (failed.state, failed.reason) == (VersionState.FAILED, why)
    at.engine.refusal = None
    assert (await at.load(version=1)).version == 1


async def test_a_refused_load_uses_no_number(at: CatalogHarness) -> None:
    await at.load()
    at.compiler.error = ModelError("m.keras: it sees the future")
    for _ in range(2):
        with pytest.raises(
            ModelLoadFailed, match=r"^a new version of model 'm' cannot be loaded: m.keras: it"
        ):
            await at.load()
    at.compiler.error = None
    at.engine.move_refusal = SpecsDiffer("state 'h' is new")
    with pytest.raises(SpecsDiffer):
        await at.load(policy=SessionPolicy.CARRY)
    assert at.engine.told == [("load", "m", 1, str(at.folder / "m.keras"), "")], "it is judged before"
    assert at.watcher.told[1:] == [("failed", "m")] * 3
    with pytest.raises(SpecsDiffer):  # as a client of several replicas asks, which moves the default later
        await at.load(policy=SessionPolicy.CARRY, keep_default=True)
    at.engine.move_refusal = None
    at.engine.refusal = Unavailable("the disk is full")
    with pytest.raises(Unavailable):
        await at.load(keep_default=True, labels=["a"])
    assert at.states() == {1: VersionState.READY}
    assert at.how[-1] == ("m", 2, "")
    assert (await at.load()).version == 2


async def test_a_limited_number_of_failures_is_remembered(at: CatalogHarness) -> None:
    at.compiler.error = ModelError("no")
    for version in range(1, 70):
        with pytest.raises(ModelLoadFailed):
            await at.load(version=version)
    assert list(at.states()) == list(range(6, 70))
    assert list(at.live.statuses()) == ["m"]
    await at.live.unload("m", 7, force=False)
    assert 7 not in at.states()
    assert set(at.watcher.told) == {("failed", "")}, "no series for what callers send"
    await at.live.unload("m", 0, force=False)
    assert at.live.statuses() == {}


async def test_a_refused_unload_forgets_no_failure(at: CatalogHarness) -> None:
    await at.load()
    at.engine.give("m", 1, sessions=1)
    at.compiler.error = ModelError("no")
    with pytest.raises(ModelLoadFailed):
        await at.load(version=2)
    with pytest.raises(ModelInUse):
        await at.live.unload("m", 0, force=False)
    assert at.states() == {1: VersionState.READY, 2: VersionState.FAILED}


async def test_a_refused_switch_leaves_no_half(at: CatalogHarness) -> None:
    await at.load()
    at.engine.refusal = SpecsDiffer("state 'h' is new")
    with pytest.raises(SpecsDiffer):
        await at.load(version=2, policy=SessionPolicy.CARRY)
    assert [told[:3] for told in at.engine.told] == [("load", "m", 1)]
    assert at.states() == {1: VersionState.READY, 2: VersionState.FAILED}
    assert at.live.status("m")[1].reason == "state 'h' is new"
    at.engine.refusal = Unavailable("the disk is full")
    with pytest.raises(Unavailable):
        await at.load(version=3, keep_default=True, labels=["a"])
    assert at.states() == {1: VersionState.READY, 2: VersionState.FAILED, 3: VersionState.FAILED}


async def test_a_defect_is_reported_only_by_an_id(at: CatalogHarness) -> None:
    at.compiler.error = RuntimeError("secret")
    with pytest.raises(ServerError) as raised:
        await at.load()
    assert "secret" not in raised.value.message
    assert at.states() == {}
    at.compiler.error = None
    assert (await at.load()).version == 1


async def test_loads_run_one_at_a_time_and_never_twice(at: CatalogHarness) -> None:
    at.compiler.free.clear()
    first = asyncio.create_task(at.load(path=at.file("a.keras")))
    await at.until(lambda: at.compiler.running == ["a.keras"])
    other = asyncio.create_task(at.load("n", path=at.file("b.keras")))
    await at.until(lambda: len(at.live.status("n")) == 1)  # its file is read on a thread
    third = asyncio.create_task(at.load(path=at.file("c.keras"), policy=SessionPolicy.CARRY))
    await at.until(lambda: len(at.live.status("m")) == 2)
    assert at.compiler.running == ["a.keras"]
    assert [(one.version, one.state, one.reason) for one in at.live.status("m")] == [
        (1, VersionState.LOADING, "load"),
        (2, VersionState.LOADING, "waiting"),
    ]
    with pytest.raises(VersionExists) as raised:
        await at.load(version=1)
    assert (
        raised.value.message == "version 1 of model 'm' must not be loaded twice: it is being loaded (load)"
    )
    at.compiler.free.set()
    assert [(await each).version for each in (first, other, third)] == [1, 1, 2]
    assert at.compiler.done == ["a.keras", "b.keras", "c.keras"]
    with pytest.raises(VersionExists, match="version must be one that model 'm' does not have; it has 1:"):
        await at.load(version=1)


@pytest.mark.parametrize("is_running", [True, False])
async def test_a_cancelled_load_stops_and_leaves_nothing(at: CatalogHarness, is_running: bool) -> None:
    at.compiler.free.clear()
    held = None if is_running else asyncio.create_task(at.load("n", path=at.file("n.keras")))
    if held is not None:
        await at.until(lambda: bool(at.compiler.running))
    load = asyncio.create_task(at.load(path=at.file("a.keras")))
    await at.until(lambda: bool(at.live.status("m")) and bool(at.compiler.running))
    load.cancel()
    with pytest.raises(asyncio.CancelledError):
        await load
    await at.until(lambda: not at.live.status("m"))
    at.compiler.free.set()
    if held is not None:
        assert (await held).version == 1
    assert "a.keras" not in at.compiler.done
    assert (await at.load()).version == 1, "the lock is free"


async def test_a_switch_that_has_begun_is_finished_although_its_caller_goes(at: CatalogHarness) -> None:
    await at.load()
    begun, go_on = asyncio.Event(), asyncio.Event()
    switch = at.engine.load_version

    async def slow(*arguments: Any, begin: Callable[[], None], **options: Any) -> DefaultMove:
        begin()
        begun.set()
        await go_on.wait()
        return await switch(*arguments, **options)

    at.engine.load_version = slow  # type: ignore[method-assign,assignment]
    load = asyncio.create_task(at.load(policy=SessionPolicy.RESET))
    await asyncio.wait_for(begun.wait(), 100)
    load.cancel()
    with pytest.raises(asyncio.CancelledError):
        await load
    go_on.set()
    await at.until(lambda: at.states().get(2) is VersionState.READY)
    assert [one.is_default for one in at.live.status("m")] == [False, True]


async def test_unloading_stops_a_load(at: CatalogHarness) -> None:
    at.compiler.free.clear()
    load = asyncio.create_task(at.load())
    await at.until(lambda: bool(at.compiler.running))
    await at.live.unload("m", 1, force=False)
    with pytest.raises(ModelLoadFailed, match="was not loaded: it was unloaded meanwhile"):
        await load
    assert at.live.statuses() == {}


async def test_a_kept_version_drains(at: CatalogHarness) -> None:
    await at.load()
    at.engine.give("m", 1, sessions=2)
    await at.load(policy=SessionPolicy.KEEP)
    assert at.states() == {1: VersionState.DRAINING, 2: VersionState.READY}
    assert await at.live.look() == 0
    at.engine.give("m", 1, sessions=0, labels=("old",))
    assert await at.live.look() == 0, "somebody may open sessions by the label"
    at.engine.give("m", 1, labels=())
    assert await at.live.look() == 1
    assert at.states() == {2: VersionState.READY}


async def test_a_version_stays_for_sessions_that_only_the_store_has(at: CatalogHarness) -> None:
    await at.load()
    at.engine.give("m", 1, sessions=1)
    await at.load()

    tries: list[int] = []
    unload = at.engine.unload_version

    async def in_store(name: str, version: int, **_others: object) -> None:
        tries.append(version)
        raise ModelInUse("the store has sessions of it")

    at.engine.give("m", 1, sessions=0)
    at.engine.unload_version = in_store  # type: ignore[method-assign]
    assert [await at.live.look(), await at.live.look()] == [0, 0]
    assert tries == [1], "it is not tried all the time"
    at.clock.advance(61)
    at.engine.unload_version = unload  # type: ignore[method-assign]
    assert await at.live.look() == 1


async def test_the_previous_version_goes_when_it_has_no_sessions(at: CatalogHarness) -> None:
    await at.load()
    at.engine.give("m", 1, sessions=1)  # pinned to it
    await at.load(policy=SessionPolicy.CARRY, unload_previous=True)
    assert at.states() == {1: VersionState.DRAINING, 2: VersionState.READY}
    at.engine.give("m", 1, sessions=0)
    assert await at.live.look() == 1
    await at.load(policy=SessionPolicy.CARRY, unload_previous=True)
    assert at.states() == {3: VersionState.READY}, "at once"


async def test_one_that_becomes_the_default_again_stays(at: CatalogHarness) -> None:
    await at.load()
    at.engine.give("m", 1, sessions=1)
    await at.load(policy=SessionPolicy.CARRY, unload_previous=True)
    back = await at.live.set_default("m", 1, SessionPolicy.CARRY)
    assert back == LoadedVersion(1, 2, 3)
    at.engine.give("m", 1, sessions=0)
    assert await at.live.look() == 0
    assert at.states() == {1: VersionState.READY, 2: VersionState.READY}


async def test_a_name_whose_sessions_are_in_the_store_alone_is_not_unloaded(at: CatalogHarness) -> None:
    await at.load()
    at.engine.in_store = {1: 3, 7: 2}  # 7 is not loaded
    with pytest.raises(ModelInUse, match=r"it has 3 on versions \[1\]"):
        await at.live.unload("m", 0, force=False)
    assert at.states() == {1: VersionState.READY}
    at.engine.in_store = {7: 2}
    await at.live.unload("m", 0, force=False)
    assert at.states() == {}


async def test_unloading(at: CatalogHarness) -> None:
    await at.load()
    await at.load(keep_default=True)
    with pytest.raises(ModelInUse):
        await at.live.unload("m", 1, force=False)
    at.engine.give("m", 2, sessions=2)
    with pytest.raises(ModelInUse) as raised:
        await at.live.unload("m", 0, force=False)
    assert raised.value.message == (
        "model 'm' must have no sessions to be unloaded, unless force is given; it has 2 on versions [2]"
    )
    await at.live.unload("m", 0, force=True)
    assert at.engine.told[-2:] == [("unload", "m", 2, True), ("unload", "m", 1, True)]
    await at.load()
    await at.live.unload("m", 0, force=False)
    assert at.live.statuses() == {}
    with pytest.raises(ModelNotFound, match=r"name must be one of \[\]; got 'm'"):
        await at.live.unload("m", 0, force=True)


async def test_defaults_and_labels_of_missing_versions(at: CatalogHarness) -> None:
    await at.load()
    for wrong in (
        at.live.unload("m", 9, force=True),
        at.live.set_default("m", 9, SessionPolicy.KEEP),
        at.live.set_label("m", "a", 9),
    ):
        with pytest.raises(VersionNotFound) as raised:
            await wrong
        assert raised.value.message == "version of model 'm' must be one that is loaded, [1]; got 9"
    with pytest.raises(VersionNotFound, match="label to remove must be one that model 'm' has; got 'a'"):
        await at.live.set_label("m", "a", 0)
    with pytest.raises(InvalidInput, match="label must be"):
        await at.live.set_label("m", "1", 1)
    with pytest.raises(ModelNotFound):
        await at.live.set_default("other", 1, SessionPolicy.KEEP)
    with pytest.raises(InvalidInput, match="migration must be left out"):
        await at.live.set_default("m", 1, SessionPolicy.KEEP, "f")
    await at.live.set_label("m", "a", 1)
    assert at.live.status("m")[0].labels == ("a",)
    await at.live.set_label("m", "a", 0)
    assert at.live.status("m")[0].labels == ()


async def test_a_tenant_may_load_a_limited_number_of_versions(tmp_path: Path) -> None:
    at = CatalogHarness(tmp_path, quotas=ModelQuota(2))
    await at.load("own", is_charged=False)
    await at.load(tenant="acme")
    await at.load(tenant="acme", policy=SessionPolicy.CARRY)
    with pytest.raises(QuotaExceeded):
        await at.load(tenant="acme")
    await at.load("other", tenant="zeta")
    # the one that goes makes room for the one that comes, as of a trainer that sends weights all the time
    for _ in range(3):
        await at.load(tenant="acme", policy=SessionPolicy.CARRY, unload_previous=True)
    await at.live.unload("m", 1, force=True)
    await at.load(tenant="acme")
    assert [told[4] for told in at.engine.told if told[0] == "load"][:3] == ["", "acme", "acme"]
    at.live.owned_before("m", 99, "zeta")
    with pytest.raises(QuotaExceeded):
        await at.load("more", tenant="zeta")
