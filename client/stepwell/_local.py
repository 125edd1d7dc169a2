"""`stepwell.local`: a server of one's own models that lives with this process, for notebooks and scripts.

There is one server for each set of names. What makes it up is compared when it is asked for again: the same is used
again, anything else takes its place.
"""

from __future__ import annotations

import atexit
import dataclasses
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
    """A client of a server of one's own models, which this call starts, or finds running.

    The server is a process of its own on a free port of 127.0.0.1. There is one for each set of names:

    - The same call again, as when the cell of a notebook is run again, gives the same server and the same client,
      sessions included. A model object is the same if its architecture and weights are, a file if its bytes are.
    - A call for the same names with anything else different (weights, options, a variable `STEPWELL_...`) ends the
      server, its client and, without `data_dir`, its sessions, and starts another; to give the server new weights
      and keep its sessions, use `client.update_model`. In Jupyter a cell that is run again
      also ends what it started under other names before.
    - It ends with `client.close()` or the client's `with` block, and with this process: on Linux however that ends,
      `kill -9` and a kernel restart included. The stop button and Ctrl-C leave it alone.

    A model that is new to the machine is compiled, which can take half a minute and is said in a line on stderr.

    Safe to call from many threads at once. After a fork the child has no servers: those of the parent are left alone.

    Args:
        models: Path of a `.keras` or `.stepwell` file, a `keras.Model`, or a mapping of names to these; several versions
            of a model are named `NAME@1`, `NAME@2`.
        name: Name to serve a single model under. None: that of the file without its suffix; of an object the name it
            was given, or "model" if Keras made one up.
        data_dir: Where the server keeps sessions. None: in memory, so that they end with it.
        extra_args: Further options of `stepwell serve`. Layers of one's own must be in a module: `["--import", NAME]`.
        cache_dir: Where it keeps compiled models. None: the server's own default.
        start_timeout_s: How long it may take to be ready, in seconds; models are compiled in this time.
        timeout_s: See `connect`.
        max_message_bytes: See `connect`.
        coalesce: See `connect`.

    Raises:
        InvalidInputError: An argument breaks its rule.
        FileNotFoundError: There is no such file.
        ServerStartError: The server cannot start (a model that cannot be served; packages that are not installed:
            the message begins with the reason).

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
    told = _Told(timeout_s, max_message_bytes, coalesce)
    told.config(_NO_ADDRESS)  # what is wrong is refused while nothing has been started or ended
    with tempfile.TemporaryDirectory(prefix="stepwell-") as folder:
        files = {name: model_files.file_of(name, source, folder) for name, source in sources.items()}
        wanted = _Wanted(
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

        def start() -> LocalServer:
            try:
                return _new_server(wanted, paths, start_timeout_s)
            except ServerStartError as error:
                if not error.refusal:
                    raise
                message = error.refusal
                for file in files.values():
                    if not file.is_given:  # a temporary file of this call, whose name says nothing
                        message = message.replace(f"{file.path}: ", "")
                raise ServerStartError(f"{message} (the server did not start)", refusal=message) from None

        return place.client(wanted, told, start)


class LocalClient(Client):
    """The client that `stepwell.local` gives: a `Client` whose server ends with it.

    There is one for each server, so closing it ends the server for all who have it. Safe to use from many threads at
    once; not fork-safe.

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
        """The server: its log, its process, its address for clients of other kinds.

        Example:
            >>> with stepwell.local(model_path, name="forecast") as client:
            ...     "listening on" in client.server.logs()
            True
        """
        return self._server

    def _facts(self) -> dict[str, object]:
        process = "ended" if self._server.pid is None else f"process {self._server.pid}"
        return super()._facts() | {"server": process}

    def close(self) -> None:
        """Ends the connection and the server, and with it all sessions unless it has a `data_dir`.

        Closing again does nothing.

        Example:
            >>> stepwell.local(model_path, name="forecast").close()
        """
        super().close()
        self._place.end(self)


class _Wanted(NamedTuple):
    """What a server is made of."""

    models: Mapping[str, tuple[str, str]]
    data_dir: str | None
    extra_args: tuple[str, ...]
    cache_dir: str | None
    variables: Mapping[str, str]


