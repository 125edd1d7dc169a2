"""What can be set, by an option or by its environment variable.

A value is that of the command line, else that of the environment, else the default. Both are read by the
same rules, and a value that cannot be read stops the start with a line that names where it came from, also
where the command line has another. The docstring under a field of `Settings` is the help text of its option.
"""

# ruff: noqa: RUF009  (the calls in the dataclass make fields)

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from stepwell_server.addresses import Address, UnixAddress
from stepwell_server.compile.limits import Limits, default_memory_bytes
from stepwell_server.compile.origin import folder_problem
from stepwell_server.rpc.fronts.limits import FrontLimits

_MODEL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_PREFIX = "STEPWELL_"
_LONGEST_SOCKET_PATH = 107
"""Bytes that Linux has room for."""


class SettingsError(Exception):
    """A value that cannot be used. The message is one line and names the option or variable."""


def _setting(read: Callable[[str], Any], default: Any, metavar: str) -> Any:
    return dataclasses.field(default=default, metadata={"read": read, "metavar": metavar})


def _computed(read: Callable[[str], Any], default: Callable[[], Any], metavar: str) -> Any:
    return dataclasses.field(default_factory=default, metadata={"read": read, "metavar": metavar})


def _several(read: Callable[[Sequence[str]], Any], default: Callable[[], Any], metavar: str) -> Any:
    """A setting of several values: an option given again, a variable with commas."""
    metadata = {"read": read, "metavar": metavar, "several": True}
    return dataclasses.field(default_factory=default, metadata=metadata)


