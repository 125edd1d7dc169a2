"""The methods of `AsyncClient` that change which models a server has."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TypeVar

from stepwell._admin import model_files
from stepwell._admin.model_files import ModelSource
from stepwell._admin.models import LoadProgress, ModelAdmin, SessionPolicy
from stepwell._base.tracebacks import end_here
from stepwell._core.aio_driver import AsyncDriver
from stepwell._state.infos import LoadedModel
from stepwell.config import DEFAULT_LOAD_TIMEOUT_S

T = TypeVar("T")


@end_here
class AsyncModelCalls:
    """Loads and unloads versions of models while the server runs. Only admins may, if the server authenticates callers."""

    _driver: AsyncDriver

    @property
    def _model_admin(self) -> ModelAdmin:
        return ModelAdmin(self._driver.core)

    async def load_model(
        self,
        name: str,
        model: ModelSource,
        *,
        version: int | None = None,
        sessions: SessionPolicy = "keep",
        default: bool = True,
        migration: str | None = None,
        labels: Sequence[str] = (),
        unload_previous: bool = False,
        progress: LoadProgress | None = None,
        upload: bool | None = None,
        timeout_s: float = DEFAULT_LOAD_TIMEOUT_S,
    ) -> LoadedModel:
        """Loads a version of a model while the server runs, and makes it the default. Returns when it is live.

        Arguments, result and errors are those of `Client.load_model`.

        Example:
            >>> loaded = await client.load_model("forecast", model_path, default=False, labels=["canary"])
            >>> (await client.open_session("forecast:canary")).model_version == loaded.version
            True
            >>> await client.unload_model("forecast", loaded.version, force=True)
        """
        admin = self._model_admin
        request = admin.load_request(
            name,
            version,
            sessions,
            default=default,
            migration=migration,
            labels=labels,
            unload_previous=unload_previous,
        )
        deadline = self._driver.core.deadline(timeout_s)
        is_on_this_machine = self._driver.core.is_on_this_machine
        placing = model_files.placed(name, model, upload=upload, is_on_this_machine=is_on_this_machine)
        # Saving a Keras model takes time.
        file = await asyncio.to_thread(placing.__enter__)
        try:
            return await self._driver.run(admin.load(request, file, deadline, progress))
        finally:
            placing.__exit__(None, None, None)

    async def update_model(
        self,
        name: str,
        model: ModelSource,
        *,
        sessions: SessionPolicy = "carry",
        migration: str | None = None,
        labels: Sequence[str] = (),
        unload_previous: bool = True,
        progress: LoadProgress | None = None,
        upload: bool | None = None,
        timeout_s: float = DEFAULT_LOAD_TIMEOUT_S,
    ) -> LoadedModel:
        """Gives a model new weights: loads the next version, makes it the default and unloads the previous one.

        Arguments, result and errors are those of `Client.update_model`.

        Example:
            >>> updated = await client.update_model("forecast", model_path)
            >>> y = await session.step(np.ones((1, 3), np.float32))
            >>> session.model_version == updated.version
            True
        """
        return await self.load_model(
            name,
            model,
            sessions=sessions,
            migration=migration,
            labels=labels,
            unload_previous=unload_previous,
            progress=progress,
            upload=upload,
            timeout_s=timeout_s,
        )

    async def unload_model(
        self,
        name: str,
        version: int | None = None,
        *,
        force: bool = False,
        timeout_s: float | None = None,
    ) -> None:
        """Stops serving a version, on every replica, once active calls on it have ended.

        Arguments, result and errors are those of `Client.unload_model`.

        Example:
            >>> loaded = await client.load_model("forecast", model_path, default=False)
            >>> await client.unload_model("forecast", loaded.version)
        """
        deadline = self._driver.core.deadline(timeout_s)
        await self._driver.run(self._model_admin.unload(name, version, force, deadline))

    async def set_default(
        self,
        name: str,
        version: int,
        *,
        sessions: SessionPolicy = "keep",
        migration: str | None = None,
        timeout_s: float | None = None,
    ) -> LoadedModel:
        """Makes a loaded version the default. Use it to roll forward or back.

        Arguments, result and errors are those of `Client.set_default`.

        Example:
            >>> now = (await client.model("forecast")).version
            >>> (await client.set_default("forecast", now)).previous_version == now
            True
        """
        deadline = self._driver.core.deadline(timeout_s)
        return await self._driver.run(
            self._model_admin.set_default(name, version, sessions, migration, deadline)
        )

    async def set_label(
        self, name: str, label: str, version: int, *, timeout_s: float | None = None
    ) -> LoadedModel:
        """Gives a label to a loaded version. From then on, `NAME:LABEL` refers to that version.

        Arguments, result and errors are those of `Client.set_label`.

        Example:
            >>> now = (await client.model("forecast")).version
            >>> labelled = await client.set_label("forecast", "stable", now)
            >>> (await client.model("forecast:stable")).version == now
            True
        """
        deadline = self._driver.core.deadline(timeout_s)
        return await self._driver.run(self._model_admin.set_label(name, label, version, deadline))

    async def remove_label(self, name: str, label: str, *, timeout_s: float | None = None) -> None:
        """Removes a label. Sessions that were opened by it stay on their version.

        Arguments, result and errors are those of `Client.remove_label`.

        Example:
            >>> now = (await client.model("forecast")).version
            >>> labelled = await client.set_label("forecast", "nightly", now)
            >>> await client.remove_label("forecast", "nightly")
        """
        deadline = self._driver.core.deadline(timeout_s)
        await self._driver.run(self._model_admin.set_label(name, label, None, deadline))
