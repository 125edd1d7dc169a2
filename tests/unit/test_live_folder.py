"""A folder of models under a server that runs: what is loaded, what becomes the default, and what ends."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from stepwell_server.catalog.catalog import Catalog
from stepwell_server.catalog.control import LoadedVersion, LoadRequest
from stepwell_server.catalog.files.folder import ModelFolder
from stepwell_server.catalog.follower import FolderFollower, FolderOptions
from stepwell_server.core.version_policy import VersionPolicy
from stepwell_server.engine.api import SessionPolicy
from stepwell_server.errors import Overloaded
from support.engine.catalog_on_engine import FakeLoads, live_models
from support.engine.fake_executor import PLAIN, RICH
from support.engine.harness import Harness, running


@dataclasses.dataclass
class Served:
    """A server whose folder is followed."""

    at: Harness
    root: Path
    loads: FakeLoads
    live: Catalog
    follower: FolderFollower
    warnings: list[str]

    def put(self, *files: str, program: Any = PLAIN) -> None:
        """Files of models, each of its own weights."""
        for file in files:
            path = self.root / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.encode())
            self.loads.programs[path.name] = dataclasses.replace(program, fingerprint=f"of {file}")

    def spoil(self, file: str) -> None:
        """A file that is no model."""
        self.put(file)
        del self.loads.programs[Path(file).name]

    def remove(self, file: str) -> None:
        (self.root / file).unlink()

    async def look(self, times: int = 2) -> dict[int, str]:
        """Look as often as the timer would: two looks must see a change. Returns the versions."""
        for _ in range(times):
            await self.follower.look()
        return self.versions()

    async def look_and_unload(self) -> dict[int, str]:
        """Look, and unload versions that have drained. Returns the versions."""
        await self.look()
        await self.live.look()
        return self.versions()

    async def add(self, *files: str) -> dict[int, str]:
        """Put files of models, and look. Returns the versions."""
        self.put(*files)
        return await self.look()

    async def version_of(self, session_id: str) -> int:
        return (await self.at.engine.session_info(session_id)).version

    def versions(self, name: str = "forecast") -> dict[int, str]:
        """How each is; the default in capitals."""
        return {
            each.version: each.state.value.upper() if each.is_default else each.state.value
            for each in self.live.status(name)
        }


@asynccontextmanager
async def serving(
    tmp_path: Path,
    policy: str = "latest",
    sessions: SessionPolicy = SessionPolicy.KEEP,
    **options: Any,
) -> AsyncIterator[Served]:
    root = tmp_path / "models"
    root.mkdir()
    async with running(**options) as at:
        loads, warnings = FakeLoads(), list[str]()
        live = live_models(at.engine, at.clock, loads)
        follower = FolderFollower(
            ModelFolder(root),
            live,
            FolderOptions(lambda _name: VersionPolicy.parse(policy), sessions, excluded={"plain"}),
            clock=at.clock,
            warn=warnings.append,
        )
        yield Served(at, root, loads, live, follower, warnings)
        await live.close()


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path) as found:
        yield found


async def test_a_new_version_becomes_the_default_and_the_old_one_ends_with_its_sessions(
    served: Served,
) -> None:
    served.put("forecast/1.keras")
    assert await served.look(1) == {}
    assert await served.look(1) == {1: "READY"}
    await served.at.open("old", model="forecast")
    assert await served.add("forecast/2.keras") == {1: "draining", 2: "READY"}
    await served.at.open("new", model="forecast")
    assert (await served.version_of("old"), await served.version_of("new")) == (1, 2)
    await served.at.engine.close_session("old")
    assert await served.live.look() == 1
    assert served.versions() == {2: "READY"}
    # it is not loaded again though its file is there
    assert await served.look() == {2: "READY"}


async def test_sessions_do_what_the_operator_says(tmp_path: Path) -> None:
    async with serving(tmp_path, sessions=SessionPolicy.CARRY) as served:
        await served.add("forecast/1.keras")
        await served.at.open("a", model="forecast")
        await served.add("forecast/2.keras")
        assert await served.version_of("a") == 2
        await served.live.look()
        assert served.versions() == {2: "READY"}
        assert ("moved", "forecast", "carry", 1) in served.loads.told


async def test_a_version_that_cannot_be_loaded_changes_nothing_until_its_file_does(tmp_path: Path) -> None:
    async with serving(tmp_path, sessions=SessionPolicy.CARRY) as served:
        assert await served.add("forecast/1.keras", "forecast/2.keras") == {2: "READY"}
        served.spoil("forecast/3.keras")
        served.put("forecast/4.keras", program=RICH)  # no session can be carried to it
        await served.at.open("a", model="forecast")
        assert await served.look(4) == {2: "READY", 3: "failed", 4: "failed"}
        assert [told for told in served.loads.told if told[0] == "failed"] == 2 * [("failed", "forecast")]
        (failed,) = [each for each in served.live.status("forecast") if each.version == 3]
        assert "not a .keras file" in failed.reason
        served.put("forecast/3.keras")
        (served.root / "forecast/3.keras").write_bytes(b"mended")
        assert await served.look() == {2: "draining", 3: "READY", 4: "failed"}
        await served.live.look()
        assert served.versions() == {3: "READY", 4: "failed"}


async def test_the_previous_version_returns_when_the_new_one_is_removed(tmp_path: Path) -> None:
    async with serving(tmp_path, sessions=SessionPolicy.CARRY) as served:
        await served.add("forecast/1.keras", "forecast/2.keras")
        await served.at.open("a", model="forecast")
        served.remove("forecast/2.keras")
        assert await served.look(1) == {2: "READY"}
        await served.look(1)
        assert await served.version_of("a") == 1
        await served.live.look()
        assert served.versions() == {1: "READY"}
        # and is what it was before if that was loaded all the time
        await served.add("forecast/2.keras")
        assert await served.version_of("a") == 2


async def test_the_policy_says_how_many_are_served(tmp_path: Path) -> None:
    async with serving(tmp_path, "latest 2") as served:
        assert await served.add("forecast/1.keras", "forecast/2.keras", "forecast/3.keras") == {
            2: "ready",
            3: "READY",
        }
        served.put("forecast/10.keras")
        assert await served.look_and_unload() == {3: "ready", 10: "READY"}
        served.remove("forecast/10.keras")
        assert await served.look_and_unload() == {2: "ready", 3: "READY"}


async def test_named_versions(tmp_path: Path) -> None:
    async with serving(tmp_path, "1,3") as served:
        assert await served.add("forecast/1.keras", "forecast/2.keras") == {1: "READY"}
        assert await served.add("forecast/3.keras") == {1: "ready", 3: "READY"}


async def test_a_default_that_somebody_chose_stays_until_somebody_chooses_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(tmp_path, "latest 2") as served:
        await served.add("forecast/1.keras", "forecast/2.keras")
        await served.live.set_default("forecast", 1, SessionPolicy.CARRY)
        served.put("forecast/3.keras")
        assert await served.look(4) == {1: "READY", 2: "ready", 3: "ready"}
        told = (
            "a model keeps the default version that was chosen for it; stepwell models default changes that"
        )
        assert caplog.messages.count(told) == 1
        await served.live.set_default("forecast", 3, SessionPolicy.CARRY)
        assert await served.look_and_unload() == {2: "ready", 3: "READY"}
        await served.add("forecast/4.keras")
        assert served.versions()[4] == "READY"


async def test_what_somebody_unloaded_or_loaded_stays_as_they_left_it(tmp_path: Path) -> None:
    async with serving(tmp_path, "all") as served:
        await served.add("forecast/1.keras", "forecast/2.keras")
        await served.live.unload("forecast", 1, force=False)
        assert await served.look() == {2: "READY"}
        elsewhere = served.loads.file(tmp_path, "x.keras", PLAIN)
        await served.live.load(LoadRequest(name="forecast", version=7, path=elsewhere, keep_default=True))
        assert await served.add("forecast/7.keras", "forecast/3.keras") == {
            2: "ready",
            3: "READY",
            7: "ready",
        }
        served.remove("forecast/7.keras")
        served.remove("forecast/3.keras")
        assert await served.look_and_unload() == {2: "READY", 7: "ready"}


async def test_a_version_that_is_written_over_is_served_as_it_was(
    caplog: pytest.LogCaptureFixture, served: Served
) -> None:
    await served.add("forecast/1.keras")
    (served.root / "forecast/1.keras").write_bytes(b"others")
    await served.look(4)
    assert [told for told in served.loads.told if told[0] == "loaded"] == [("loaded", "forecast", "compiled")]
    assert (
        len(
            [
                each
                for each in caplog.messages
                if "the file of a version, or the declaration beside it, has changed" in each
            ]
        )
        == 1
    )


async def test_the_last_version_stays_when_the_folder_is_emptied(
    caplog: pytest.LogCaptureFixture, served: Served
) -> None:
    await served.add("forecast/1.keras", "words/1.keras")
    served.remove("forecast/1.keras")
    served.remove("words/1.keras")
    await served.look(4)
    await served.live.look()
    assert (served.versions(), served.versions("words")) == ({1: "READY"}, {1: "READY"})
    assert len([each for each in caplog.messages if "a model is gone from --models" in each]) == 2
    away = served.root.with_name("away")
    os.rename(served.root, away)
    assert await served.look() == {1: "READY"}
    assert (
        served.warnings[-1]
        == f"not served of --models: {served.root} cannot be read: No such file or directory"
    )
    os.rename(away, served.root)
    await served.look()
    assert served.warnings[-1] == ""


async def test_names_of_the_command_line_are_let_alone(served: Served) -> None:
    await served.add("plain/2.keras")
    assert served.versions("plain") == {1: "READY"}


async def test_a_version_that_drains_is_kept_if_the_policy_wants_it_again(served: Served) -> None:
    await served.add("forecast/1.keras")
    await served.at.open("old", model="forecast")
    await served.add("forecast/2.keras")
    served.remove("forecast/2.keras")
    assert await served.look() == {1: "READY", 2: "draining"}
    await served.at.engine.close_session("old")
    await served.live.look()
    assert served.versions() == {1: "READY"}


async def test_what_was_loaded_at_the_start_is_known(served: Served) -> None:
    served.put("forecast/1.keras", "forecast/2.keras")
    folder = ModelFolder(served.root)
    folder.look()
    files = folder.look().versions["forecast"]
    for version in (1, 2):
        path = str(served.root / f"forecast/{version}.keras")
        await served.live.load(LoadRequest(name="forecast", version=version, path=path, keep_default=True))
    served.follower.begin_with("forecast", files, {}, default=1)
    await served.follower.look()
    await served.follower.settle()
    await served.live.look()
    assert served.versions() == {2: "READY"}
    assert [told for told in served.loads.told if told[0] == "loaded"] == 2 * [
        ("loaded", "forecast", "compiled")
    ]


class Busy:
    """Who loads models has no room for the next one."""

    def __init__(self, live: Catalog) -> None:
        self.live = live
        self.refusals = 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self.live, name)

    async def load(self, request: LoadRequest, progress: Any = None) -> LoadedVersion:
        if self.refusals:
            self.refusals -= 1
            raise Overloaded("there must be room", 1.0)
        return await self.live.load(request, progress)


async def test_a_load_that_fails_for_want_of_room_is_tried_again_later(served: Served) -> None:
    options = FolderOptions(lambda _name: VersionPolicy.parse("latest"), excluded={"plain"})
    control: Any = Busy(served.live)
    served.follower = FolderFollower(ModelFolder(served.root), control, options, clock=served.at.clock)
    served.put("forecast/1.keras", "forecast/2.keras")
    assert await served.look(4) == {}  # nor is the lower one, which the policy does not choose
    served.at.clock.advance(29)
    assert await served.look() == {}
    served.at.clock.advance(1)
    assert await served.look() == {2: "READY"}
