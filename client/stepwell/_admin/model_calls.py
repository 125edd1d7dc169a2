"""The methods of `Client` that change which models a server has."""

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
    """Loads and unloads versions of models while the server runs. Only admins may, if the server authenticates callers."""

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

        The server compiles the model and warms it up while it keeps serving. A file that fails to load changes
        nothing. When the default moves, `sessions` decides what happens to the sessions that follow it: those opened
        by the model's name alone. Sessions opened with a version or a label stay where they are. Each step is applied
        once, even if the default moves in the meantime, and `Session.model_version` shows which version answered.

        **Replicas.** The call loads the version on one reachable replica after the other, and then moves the default
        once for all of them. If one replica cannot load it, the default does not move, and a note of the error names
        the replicas that have it. Repeat the call with that number as `version` to continue. Replicas that already
        have the same file under that number are skipped.

        **After an error.** If the answer is lost, the client does not retry the load, and the outcome is unknown.
        Check `model(name).versions`. With `version`, you can repeat the call safely, because the server rejects a
        version that exists.

        Args:
            name: Name of the model. It may be new to the server.
            model: Path of a `.keras`, `.onnx` or `.stepwell` file, or a `keras.Model`.
            version: Number of the version, which must not exist. None: one more than the highest number so far.
            sessions: "keep": the sessions stay on their version until they end. "carry": they continue with their
                states under the new weights, all of them between two steps; states and outputs must have the same
                names, shapes and dtypes. "migrate": a function of the operator (`stepwell serve --migration`)
                converts their states. "reset": they restart from the initial state.
            default: Make it the default. False: keep the default; `NAME@VERSION` or a label reaches the new version.
            migration: Name of the function for "migrate". None: the only one that the server has.
            labels: Labels to give to the version.
            unload_previous: Unload the previous default version once nothing uses it and it has no sessions. A
                replica on which it is in use at that moment keeps it.
            progress: Called with each stage: "waiting", a stage of compiling, "warm up", "switch".
            upload: Send the file to the server, which must allow that (`--allow-model-upload`). False: the path is
                one on the server's disk. None: send it if the server is on another machine. A server without a data
                folder, such as one that shares a store, does not keep the file: the version is gone after a restart,
                and the `reason` of the version in the result's `versions` states that.
            timeout_s: Time limit of the whole call, in seconds. Compiling a new architecture takes some seconds, or
                minutes if it is large.

        Raises:
            InvalidInputError: An argument breaks a rule.
            FileNotFoundError: There is no such file on this machine.
            ModelVersionExistsError: The version exists, or is being loaded.
            ModelLoadError: The file is not a model, or the model cannot be served.
            ModelMismatchError: "carry" to a version with other states or outputs; the message names the differences.
            MigrationFailedError: The function does not exist, or failed.
            PermissionDeniedError: The caller is not an admin.

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
        """Gives a model new weights: loads the next version, makes it the default and unloads the previous one.

        This is for trainers that push weights every few seconds while sessions continue. It is `load_model` with
        other defaults: sessions keep their states, and the previous version is unloaded. If the architecture is the
        same, the server does not trace the model again.

        Arguments, result and errors are those of `load_model`.

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
        """Stops serving a version, on every replica, once active calls on it have ended.

        Args:
            name: Name of the model.
            version: Number of the version. None: all versions of the model.
            force: Unload it even if it is the default or has sessions. The store keeps these sessions; calls on them
                fail until the version is loaded again.
            timeout_s: Time limit of this call over all its attempts, in seconds; None: the client's.

        Raises:
            ModelInUseError: The version is the default or has sessions, and `force` is not given.
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
        """Makes a loaded version the default. Use it to roll forward or back.

        Args:
            name: Name of the model.
            version: Number of the version.
            sessions: What happens to the sessions that follow the default; as in `load_model`.
            migration: As in `load_model`.
            timeout_s: Time limit of this call over all its attempts, in seconds; None: the client's.

        Raises:
            ModelNotFoundError: There is no such version.
            ModelMismatchError: As in `load_model`.
            MigrationFailedError: As in `load_model`.

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
        """Gives a label to a loaded version. From then on, `NAME:LABEL` refers to that version.

        A version may have several labels; a label refers to one version. Sessions that were opened by the label stay
        on their version.

        Args:
            name: Name of the model.
            label: 1 to 64 letters, digits, "_", "-" or ".", not only digits.
            version: Number of the version.
            timeout_s: Time limit of this call over all its attempts, in seconds; None: the client's.

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
        """Removes a label. Sessions that were opened by it stay on their version.

        Raises:
            ModelNotFoundError: There is no such label.

        Example:
            >>> labelled = client.set_label("forecast", "nightly", client.model("forecast").version)
            >>> client.remove_label("forecast", "nightly")
        """
        deadline = self._driver.core.deadline(timeout_s)
        self._driver.run(self._model_admin.set_label(name, label, None, deadline))
