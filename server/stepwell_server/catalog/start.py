"""Loads the models of a server at its start, and starts the tasks that keep them up to date."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from stepwell_server.catalog.control import LoadRequest, VersionState
from stepwell_server.catalog.files.sources import Candidates, Source, StoredModel
from stepwell_server.catalog.follower import FolderFollower, FolderOptions
from stepwell_server.catalog.replicas import ReplicaFollower
from stepwell_server.catalog.restore import is_of_folder, restore
from stepwell_server.compile import data_file
from stepwell_server.compile.errors import DataError, ModelError
from stepwell_server.core.model_names import ModelRef
from stepwell_server.engine.api import SessionPolicy
from stepwell_server.engine.versions import document
from stepwell_server.errors import ModelLoading, ModelNotFound, ServerError, StartError

if TYPE_CHECKING:
    from pathlib import Path

    from stepwell_server.catalog.catalog import Catalog
    from stepwell_server.catalog.files.folder import ModelFolder
    from stepwell_server.clock import Clock
    from stepwell_server.engine.engine import Engine
    from stepwell_server.engine.versions.registry import KnownVersion
    from stepwell_server.process.readiness import Readiness
    from stepwell_server.settings import Settings
    from stepwell_server.store.base import Store

_RETRY_S = 1.0


async def stored_models(store: Store, root: Path | None) -> dict[str, StoredModel]:
    """Return the versions that the store lists as loaded, by name.

    Args:
        store: the server's store.
        root: `--models`; the policy selects which of its files are loaded.

    Raises:
        DocumentError: a document cannot be read.
        Unavailable: the store does not answer.
    """
    found = {}
    root = None if root is None else await asyncio.to_thread(root.resolve)
    for name, content in (await store.documents(document.PREFIX)).items():
        model = name.removeprefix(document.PREFIX)
        own = document.decode(model, content)
        wanted = {version: known for version, known in own.known.items() if known.is_wanted}
        elsewhere = [
            version
            for version, each in wanted.items()
            if each.source and not await asyncio.to_thread(is_of_folder, model, each, root)
        ]
        found[model] = StoredModel(list(wanted), own.wanted, elsewhere)
    return found


def absence(readiness: Readiness, *, shows_reason: bool) -> Callable[[ModelRef], ServerError | None]:
    """Return a function that explains why a model is not loaded.

    Args:
        readiness: has the progress of each version.
        shows_reason: include the reason of a failed load, which may contain paths of the server.
    """

    def absent(ref: ModelRef) -> ServerError | None:
        versions = readiness.report.versions.get(ref.name, {})
        hows = list(versions.values()) if ref.version is None else [versions.get(ref.version, "")]
        for how in hows:
            if how.startswith(("waiting", "loading")):
                return ModelLoading(f"model {str(ref)!r} is being loaded ({how})", _RETRY_S, model=ref.name)
        for how in hows:
            if how.startswith("failed"):
                why = how.removeprefix("failed: ") if shows_reason else "the server's log says why"
                return ModelNotFound(
                    f"model {str(ref)!r} is not served: it could not be loaded: {why}", model=ref.name
                )
        return None

    return absent


class ModelLoader:
    """Loads the initial models and watches the folder of models. Used on the event loop.

    Either `load` and `begin` are called before the server accepts calls, or `run` does both while it serves.
    """

    def __init__(
        self,
        settings: Settings,
        wanted: Sequence[Candidates],
        kept: Mapping[str, StoredModel],
        folder: ModelFolder | None,
        engine: Engine,
        catalog: Catalog,
        readiness: Readiness,
        *,
        clock: Clock,
    ) -> None:
        self._settings = settings
        self._wanted = wanted
        self._kept = kept
        self._engine = engine
        self._catalog = catalog
        self._readiness = readiness
        self._follower = FolderFollower(
            folder,
            catalog,
            FolderOptions(
                settings.policy_of,
                SessionPolicy(settings.sessions),
                self._migration_of,
                frozenset(settings.versions),
            ),
            clock=clock,
            warn=lambda problem: readiness.warning("models", problem),
        )
        self._replica_follower = ReplicaFollower(
            engine, catalog, root=settings.models_dir, clock=clock, is_left_out=self._is_followed
        )
        self._loaded: dict[str, set[int]] = {model.name: set() for model in wanted}
        self._failed: dict[str, dict[int, str]] = {model.name: {} for model in wanted}
        """Why versions failed to load."""
        self._refuses = settings.wait_for_models and settings.bad_models == "refuse"

    def _is_followed(self, name: str, known: KnownVersion) -> bool:
        """Whether the file of a version is in the watched folder. Blocking."""
        root = self._settings.models_dir
        return self._settings.watch_models and root is not None and is_of_folder(name, known, root.resolve())

    async def run(self) -> None:
        """Load what is missing, then watch other servers and, depending on the settings, the folder, until cancelled."""
        if not self._settings.wait_for_models:
            await self.load()
            await self.begin()
        async with asyncio.TaskGroup() as group:
            if self._settings.watch_models:
                group.create_task(self._follower.run())
            group.create_task(self._replica_follower.run())

    async def load(self) -> None:
        """Load the models of the command line and the folder, before the engine starts if calls wait for the models.

        Raises:
            StartError: calls wait for the models, and either none can be loaded, or one cannot and the
                settings require all.
        """
        waits = self._settings.wait_for_models
        if waits:  # check all data files before compiling the first model
            self._require_data()
        place, total = 0, 0
        for name, kept in self._kept.items():
            for version in kept.from_elsewhere:  # `begin` loads them
                self._readiness.version(name, version, "waiting")
        for model in self._wanted:
            for version in model.choice(()):
                self._readiness.version(model.name, version, "waiting")
                total += 1
        for model in self._wanted:
            loaded, failed = self._loaded[model.name], self._failed[model.name]
            # The former default comes first: the first version is the default until all are there.
            while todo := [
                v
                for v in sorted(model.choice(failed), key=lambda v: (v != model.default, -v))
                if v not in loaded
            ]:
                place += 1
                source = model.source(todo[0])
                problem = await self._load(source, f"model {place} of {max(place, total)}")
                if problem:
                    failed[source.version] = problem
                else:
                    loaded.add(source.version)
        problems = [why for failed in self._failed.values() for why in failed.values()]
        if waits and problems and not any(self._loaded.values()):
            raise StartError(f"no model can be served; {'; '.join(problems)}")

    def _require_data(self) -> None:
        for name, file in self._settings.check_with.items():
            try:
                data_file.load(file)
            except DataError as error:
                raise StartError(f"model {name}: --check-with: {error}") from error

    async def _load(self, source: Source, place: str) -> str:
        """Load a version; return the problem, empty if there is none."""
        waits, name = self._settings.wait_for_models, source.name

        def report(stage: str) -> None:
            doing = f"{source.display_name}, {stage}" if stage else source.display_name
            self._readiness.problem("models", f"{place} is being loaded ({doing})")

        if waits:
            self._readiness.version(name, source.version, "loading")
            report("")
        request = LoadRequest(
            name=name,
            version=source.version,
            path=str(source.path),
            keep_default=True,
            is_charged=False,
            is_before_start=waits,
            is_fatal=self._refuses,
        )
        try:
            await self._catalog.load(request, report if waits else None)
        except ServerError as error:
            problem = _problem(source, error)
            if self._refuses:
                raise StartError(problem) from error
            return problem
        return ""

    async def begin(self) -> None:
        """Reload what calls had loaded before the restart, and hand the state over to the follower of the folder.

        Raises:
            StartError: calls wait for it, a former default cannot be loaded, and the settings require all
                models.
        """
        problems = await restore(self._engine, self._catalog, self._settings.models_dir)
        if problems and self._refuses:
            raise StartError(f"{'; '.join(problems.values())}; or start with --bad-models skip")
        for name, versions in self._readiness.report.versions.items():
            for version, how in versions.items():
                if how == "waiting":  # a call has unloaded it meanwhile
                    self._readiness.version(name, version, "")
        wanted = {model.name: model for model in self._wanted}
        catalogue = self._engine.catalogue()
        for name in sorted(wanted.keys() | self._kept.keys()):
            model = wanted.get(name)
            loaded, failed = self._loaded.get(name, set()), self._failed.get(name, {})
            served = {
                each.version: each.is_default
                for each in self._catalog.status(name)
                if each.state is not VersionState.FAILED
            }
            default = next((version for version, is_default in served.items() if is_default), 0)
            own = catalogue.get(name)
            # calls beside this start may have chosen another one than the store had
            former = 0 if name not in self._kept else self._kept[name].default if own is None else own.chosen
            if model is None and former in served:
                continue  # a call loaded it: the folder does not change it
            files = {} if model is None else model.files
            # loaded by a call, and made the default
            is_chosen = default == former and default not in loaded
            former_default = 0 if former in served else former
            if own is not None and own.elsewhere:
                # All servers have that default: one that starts with a new version has it too, and moves no session.
                is_chosen |= not self._settings.watch_models
                former_default = 0
            self._follower.begin_with(
                name,
                {version: files[version] for version in loaded},
                {version: files[version] for version in failed},
                default=0 if is_chosen or (model is not None and model.is_default_chosen) else default,
                former_default=former_default,
            )
        await self._follower.settle()

    def _migration_of(self, name: str) -> str:
        """Return the migration function of a name; empty: the only one."""
        return name if name in self._settings.migrations else ""


def _problem(source: Source, error: ServerError) -> str:
    """Describe a failed load for the start, naming the option that is at fault if there is one."""
    cause = error.__cause__
    if isinstance(cause, OSError):
        return f"--cache-dir: {cause}"
    if isinstance(cause, MemoryError):
        return f"--resident-rows: {cause}"
    return f"model {source.display_name}: {cause if isinstance(cause, ModelError) else error.message}"
