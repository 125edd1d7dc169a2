"""`stepwell.local`: a server with your own models that lives as long as this process, for notebooks and scripts.

There is one server for each set of names. A call compares the content of the server with its arguments: it reuses a
server with the same content, and replaces any other.
"""

from __future__ import annotations

import atexit
import dataclasses
import importlib.util
import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from stepwell._admin import model_files
from stepwell._admin.model_files import ModelSource
from stepwell.client import Client
from stepwell.config import DEFAULT_MAX_MESSAGE_BYTES, DEFAULT_TIMEOUT_S, ClientConfig, check_switch
from stepwell.errors import ServerStartError
from stepwell.testing import LocalServer, serve_arguments

_STOP_S = 10.0
_NO_ADDRESS = "127.0.0.1:1"
_COMPILED = ".stepwell"
_HTTP = ("--http-listen", "127.0.0.1:0")
# A line of the server's log, as text or as JSON, for a model that is not in its cache.
_LOADING = re.compile(r'loading model\b.*?\bmodel"?[=:]\s*"?(?P<name>[A-Za-z0-9_.-]+)')


def local(
    models: ModelSource | Mapping[str, ModelSource],
    *,
    name: str | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    extra_args: Sequence[str] = (),
    cache_dir: str | os.PathLike[str] | None = None,
    start_timeout_s: float = 180.0,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    coalesce: bool = True,
) -> LocalClient:
    """Returns a client of a server with your own models, and starts that server if it is not running.

    The server is a process of its own on a free port of 127.0.0.1. There is one for each set of names:

    - The same call again, for example by running a notebook cell again, returns the same server and client, with its
      sessions. A model object is the same if its architecture and weights are; a file is the same if its bytes are.
    - A call for the same names with any other difference (weights, options, a variable `STEPWELL_...`) ends the
      server, its client and, without `data_dir`, its sessions, and starts another server. To give the server new
      weights and keep its sessions, use `client.update_model`. In Jupyter, running a cell again also ends what it
      started under other names before.
    - The server ends with `client.close()` or the client's `with` block, and with this process. On Linux that
      includes `kill -9` and a kernel restart. The stop button and Ctrl-C leave it alone.

    A model that is new to this machine is compiled first. This can take half a minute, and a line on stderr announces
    it.

    Safe to call from many threads at once. After a fork the child has no servers; those of the parent are left alone.

    Args:
        models: Path of a `.keras`, `.onnx` or `.stepwell` file, a `keras.Model`, or a mapping of names to these. Names of
            several versions of a model are `NAME@1`, `NAME@2`.
        name: Name of a single model. None: the name of the file without its suffix. For an object, the name that you
            gave it, or "model" if Keras generated its name.
        data_dir: Folder for the sessions. None: in memory, so that they end with the server.
        extra_args: Additional options of `stepwell serve`. Custom layers must be in a module: `["--import", NAME]`.
        cache_dir: Folder for compiled models. None: the server's default.
        start_timeout_s: Time limit for the start, which includes compiling the models, in seconds.
        timeout_s: See `connect`.
        max_message_bytes: See `connect`.
        coalesce: See `connect`.

    Raises:
        InvalidInputError: An argument breaks a rule.
        FileNotFoundError: There is no such file.
        ServerStartError: The server cannot start, for example because a model cannot be served or a package is not
            installed. The message begins with the reason.

    Example:
        >>> client = stepwell.local(model_path, name="forecast")
        >>> client.open_session("forecast").step(np.ones((1, 3), np.float32)).shape
        (1, 1)
        >>> stepwell.local(model_path, name="forecast") is client
        True
        >>> client.close()
    """
    sources = model_files.named(models, name)
    arguments = serve_arguments(extra_args)
    # rejects invalid values before anything is started or ended
    check_switch("coalesce", coalesce)
    config = ClientConfig(_NO_ADDRESS, timeout_s, max_message_bytes)
    with tempfile.TemporaryDirectory(prefix="stepwell-") as folder:
        files = {name: model_files.file_of(name, source, folder) for name, source in sources.items()}
        content = _Content(
            {
                name: (os.path.abspath(file.path) if file.is_given else "", file.digest())
                for name, file in files.items()
            },
            None if data_dir is None else os.path.abspath(data_dir),
            tuple(arguments),
            None if cache_dir is None else os.path.abspath(cache_dir),
            {key: value for key, value in os.environ.items() if key.startswith("STEPWELL_")},
        )
        place = _places.of(frozenset(files))
        paths = {name: file.path for name, file in files.items()}

        def start(*, http: bool) -> LocalServer:
            server = LocalServer(
                paths,
                content.data_dir,
                (*content.extra_args, *(_HTTP if http else ())),
                cache_dir=content.cache_dir,
                start_timeout_s=start_timeout_s,
                on_log=_Progress(paths).on_log,
            )
            try:
                server.start()
            except ServerStartError as error:
                if http and error.refusal.startswith(_HTTP[0]):  # the native front cannot be used
                    return start(http=False)
                if not error.refusal:
                    raise
                message = error.refusal
                for file in files.values():
                    if (
                        not file.is_given
                    ):  # a temporary file of this call, whose name means nothing to the caller
                        message = message.replace(f"{file.path}: ", "")
                raise ServerStartError(f"{message} (the server did not start)", refusal=message) from None
            return server

        return place.client(content, config, coalesce, lambda: start(http=_may_serve_http(content)))


