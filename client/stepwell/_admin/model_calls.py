"""What a sync client does for those who change which models a server has. Part of `Client`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from stepwell._admin import model_files
from stepwell._admin.model_files import ModelSource
from stepwell._admin.models import LoadProgress, ModelAdmin, SessionPolicy
from stepwell._base.tracebacks import end_here
from stepwell._core.driver import Driver
from stepwell._state.infos import LoadedModel
from stepwell.config import DEFAULT_LOAD_TIMEOUT_S

T = TypeVar("T")


@end_here
class ModelCalls:
    """Loads and unloads versions of models while they are served. For admins, where the server knows its callers."""

    _driver: Driver

    @property
    def _model_admin(self) -> ModelAdmin:
        return ModelAdmin(self._driver.core)

    def load_model(
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

        It is compiled and warmed up beside the traffic; a file that fails changes nothing. When the default moves,
        `sessions` says what becomes of the sessions that follow it, which are those that were opened by the name alone;
        sessions that were opened with a version or a label stay where they are. Each step is applied once, whatever
        moves meanwhile, and its answer says on which version: `Session.model_version`.

        Where there are several replicas, each that can be reached loads it, one after the other, beside what is the
        default; then the default moves, once for all. If one of them cannot load it, the default stays where it is, a
        note of the error says which have it, and the same call with its number as `version` goes on: a replica that has
        the same file under that number already is passed over.

        If the answer is lost, the load is not tried again, and the error says that the outcome is unknown:
        `model(name).versions` has what there is. With `version` the same call may be made again, for a version that is
        there is refused.

        Args:
            name: Name of the model. One that is not served yet begins with this version.
            model: Path of a `.keras` or `.stepwell` file, or a `keras.Model`.
            version: Number of the version, which must not be there. None: one more than the highest that there was.
            sessions: "keep": they stay on their version until they end. "carry": they go on with their states under the
                new weights, all of them between two steps; states and outputs must have the same names, shapes and
                dtypes. "migrate": a function of the operator's (`stepwell serve --migration`) makes new states of the
                old ones. "reset": they begin anew.
            default: Make it the default. False: it stays beside it, reached as `NAME@VERSION` or by a label.
            migration: Name of the function; None: the only one that there is.
            labels: Labels that it gets.
            unload_previous: Unload the version that was the default when nothing is under way on it and it has no
                session. Of several replicas one where it is in use just then keeps it.
            progress: Called with what is done now: "waiting", a stage of compiling, "warm up", "switch".
            upload: Send the file to the server, which must allow that (`--allow-model-upload`). False: the path is one
                on the server's disk. None: send it if the server is on another machine. A server without a data folder, as
                those that share a store, keeps nothing of a file that was sent: the version ends with it, and the
                `reason` of the version in the answer's `versions` says so.
            timeout_s: Time limit of all of it; the server compiles a new architecture in some seconds or, if it is
                large, minutes.

        Raises:
            InvalidInputError: An argument breaks its rule.
            FileNotFoundError: There is no such file here.
            ModelVersionExistsError: The version is there, or is being loaded.
            ModelLoadError: The file is no model, or one that cannot be served.
            ModelMismatchError: "carry" to a version with other states or outputs; the message says which differ.
            MigrationFailedError: The function is not there, or failed.
            PermissionDeniedError: The caller is no admin.

        Example:
            >>> loaded = client.load_model("forecast", model_path, default=False, labels=["canary"])
            >>> client.open_session("forecast:canary").model_version == loaded.version
            True
            >>> client.unload_model("forecast", loaded.version, force=True)
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
        with model_files.placed(name, model, upload=upload, is_on_this_machine=is_on_this_machine) as file:
            return self._driver.run(admin.load(request, file, deadline, progress))

    def update_model(
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
        """Gives a model new weights: loads the next version, makes it the default and unloads the one before.

        For trainers, who push weights every few seconds while sessions go on. It is `load_model` with other defaults:
        sessions keep their states, and the old version is unloaded. Where the architecture is that of before, nothing
        is traced anew.

        Arguments and errors are those of `load_model`.

        Example:
            >>> before = session.model_version
            >>> updated = client.update_model("forecast", model_path)
            >>> y = session.step(np.ones((1, 3), np.float32))
            >>> session.model_version == updated.version > before
            True
        """
        return self.load_model(
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

    def unload_model(
        self,
        name: str,
        version: int | None = None,
        *,
        force: bool = False,
        timeout_s: float | None = None,
    ) -> None:
        """Serves a version no longer, when what is under way on it has ended; on each replica, if there are several.

        Args:
            name: Name of the model.
            version: Number of the version. None: all versions of the name.
            force: Also if it is the default, or has sessions: these stay in the store, and fail until it is loaded
                again.
            timeout_s: Time limit of this call over all its attempts; None: the client's.

        Raises:
            ModelInUseError: It is the default or has sessions, and `force` is not given.
            ModelNotFoundError: There is no such version.

        Example:
            >>> loaded = client.load_model("forecast", model_path, default=False)
            >>> client.unload_model("forecast", loaded.version)
        """
        deadline = self._driver.core.deadline(timeout_s)
        self._driver.run(self._model_admin.unload(name, version, force, deadline))

    def set_default(
        self,
        name: str,
        version: int,
        *,
        sessions: SessionPolicy = "keep",
        migration: str | None = None,
        timeout_s: float | None = None,
    ) -> LoadedModel:
        """Makes a loaded version the default: the way forward, and the way back.

        Args:
            name: Name of the model.
            version: Number of the version.
            sessions: What becomes of the sessions that follow the default; as in `load_model`.
            migration: As in `load_model`.
            timeout_s: Time limit of this call over all its attempts; None: the client's.

        Raises:
            ModelNotFoundError: There is no such version.
            ModelMismatchError, MigrationFailedError: As in `load_model`.

        Example:
            >>> now = client.model("forecast").version
            >>> client.set_default("forecast", now).previous_version == now
            True
        """
        deadline = self._driver.core.deadline(timeout_s)
        return self._driver.run(self._model_admin.set_default(name, version, sessions, migration, deadline))

    def set_label(
        self, name: str, label: str, version: int, *, timeout_s: float | None = None
    ) -> LoadedModel:
        """Gives a label to a loaded version; `NAME:LABEL` stands for it from now on.

        A version may have several labels; a label stands for one version. Sessions that were opened by it stay where
        they are.

        Args:
            name: Name of the model.
            label: 1 to 64 letters, digits, "_", "-" or ".", not digits alone.
            version: Number of the version.
            timeout_s: Time limit of this call over all its attempts; None: the client's.

        Raises:
            ModelNotFoundError: There is no such version.

        Example:
            >>> now = client.model("forecast").version
            >>> labelled = client.set_label("forecast", "stable", now)
            >>> client.model("forecast:stable").version == now
            True
        """
        deadline = self._driver.core.deadline(timeout_s)
        return self._driver.run(self._model_admin.set_label(name, label, version, deadline))

    def remove_label(self, name: str, label: str, *, timeout_s: float | None = None) -> None:
        """Takes a label away. Sessions that were opened by it stay where they are.

        Raises:
            ModelNotFoundError: There is no such label.

        Example:
            >>> labelled = client.set_label("forecast", "nightly", client.model("forecast").version)
            >>> client.remove_label("forecast", "nightly")
        """
        deadline = self._driver.core.deadline(timeout_s)
        self._driver.run(self._model_admin.set_label(name, label, None, deadline))
