"""Loads by calls and from folders on servers that share a store: one default for all, which nobody takes from another."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from stepwell_server.catalog.catalog import Catalog
from stepwell_server.catalog.control import LoadRequest, Progress, VersionState
from stepwell_server.catalog.files.folder import ModelFolder
from stepwell_server.catalog.files.model_files import ModelFiles
from stepwell_server.catalog.follower import FolderFollower, FolderOptions
from stepwell_server.catalog.interfaces import CompileResult
from stepwell_server.catalog.replicas import ReplicaFollower
from stepwell_server.compile.errors import ModelError
from stepwell_server.core.version_policy import VersionPolicy
from stepwell_server.engine.api import SessionPolicy
from stepwell_server.errors import MigrationFailed, Unavailable, VersionElsewhere
from support.engine.catalog_on_fakes import Watcher
from support.engine.fake_executor import PLAIN
from support.engine.harness import Harness, fails, x
from support.engine.two_engines import held, make_resident_on_both, serving_two
from support.engine.version_changes import stored_versions
from support.engine.versions import weights
from support.stores.durable import start_task
from support.stores.kinds import SHARED

pytestmark = SHARED


async def compiled(
    _request: LoadRequest, path: Path, progress: Progress, _abandoned: threading.Event
) -> CompileResult:
    """A file's name is its weights."""
    progress("load")
    return CompileResult(weights(int(path.stem)), "file")


class Replica:
    """A server of a folder of its own view."""

    def __init__(self, at: Harness, folder: Path) -> None:
        self.at = at
        self.readiness = at.readiness
        self.folder = folder
        (folder / "plain").mkdir(parents=True)
        self.live = Catalog(
            at.engine,
            compiled,
            ModelFiles(),
            clock=at.clock,
            observer=Watcher(),
            readiness=self.readiness,
        )
        self.follower = FolderFollower(
            ModelFolder(folder),
            self.live,
            FolderOptions(lambda _name: VersionPolicy.parse("latest 1"), SessionPolicy.CARRY),
            clock=at.clock,
        )
        self.replica_follower = ReplicaFollower(at.engine, self.live, root=None, clock=at.clock)
        self.readiness.version("plain", 1, "loaded")

    @property
    def default(self) -> int:
        own = self.at.engine.catalogue()["plain"]
        return own.wanted or own.default

    def put(self, *versions: int) -> None:
        """These are in its folder now."""
        for file in (self.folder / "plain").iterdir():
            if int(file.stem) not in versions:
                file.unlink()
        for version in versions:
            (self.folder / "plain" / f"{version}.keras").write_text(str(version))

    async def look(self) -> None:
        """Hear of the others, look at the folder (twice, as a file must be the same), and after what drains."""
        await self.at.internals.look()
        await self.follower.look()
        await self.follower.look()
        await self.live.look()


@pytest.fixture
async def servers(tmp_path: Path) -> AsyncIterator[tuple[Replica, Replica]]:
    """Both serve version 1 from their folders."""
    async with serving_two({"plain": PLAIN}) as both:
        replicas = tuple(Replica(at, tmp_path / str(place)) for place, at in enumerate(both))
        for each in replicas:
            each.put(1)
            look = ModelFolder(each.folder).settled()
            each.follower.begin_with("plain", look.versions["plain"], {}, default=1)
            await each.look()
        yield replicas[0], replicas[1]
        for each in replicas:
            await each.live.close()


async def test_folders_that_are_seen_at_different_times_lead_to_one_default(
    first: Replica, second: Replica
) -> None:
    await second.at.open("a")
    first.put(1, 2)
    await first.look()
    assert first.default == 2
    for _ in range(3):  # it does not see the file yet, and takes nothing back
        await second.look()
        assert second.default == 2
    await fails(second.at.step("a", x(1)), VersionElsewhere)
    second.put(1, 2)
    for each in (second, first, second):
        await each.look()
    assert (first.default, second.default) == (2, 2)
    assert (await second.at.step("a", x(1))).version == 2
    # and the next one, which the other sees first
    second.put(2, 3)
    await second.look()
    await first.look()
    assert (first.default, second.default) == (3, 3)
    first.put(2, 3)
    for each in (first, second, first):
        await each.look()
    assert (first.default, second.default) == (3, 3)
    assert (await first.at.step("a", x(1))).version == 3