def _may_serve_http(content: _Content) -> bool:
    """Whether a server can be asked for HTTP: only the native front serves it, and the caller may have its own options."""
    options = {option.partition("=")[0] for option in content.extra_args}
    return (
        importlib.util.find_spec("stepwell_front") is not None
        and options.isdisjoint({_HTTP[0], "--front", "--config"})
        and content.variables.keys().isdisjoint({"STEPWELL_HTTP_LISTEN", "STEPWELL_FRONT", "STEPWELL_CONFIG"})
    )


class LocalClient(Client):
    """The client that `stepwell.local` returns: a `Client` that also owns its server.

    There is one for each server, so closing it ends the server for everyone who has the client. Safe to use from many
    threads at once; not fork-safe.

    Example:
        >>> with stepwell.local(model_path, name="forecast") as client:
        ...     client.server.pid is not None
        True
        >>> client.server.pid is None
        True
    """

    def __init__(self, config: ClientConfig, server: LocalServer, place: _Place, *, coalesce: bool) -> None:
        super().__init__(config, coalesce=coalesce)
        self._server = server
        self._place = place

    @property
    def server(self) -> LocalServer:
        """The server, with its log, its process id and its address for other clients.

        Example:
            >>> with stepwell.local(model_path, name="forecast") as client:
            ...     "listening on" in client.server.logs()
            True
        """
        return self._server

    @property
    def http_address(self) -> str | None:
        """The server's address for JSON over HTTP, 127.0.0.1:PORT; None without the native front.

        Example:
            >>> import json, urllib.request
            >>> client = stepwell.local(model_path, name="forecast")
            >>> url = f"http://{client.http_address}/v1/models/forecast"
            >>> json.load(urllib.request.urlopen(url))["model"]["name"]
            'forecast'
            >>> client.close()
        """
        return self._server.http_address

    def _facts(self) -> dict[str, object]:
        process = "ended" if self._server.pid is None else f"process {self._server.pid}"
        return super()._facts() | {"server": process}

    def close(self) -> None:
        """Closes the connection and ends the server, and with it all sessions unless it has a `data_dir`.

        Closing again does nothing.

        Example:
            >>> stepwell.local(model_path, name="forecast").close()
        """
        super().close()
        self._place.end(self)


class _Content(NamedTuple):
    """The content of a server: everything that a call compares."""

    models: Mapping[str, tuple[str, str]]
    """Paths of given files, and digests, by name."""
    data_dir: str | None
    extra_args: tuple[str, ...]
    cache_dir: str | None
    variables: Mapping[str, str]


class _Cell(NamedTuple):
    """A cell of a notebook, and one run of it."""

    id: str
    run: str