def _choice(*values: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in values:
            raise ValueError(f"one of {', '.join(values)}")
        return text

    return read


def _store(text: str) -> str:
    # "lmdb" is what "disk" was called before there was a write-ahead log
    return "disk" if text == "lmdb" else _choice("disk", "memory")(text)


def _whole(smallest: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not re.fullmatch(r"\d{1,18}", text) or int(text) < smallest:
            raise ValueError(f"a whole number, {smallest} or more")
        return int(text)

    return read


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise ValueError("a number of seconds, 0 or more")
    return value


def _address(text: str) -> Address:
    host, _, port = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not bare or not re.fullmatch(r"\d{1,5}", port) or int(port) > 65535 or (":" in bare) is (bare == host):
        raise ValueError("HOST:PORT, or [HOST]:PORT for IPv6, with a port from 0 to 65535")
    return Address(bare, int(port))


def _listen(text: str) -> Address | UnixAddress:
    kind, _, path = text.partition(":")
    if kind != "unix":
        try:
            return _address(text)
        except ValueError as error:
            raise ValueError(f"{error}, or unix:PATH") from None
    if path.startswith("//"):  # a URL; without a host, so that a third slash begins the path
        path = path[2:] if path.startswith("///") else ""
    path = os.path.abspath(path) if path and "\0" not in path else ""
    if not path or len(os.fsencode(path)) > _LONGEST_SOCKET_PATH:
        raise ValueError(
            f"unix:PATH or unix:///PATH, the path made absolute of at most {_LONGEST_SOCKET_PATH} bytes"
        )
    return UnixAddress(path)


def _file(text: str) -> Path:
    try:
        return _expanded(text)
    except LookupError as error:
        raise ValueError(f"a file: {error}") from None


def _module_names(items: Sequence[str]) -> tuple[str, ...]:
    for item in items:
        if not all(word.isidentifier() for word in item.split(".")):
            raise ValueError(f"the name of a module; got {item!r}")
    return tuple(items)


def _models(items: Sequence[str]) -> dict[str, Path]:
    models: dict[str, Path] = {}
    for item in items:
        name, _, path = item.partition("=")
        if not path:
            example = f", such as {Path(item).stem}={item}" if item.endswith(".keras") else ""
            raise ValueError(f"NAME=PATH.keras{example}; got {item!r}")
        if not _MODEL_NAME.fullmatch(name):
            raise ValueError(
                f"NAME=PATH.keras with a name of 1 to 128 letters, digits, _, - or .; got {item!r}"
            )
        if name in models:
            raise ValueError(f"NAME=PATH.keras with different names; got {name!r} twice")
        try:
            models[name] = _expanded(path)
        except LookupError as error:
            raise ValueError(
                f"NAME=PATH.keras with a path that can be found: {error}; got {item!r}"
            ) from None
    return models


def _probe_steps(items: Sequence[str]) -> dict[str, int]:
    steps: dict[str, int] = {}
    for name, text in _named(items, "NAME=N").items():
        if not re.fullmatch(r"\d{1,6}", text) or not 1 <= int(text) <= 100_000:
            raise ValueError(
                f"NAME=N with a number of time steps from 1 to 100000; got {name + '=' + text!r}"
            )
        steps[name] = int(text)
    return steps


def _data_files(items: Sequence[str]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for name, text in _named(items, "NAME=FILE.npy").items():
        files[name] = _expanded(text)
        if files[name].suffix not in {".npy", ".npz"} or not files[name].is_file():
            raise ValueError(f"NAME=FILE with an .npy or .npz file that exists; got {name + '=' + text!r}")
    return files


def _named(items: Sequence[str], form: str) -> dict[str, str]:
    """Read pairs of a model's name and a text, each model once."""
    pairs: dict[str, str] = {}
    for item in items:
        name, _, text = item.partition("=")
        if not text or not _MODEL_NAME.fullmatch(name):
            raise ValueError(f"{form} with the name of a model; got {item!r}")
        if name in pairs:
            raise ValueError(f"{form} with different names; got {name!r} twice")
        pairs[name] = text
    return pairs


def _names(items: Sequence[str]) -> tuple[str, ...]:
    for item in items:
        if not _MODEL_NAME.fullmatch(item):
            raise ValueError(f"the name of a model; got {item!r}")
    return tuple(dict.fromkeys(items))


def _folder(text: str) -> Path:
    if not text:
        raise ValueError("a folder")
    try:
        return _expanded(text)
    except LookupError as error:
        raise ValueError(f"a folder: {error}") from None


def _expanded(text: str) -> Path:
    """The path, with ~ and ~NAME for a home as shells have them, which expand neither in `--option=~/x`."""
    if not text.startswith("~"):
        return Path(text)
    path = os.path.expanduser(text)
    if path.startswith("~") or (text.partition("/")[0] == "~" and os.environ.get("HOME") == ""):
        raise LookupError(f"{text.partition('/')[0]} has no home here")
    return Path(path)


def default_cache_dir() -> Path:
    """Return the folder for compiled models where none is given.

    Raises:
        SettingsError: there is no home.
    """
    return _default_folder("--cache-dir", "XDG_CACHE_HOME", "~/.cache")


def _default_data_dir() -> Path:
    return _default_folder("--data-dir", "XDG_DATA_HOME", "~/.local/share")


def _default_folder(option: str, variable: str, fallback: str) -> Path:
    try:
        return Path(os.environ.get(variable) or _expanded(fallback)) / "stepwell"
    except LookupError:
        raise SettingsError(
            f"{option}: give a folder; without a home (HOME) and without {variable} there is no default"
        ) from None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a server is started with."""

    models: Mapping[str, Path] = _several(_models, dict, "NAME=PATH.keras")
    """Models to serve: the name under which, and the file that Keras saved. In the variable, with commas between them."""
    listen: Address | UnixAddress = _setting(_listen, Address("127.0.0.1", 50051), "ADDRESS")
    """Address to serve gRPC on: HOST:PORT, where port 0 lets the system choose and the line on stdout says which; or unix:PATH, a socket for users of the server's account only."""
    tls_cert: Path | None = _setting(_file, None, "FILE")
    """Certificate of the server in PEM, followed by those between it and its CA: callers must speak TLS then. It is read again when it changes."""
    tls_key: Path | None = _setting(_file, None, "FILE")
    """Private key of --tls-cert in PEM, not encrypted."""
    tls_client_ca: Path | None = _setting(_file, None, "FILE")
    """Certificates of CAs in PEM: callers must show a certificate that one of them has signed."""
    max_connection_age_s: float = _setting(_seconds, 0.0, "S")
    """Seconds, give or take a tenth, after which a connection takes no more calls and its client is to make a new one; 0 means never."""
    max_connection_age_grace_s: float = _setting(_seconds, 30.0, "S")
    """Seconds that calls of such a connection have to end before it is closed."""
    front: Literal["auto", "native", "python"] = _setting(
        _choice("auto", "native", "python"), "auto", "auto|native|python"
    )
    """What speaks to the network: native, the front in Rust; python, grpc.aio, which is slower; auto, native where it is installed."""
    store: Literal["disk", "memory"] = _setting(_store, "disk", "disk|memory")
    """Where sessions are kept: on disk under --data-dir, or in memory, where they end with the server."""
    data_dir: Path = _computed(_folder, _default_data_dir, "DIR")
    """Folder of the store on disk, for one server at a time. Default: stepwell in the user's data folder."""
    durability: Literal["sync", "async"] = _setting(_choice("sync", "async"), "sync", "sync|async")
    """What an acknowledged change survives on disk: sync, the loss of power too; async, kill -9."""
    max_batch_rows: int = _setting(_whole(1), 1024, "N")
    """Rows that run together at most, over all sessions of a pass."""
    resident_rows: int | None = _setting(_whole(1), None, "N")
    """Rows of state kept ready to step, per model; sessions beyond are paged out until they are stepped. Default: 65536, or as many as take a quarter of the memory."""
    max_session_idle_s: float = _setting(_seconds, 0.0, "S")
    """Seconds after which an unused session expires; 0 means never."""
    compute_threads: int = _computed(_whole(1), _cores, "N")
    """Threads that run models. Default: as many as there are cores."""
    metrics_listen: Address | None = _setting(_address, None, "HOST:PORT")
    """Address to serve Prometheus metrics on. Default: nowhere."""
    imports: Sequence[str] = _several(_module_names, tuple, "MODULE")
    """Module to import before a model is loaded, for its own layers and functions. May be given again; in the variable, with commas between them."""
    probe_steps: Mapping[str, int] = _several(_probe_steps, dict, "NAME=N")
    """Time steps over which a model is compared with Keras when it is compiled, if more than 512 and twice what its layers reach."""
    trust_causality: Sequence[str] = _several(_names, tuple, "NAME")
    """Model to serve although its graph does not prove that it may be stepped. It is still compared with Keras. May be given again."""
    check_with: Mapping[str, Path] = _several(_data_files, dict, "NAME=FILE.npy")
    """Sequences of your own, (batch, T, features), or an .npz of them by the names of the inputs: the start is refused if stepping the model through them differs from Keras."""
    cache_dir: Path = _computed(_folder, default_cache_dir, "DIR")
    """Folder for compiled models. Default: stepwell in the user's cache folder."""
    max_model_bytes: int = _setting(_whole(1), Limits.model_bytes, "N")
    """What a model's file may hold when it is unpacked; a larger one is refused."""
    max_compile_memory_bytes: int = _computed(_whole(1), default_memory_bytes, "N")
    """Memory that compiling a model may take. Default: three quarters of what there is. Linux only."""
    compile_timeout_s: float = _setting(_seconds, Limits.timeout_s, "S")
    """Seconds that compiling a model may take; 0 means as long as it takes."""
    max_message_bytes: int = _setting(_whole(1024), 64 * 1024 * 1024, "N")
    """Size of a request or reply at most."""
    max_connections: int | None = _setting(_whole(1), None, "N")
    """Connections at most; more are closed at once. Default: 16384, or as many as the limit of open files leaves room for. The native front only."""
    max_calls_per_connection: int = _setting(_whole(1), FrontLimits.streams, "N")
    """Calls that one connection may have under way; more of them wait at the client."""
    max_held_bytes: int | None = _setting(_whole(1024), None, "N")
    """Bytes of requests and replies in memory, of all calls; beyond, calls are refused with a delay. Default: 256 MiB, or four times --max-message-bytes if that is more. The native front only."""
    drain_timeout_s: float = _setting(_seconds, 30.0, "S")
    """Seconds that a stopping server gives to work which is queued."""
    log_level: Literal["debug", "info", "warning", "error"] = _setting(
        _choice("debug", "info", "warning", "error"), "info", "LEVEL"
    )
    """debug (every request), info (every session), warning or error."""
    log_format: Literal["text", "json"] = _setting(_choice("text", "json"), "text", "text|json")
    """Lines of key=value, or one JSON object per line."""


_FIELDS = {field.name: field for field in dataclasses.fields(Settings)}
_EXPLAINING = {"-h", "--help", "--version"}
_OPTIONS = {name: "--" + name.replace("_", "-") for name in _FIELDS} | {"imports": "--import"}


def variable_of(name: str) -> str:
    """The environment variable of a setting."""
    return _PREFIX + _OPTIONS[name].strip("-").replace("-", "_").upper()


def read_settings(
    arguments: Sequence[str], environment: Mapping[str, str], prog: str = "python -m stepwell_server"
) -> Settings:
    """The settings of a start.

    Raises:
        SettingsError: something cannot be used.
        SystemExit: help or the version was asked for and printed.
    """
    given = vars(_parser(prog, explain=bool(_EXPLAINING & set(arguments))).parse_intermixed_args(arguments))
    line: dict[str, Any] = {}
    variables: dict[str, Any] = {}
    for name, field in _FIELDS.items():
        variable = variable_of(name)
        if given[name] not in (None, []):
            line[name] = _read(name, given[name], "model" if name == "models" else _OPTIONS[name])
        if text := environment.get(variable):  # set to nothing counts as not set
            several = "several" in field.metadata
            variables[name] = _read(
                name, [item.strip() for item in text.split(",")] if several else text, variable
            )
    return _checked(_merged(line, variables))


def _merged(line: dict[str, Any], variables: dict[str, Any]) -> dict[str, Any]:
    """Both, where the command line wins: also over a variable that contradicts it under another name."""
    for values, data_dir, store in (
        (line, _OPTIONS["data_dir"], "--store memory"),
        (variables, variable_of("data_dir"), f"{variable_of('store')}=memory"),
    ):
        if "data_dir" in values and values.get("store") == "memory":
            raise SettingsError(f"{data_dir}: with {store} nothing is kept on disk; give one of the two")
    variables = dict(variables)
    if line.get("store") == "memory":
        variables.pop("data_dir", None)
    if "data_dir" in line and variables.get("store") == "memory":
        del variables["store"]
    return variables | line


def _read(name: str, value: str | Sequence[str], origin: str) -> Any:
    try:
        return _FIELDS[name].metadata["read"](value)
    except ValueError as error:
        got = f"; got {value!r}" if isinstance(value, str) else ""
        raise SettingsError(f"{origin} must be {error}{got}") from None


def _checked(values: dict[str, Any]) -> Settings:
    if "models" not in values:
        raise SettingsError(f"models: give at least one as NAME=PATH.keras, or in {variable_of('models')}")
    for name, path in values["models"].items():
        if not path.is_file():
            what = folder_problem(path) if path.is_dir() else "does not exist"
            raise SettingsError(f"model {name}: PATH must be a .keras file; {path} {what}")
    for setting in ("probe_steps", "trust_causality", "check_with"):
        for name in values.get(setting, ()):
            if name not in values["models"]:
                known = ", ".join(values["models"])
                raise SettingsError(
                    f"{_OPTIONS[setting]}: there is no model {name!r}; the models are {known}"
                )
    for setting in ("tls_cert", "tls_key"):
        if setting not in values and any(name.startswith("tls_") for name in values):
            given = ", ".join(_OPTIONS[name] for name in values if name.startswith("tls_"))
            raise SettingsError(f"{_OPTIONS[setting]}: must be given with {given}")
    if values.get("store") == "memory":
        values["data_dir"] = Path()  # of no use, and its default may not be there
    settings = Settings(**values)
    held, message = settings.max_held_bytes, settings.max_message_bytes
    if held is not None and held < message:
        raise SettingsError(
            f"--max-held-bytes must be at least --max-message-bytes, which is {message}; got {held}"
        )
    return settings


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsError(message)


def _parser(prog: str, *, explain: bool) -> argparse.ArgumentParser:
    """A parser that collects texts; reading them is the same for options and variables."""
    help_of = _docstrings() if explain else dict.fromkeys(_FIELDS, "")
    parser = _Parser(
        prog=prog,
        allow_abbrev=False,
        description="Serve recurrent Keras models, one state per session, over gRPC.",
        epilog="Each option has an environment variable, named in its help; the command line wins.",
    )
    for name, field in _FIELDS.items():
        metavar = field.metadata["metavar"]
        text = f"{help_of[name]} [{variable_of(name)}]".replace("%", "%%")
        if name == "models":
            parser.add_argument(name, nargs="*", metavar=metavar, help=text)
        else:
            action = "append" if "several" in field.metadata else "store"
            parser.add_argument(_OPTIONS[name], dest=name, action=action, metavar=metavar, help=text)
    parser.add_argument("--version", action="version", version=_version() if explain else "")
    return parser


def _docstrings() -> dict[str, str]:
    """The docstring under each field, with its default. Read from the source, and only when help is asked for."""
    import ast
    import inspect

    body = ast.parse(inspect.getsource(Settings)).body[0]
    assert isinstance(body, ast.ClassDef)
    texts: dict[str, str] = {}
    for node, following in zip(body.body, body.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            assert isinstance(following, ast.Expr)
            assert isinstance(following.value, ast.Constant)
            texts[node.target.id] = str(following.value.value) + _default_text(node.target.id)
    return texts


def _default_text(name: str) -> str:
    default = _FIELDS[name].default
    return "" if default in (None, dataclasses.MISSING) else f" Default: {default}."


def _version() -> str:
    from importlib import metadata

    return f"stepwell {metadata.version('stepwell')}"