async def test_a_close_behind_a_step_that_must_go_elsewhere_ends_what_the_store_has(
    first: Replica, second: Replica
) -> None:
    """The session leaves the table while the close waits: what this server knew of it is not what is closed."""
    await make_resident_on_both(first.at, second.at, "a")
    step = await held(second.at, lambda: second.at.submit("a", x(1)))
    first.put(1, 2)
    await first.look()
    moved = await first.at.step("a", x(1))
    assert moved.version == 2
    closing = await start_task(second.at.engine.close_session("a"))
    for _ in range(20):  # it waits for the step
        await asyncio.sleep(0)
    second.at.store.release()
    await fails(step.only(), VersionElsewhere)
    await asyncio.wait_for(closing, 60)
    opened = await first.at.engine.open_session("plain", session_id="a", batch_size=1)
    assert opened.session.revision == moved.revision + 1


async def test_a_version_that_is_taken_away_is_left_once(first: Replica, second: Replica) -> None:
    for each in (first, second):
        each.put(1, 2)
        await each.look()
    first.put(1)
    await first.look()
    assert first.default == 1
    for _ in range(3):  # it sees the file still
        await second.look()
        await first.look()
        assert (first.default, second.default) == (1, 1)
    second.put(1)
    await second.look()
    assert (first.default, second.default) == (1, 1)
    for each in (first, second):  # both take the next one from there
        each.put(1, 3)
        await each.look()
    assert (first.default, second.default) == (3, 3)


async def test_a_server_that_sees_a_version_late_undoes_no_later_one(first: Replica, second: Replica) -> None:
    first.put(1, 3)
    await first.look()
    second.put(1, 2)
    for each in (second, first, second):
        await each.look()
        assert each.default == 3
    second.put(1, 2, 3)
    await second.look()
    assert (await second.at.engine.open_session("plain")).session.version == 3


async def test_a_version_without_new_sessions_drains_on_each_server(
    tmp_path: Path, first: Replica, second: Replica
) -> None:
    await first.at.open("old")
    for each in (first, second):
        await each.live.load(
            LoadRequest(name="plain", version=2, path=str(_file(tmp_path)), keep_default=True)
        )
    await first.live.set_default("plain", 2, SessionPolicy.KEEP)
    await second.at.internals.look()
    await second.live.look()
    assert second.live.status("plain")[0].state is VersionState.DRAINING
    await first.at.engine.close_session("old")
    for each in (first, second):
        each.at.clock.advance(100.0)
        await each.live.look()
        assert [status.version for status in each.live.status("plain")] == [2]


async def test_health_says_that_the_default_is_not_here(
    tmp_path: Path, first: Replica, second: Replica
) -> None:
    await first.live.load(
        LoadRequest(name="plain", version=2, path=str(_file(tmp_path)), policy=SessionPolicy.CARRY)
    )
    await second.at.internals.look()
    await second.live.look()
    report = second.readiness.report
    assert not report.is_loaded("plain")
    assert report.is_loaded("plain", 1)
    assert report.warnings == {
        "default versions": "version 2 of plain is the default of the servers that share the store, but is not loaded here"
    }
    assert not any(status.is_default for status in second.live.status("plain"))
    await second.live.load(LoadRequest(name="plain", version=2, path=str(_file(tmp_path)), keep_default=True))
    await second.live.look()
    assert second.readiness.report.is_loaded("plain")
    assert not second.readiness.report.warnings


def _file(folder: Path) -> Path:
    file = folder / "2.keras"
    file.write_text("2")
    return file


async def test_two_that_load_the_same_at_once(tmp_path: Path, first: Replica, second: Replica) -> None:
    request = LoadRequest(name="plain", version=2, path=str(_file(tmp_path)), policy=SessionPolicy.CARRY)
    loaded = await asyncio.gather(first.live.load(request), second.live.load(request))
    assert [each.version for each in loaded] == [2, 2]
    await first.at.internals.look()
    await second.at.internals.look()
    assert (first.default, second.default) == (2, 2)


async def is_wanted(replica: Replica, version: int) -> bool:
    """Whether the store says that a version is to be loaded again after a restart."""
    (found,) = [
        each for each in (await stored_versions(replica.at))["versions"] if each["version"] == version
    ]
    return bool(found["wanted"])