class _Place:
    """The server for a set of names, if one runs, and its client."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._client: LocalClient | None = None
        self._content: _Content | None = None
        self._options: tuple[ClientConfig, bool] | None = None
        """The options of the client."""
        self._cell: _Cell | None = None
        """The cell that requested it last."""

    def client(
        self, content: _Content, config: ClientConfig, coalesce: bool, start: Callable[[], LocalServer]
    ) -> LocalClient:
        """Returns the client of a server with this content and these options, or a new one."""
        cell, options = _running_cell(), (config, coalesce)
        with self._lock:
            client = self._client
            if client is None or client.server.pid is None or self._content != content:
                self._end()
                server = start()
            elif self._options != options:  # the server may stay
                server = client.server
                Client.close(client)
            else:
                self._cell = cell
                return client
            config = dataclasses.replace(config, address=server.address)
            self._client = client = LocalClient(config, server, self, coalesce=coalesce)
            self._content, self._options, self._cell = content, options, cell
            return client

    def end(self, client: LocalClient) -> None:
        """Ends the server and its client, if the place still has that client."""
        with self._lock:
            if self._client is client:
                self._end()

    def end_idle(self) -> None:
        """Ends the server and its client, unless another thread is starting or ending them."""
        if self._lock.acquire(blocking=False):
            try:
                self._end()
            finally:
                self._lock.release()

    def end_earlier(self, cell: _Cell) -> None:
        """Ends the server and its client if an earlier run of this cell started them."""
        with self._lock:
            own = self._cell
            if own is not None and own.id == cell.id and own.run != cell.run:
                self._end()

    def _end(self) -> None:
        if self._client is not None and self._content is not None:
            server = self._client.server
            Client.close(self._client)
            if server.pid is not None and self._content.data_dir is None:
                server.kill()  # it has nothing to finish: its sessions end with it
            elif server.pid is not None:
                server.stop(_STOP_S)
        self._client = self._cell = None


class _Places:
    """The places of this process."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Forgets all places, in a child after a fork: the servers belong to its parent."""
        self._lock = threading.Lock()
        self._places: dict[frozenset[str], _Place] = {}

    def of(self, names: frozenset[str]) -> _Place:
        with self._lock:
            return self._places.setdefault(names, _Place())

    def all(self) -> list[_Place]:
        with self._lock:
            return list(self._places.values())

    def end_all(self) -> None:
        """Ends all servers at the end of the process. A server that a thread is just starting ends with the process."""
        for place in self.all():
            place.end_idle()


_places = _Places()
atexit.register(_places.end_all)
os.register_at_fork(after_in_child=_places.forget)


class _Progress:
    """Reports once for each model that it is being compiled."""

    def __init__(self, paths: Mapping[str, str]) -> None:
        self._unsaid = {name for name, path in paths.items() if not path.endswith(_COMPILED)}

    def on_log(self, line: str) -> None:
        loading = _LOADING.search(line)
        if loading is not None and loading["name"] in self._unsaid:
            self._unsaid.remove(loading["name"])
            sys.stderr.write(
                f"stepwell: compiling {loading['name']!r} (once for each model on this machine; "
                "it can take half a minute)\n"
            )
            sys.stderr.flush()


def _running_cell() -> _Cell | None:
    """Returns the notebook cell that is running now, if there is one, and watches for its end."""
    shell: Any = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    message = shell.get_parent() if hasattr(shell, "get_parent") else {}
    try:
        cell = _Cell(message["metadata"]["cellId"], message["header"]["msg_id"])
    except (KeyError, TypeError):  # not a notebook, or one without cell ids
        return None
    _end_earlier_after(shell, cell)
    return cell


def _end_earlier_after(shell: Any, cell: _Cell) -> None:
    """Ends what an earlier run of the cell started and this run did not request, once the cell has run without an error."""

    def sweep(result: Any) -> None:
        shell.events.unregister("post_run_cell", sweep)
        if result.success:
            for place in _places.all():
                place.end_earlier(cell)

    shell.events.register("post_run_cell", sweep)