class _Told(NamedTuple):
    """The configuration of a client."""

    timeout_s: float
    max_message_bytes: int
    coalesce: bool

    def config(self, address: str) -> ClientConfig:
        """Of a client of a server.

        Raises:
            InvalidInputError: It breaks a rule.
        """
        check_switch("coalesce", self.coalesce)
        return ClientConfig(address, self.timeout_s, self.max_message_bytes)


class _Cell(NamedTuple):
    """A cell of a notebook, and which run of it."""

    id: str
    run: str


@dataclasses.dataclass
class _Running:
    wanted: _Wanted
    told: _Told
    client: LocalClient
    cell: _Cell | None


class _Place:
    """Where the server of a set of names is, or is to be."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: _Running | None = None

    def client(self, wanted: _Wanted, told: _Told, start: Callable[[], LocalServer]) -> LocalClient:
        """The client that was made of the same, or a new one."""
        cell = _running_cell()
        with self._lock:
            running = self._running
            if running is None or running.wanted != wanted or running.client.server.pid is None:
                self._end()
                server = start()
            elif running.told != told:  # the server may stay
                server = running.client.server
                Client.close(running.client)
            else:
                running.cell = cell
                return running.client
            client = LocalClient(told.config(server.address), server, self, coalesce=told.coalesce)
            self._running = _Running(wanted, told, client, cell)
            return client

    def end(self, client: LocalClient) -> None:
        """Ends what runs here, if it is (still) that client's."""
        with self._lock:
            if self._running is not None and self._running.client is client:
                self._end()

    def end_idle(self) -> None:
        """Ends what runs here, unless another thread is starting or ending it."""
        if self._lock.acquire(blocking=False):
            try:
                self._end()
            finally:
                self._lock.release()

    def end_earlier(self, cell: _Cell) -> None:
        """Ends what runs here if an earlier run of this cell has started it."""
        with self._lock:
            own = None if self._running is None else self._running.cell
            if own is not None and own.id == cell.id and own.run != cell.run:
                self._end()

    def _end(self) -> None:
        if self._running is None:
            return
        server = self._running.client.server
        Client.close(self._running.client)
        if server.pid is not None:
            if self._running.wanted.data_dir is None:
                server.kill()  # it has nothing to finish: its sessions end with it
            else:
                server.stop(_STOP_S)
        self._running = None


class _Places:
    """The places of this process."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """For a child after a fork: what runs is its parent's."""
        self._lock = threading.Lock()
        self._places: dict[frozenset[str], _Place] = {}

    def of(self, names: frozenset[str]) -> _Place:
        with self._lock:
            return self._places.setdefault(names, _Place())

    def all(self) -> list[_Place]:
        with self._lock:
            return list(self._places.values())

    def end_all(self) -> None:
        """At the end of the process. What a thread of it is just starting ends with the process."""
        for place in self.all():
            place.end_idle()


_places = _Places()
atexit.register(_places.end_all)
os.register_at_fork(after_in_child=_places.forget)


def _new_server(wanted: _Wanted, paths: Mapping[str, str], start_timeout_s: float) -> LocalServer:
    server = LocalServer(
        paths,
        wanted.data_dir,
        wanted.extra_args,
        cache_dir=wanted.cache_dir,
        start_timeout_s=start_timeout_s,
        on_log=_Progress(paths).on_log,
    )
    server.start()
    return server


class _Progress:
    """Says once of each model that it is being compiled."""

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
    """The cell of a notebook that is running now, if it is one; what it ran before is looked after at its end."""
    shell: Any = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    message = shell.get_parent() if hasattr(shell, "get_parent") else {}
    try:
        cell = _Cell(message["metadata"]["cellId"], message["header"]["msg_id"])
    except (KeyError, TypeError):  # no notebook, or one that does not say
        return None
    _end_earlier_after(shell, cell)
    return cell


def _end_earlier_after(shell: Any, cell: _Cell) -> None:
    """When the cell has run without an error, ends what an earlier run of it started and this one did not ask for."""

    def sweep(result: Any) -> None:
        shell.events.unregister("post_run_cell", sweep)
        if result.success:
            for place in _places.all():
                place.end_earlier(cell)

    shell.events.register("post_run_cell", sweep)