async def test_a_load_whose_switch_fails_leaves_what_other_servers_want(
    tmp_path: Path, first: Replica, second: Replica
) -> None:
    """Else no server would load it again when it is started anew."""
    path = str(_file(tmp_path))

    async def possible(*_arguments: object) -> None:
        """Let the switch itself find that it is not."""

    second.at.engine.require_possible = possible  # type: ignore[assignment]
    await first.live.load(LoadRequest(name="plain", version=2, path=path, keep_default=True))
    request = LoadRequest(name="plain", version=2, path=path, policy=SessionPolicy.MIGRATE, migration="none")
    await fails(second.live.load(request), MigrationFailed)
    assert await is_wanted(first, 2)
    # of what only this server wanted nothing is left
    third = tmp_path / "3.keras"
    third.write_text("3")
    request = LoadRequest(
        name="plain", version=3, path=str(third), policy=SessionPolicy.MIGRATE, migration="no"
    )
    await fails(second.live.load(request), MigrationFailed)
    assert [each["version"] for each in (await stored_versions(first.at))["versions"]] == [1, 2]
    # it can be loaded there still, and is the default on both then
    await second.live.load(LoadRequest(name="plain", version=2, path=path, policy=SessionPolicy.CARRY))
    await first.at.internals.look()
    assert (first.default, second.default) == (2, 2)


async def test_a_default_that_others_have_is_loaded_where_its_file_is(
    tmp_path: Path, first: Replica, second: Replica
) -> None:
    await second.at.open("a")
    file = _file(tmp_path)
    await first.live.load(LoadRequest(name="plain", version=2, path=str(file), policy=SessionPolicy.CARRY))
    file.unlink()  # on the other machine it is not there yet
    await second.at.internals.look()
    for _ in range(2):
        assert await second.replica_follower.look() == 0
        await fails(
            second.at.step("a", x(1)), VersionElsewhere, r"stepwell models load plain@2 PATH --no-default"
        )
    file.write_text("2")
    assert await second.replica_follower.look() == 1
    assert (await second.at.step("a", x(1))).version == 2
    assert second.readiness.report.is_loaded("plain", 2)
    assert not second.at.engine.defaults_elsewhere()
    assert await second.replica_follower.look() == 0
    # so is what has a label, and nothing else
    for version, labels in ((3, ["canary"]), (4, [])):
        other = tmp_path / f"{version}.keras"
        other.write_text(str(version))
        request = LoadRequest(
            name="plain", version=version, path=str(other), keep_default=True, labels=labels
        )
        await first.live.load(request)
    await second.at.internals.look()
    assert await second.replica_follower.look() == 1
    assert sorted(second.at.engine.catalogue()["plain"].loaded) == [1, 2, 3]


async def test_a_file_that_is_another_one_here_is_refused_once_and_others_are_asked(
    tmp_path: Path, first: Replica, second: Replica
) -> None:
    file = _file(tmp_path)
    await first.live.load(LoadRequest(name="plain", version=2, path=str(file), policy=SessionPolicy.CARRY))
    second.live.compile = _broken
    await second.at.internals.look()
    assert await second.replica_follower.look() == 0
    (status,) = [each for each in second.live.status("plain") if each.version == 2]
    assert status.state is VersionState.FAILED
    assert "it is damaged" in status.reason
    # it is not MODEL_NOT_FOUND: the other server has it
    await fails(second.at.open("b"), VersionElsewhere)
    second.live.compile = compiled
    assert await second.replica_follower.look() == 0, "the file has not changed"
    file.write_text("2 ")
    assert await second.replica_follower.look() == 1


async def test_what_others_have_is_loaded_only_from_where_files_may_be(
    tmp_path: Path, first: Replica, second: Replica
) -> None:
    await first.live.load(
        LoadRequest(name="plain", version=2, path=str(_file(tmp_path)), policy=SessionPolicy.CARRY)
    )
    await second.at.internals.look()
    engine, live, clock = second.at.engine, second.live, second.at.clock
    inside = ReplicaFollower(engine, live, root=second.folder, clock=clock)
    assert await inside.look() == 0
    left_out = ReplicaFollower(engine, live, root=None, clock=clock, is_left_out=lambda *_: True)
    assert await left_out.look() == 0
    assert not [each for each in live.status("plain") if each.version == 2]
    # a store that does not answer is asked again later
    second.at.store.documents_error = Unavailable("away")
    assert await second.replica_follower.look() == 0
    second.at.store.documents_error = None
    assert await second.replica_follower.look() == 0
    clock.advance(31.0)
    assert await second.replica_follower.look() == 1


async def _broken(
    _request: LoadRequest, _path: Path, progress: Progress, _abandoned: threading.Event
) -> CompileResult:
    progress("load")
    raise ModelError("it is damaged")
