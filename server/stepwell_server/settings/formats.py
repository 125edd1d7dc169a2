"""How values of settings are written: on the command line, in environment variables and in the config file."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from stepwell._base.units import MAX_BYTES, parse_bytes, parse_seconds, size_text
from stepwell_server.addresses import Address, UnixAddress
from stepwell_server.core.model_names import NAME_RULE, VERSION_RULE, is_name, version_of
from stepwell_server.core.version_policy import POLICY_RULE, VersionPolicy
from stepwell_server.store.valkey.connection.url import StoreUrl, UrlError
from stepwell_server.store.valkey.connection.url import parse as parse_store_url

MAX_COUNT = 10**18
MAX_INT32 = 2**31 - 1
"""The maximum size of a protobuf message, and the largest value of a gRPC option."""
_MAX_SOCKET_PATH_BYTES = 107
"""Limit of Linux."""
Types = tuple[type, ...]
_TEXT: Types = (str,)
_NUMBER: Types = (int, float, str)
_FLAG: Types = (bool,)
_KINDS = {
    _TEXT: "a non-empty string",
    _NUMBER: "a number or a non-empty string",
    _FLAG: "true or false",
}
"""The rule for a value of the config file, by its allowed types."""
_FLAGS = dict.fromkeys(("1", "true", "t", "yes", "y", "on"), True)
_FLAGS |= dict.fromkeys(("0", "false", "f", "no", "n", "off"), False)
_URL = re.compile(r"https?://[^\s/:@]+(:\d{1,5})?(/\S*)?|https?://\[[0-9a-fA-F:.]+\](:\d{1,5})?(/\S*)?")
_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:\d{1,5})?")
_NAMES = r"[^\W\d]\w*(\.[^\W\d]\w*)*"
_DOTTED, _FUNCTION = re.compile(_NAMES), re.compile(f"{_NAMES}:{_NAMES}")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


@dataclasses.dataclass(frozen=True)
class Format:
    """How one value is written."""

    repeats: ClassVar[bool] = False
    """Whether the option may be repeated."""

    form: str
    """Name of a value in help texts."""
    rule: str
    """The rule for a text, which follows "must be" in a message."""
    parse: Callable[[str], Any]
    """Returns the value of a text. Raises ValueError, with the broken rule if that is not `rule`."""
    write: Callable[[Any], str] = str
    """Returns the text of a value."""
    types: Types = _TEXT
    """Allowed types in the config file."""
    resolve: Callable[[str, Path], str] = lambda text, _folder: text
    """Makes a path in a text absolute. A relative path begins at the given folder."""
    completes: str | Sequence[str] = ()
    """Completions in shells: "file", "dir" or a list of words."""
    separator: str = ","
    """Pattern that separates several values in an environment variable."""

    def read(self, text: str) -> Any:
        """Return the value of a text.

        Raises:
            ValueError: the text cannot be read. The message is "must be ...; got ...".
        """
        try:
            return self.parse(text)
        except UrlError:  # its message hides the password that the text may contain
            raise
        except ValueError as error:
            raise ValueError(f"must be {str(error) or self.rule}; got {text!r}") from None

    def read_all(self, texts: Sequence[str]) -> Any:
        """Return the value of an option that is given with these texts. The last one counts.

        Raises:
            ValueError: see `read`.
        """
        return self.read(texts[-1])

    def split(self, text: str) -> list[str]:
        """Return the texts in an environment variable."""
        return [text]

    def texts(self, value: object, folder: Path) -> list[str]:
        """Return the texts of a value in a config file of this folder.

        Raises:
            ValueError: the value has a wrong type. The message is "must be ...; got ...".
        """
        if type(value) not in self.types or value == "":
            raise ValueError(f"must be {_KINDS[self.types]}; got {value!r}")
        return [self.resolve(value if isinstance(value, str) else json.dumps(value), folder)]

    def toml(self, value: Any) -> str:
        """Return the value as TOML."""
        text = self.write(value)
        return quoted(text) if self.types is _TEXT or text.endswith("B") else text


class Several:
    """Several values of one format: a list in the config file, separated by commas in a variable."""

    repeats = True

    def __init__(self, of: Format) -> None:
        self.of = of
        self.form = of.form

    def read_all(self, texts: Sequence[str]) -> tuple[Any, ...]:
        """Return all values."""
        return tuple(map(self.of.read, texts))

    def split(self, text: str) -> list[str]:
        """Return the texts in an environment variable."""
        return [item.strip() for item in re.split(self.of.separator, text)]

    def texts(self, value: object, folder: Path) -> list[str]:
        """Return the texts of a list."""
        if not isinstance(value, list):
            raise ValueError(f"must be a list; got {value!r}")
        return [text for item in value for text in self.of.texts(item, folder)]

    def toml(self, value: Any) -> str:
        """Return a list."""
        return f"[{', '.join(map(self.of.toml, value))}]"


class Table(Several):
    """Values by name, as NAME=VALUE: a table in the config file.

    Args:
        of: Format of the values.
        is_name: Whether a text is a valid name.
        rule: The rule for names, in words.
        common: Whether a VALUE without a name is allowed, for all other names. It is stored under the empty name.
    """

    def __init__(
        self,
        of: Format,
        *,
        is_name: Callable[[str], bool] = is_name,
        rule: str = NAME_RULE,
        common: bool = False,
    ) -> None:
        super().__init__(of)
        self.form = f"{of.form}|NAME={of.form}" if common else f"NAME={of.form}"
        self._is_name = is_name
        self._rule = rule
        self._common = common

    def read_all(self, texts: Sequence[str]) -> Any:
        """Return the values by name."""
        values: dict[str, Any] = {}
        for text in texts:
            try:
                name, value = self._parse(text)
            except ValueError as error:
                form = self.form.replace("|", " or ")
                raise ValueError(f"must be {form}{error}; got {text!r}") from None
            if name in values:
                scope = f"for {name!r}" if name else "for all models"
                raise ValueError(f"must be given once for each name; got two values {scope}")
            values[name] = value
        return values

    def texts(self, value: object, folder: Path) -> list[str]:
        """Return the texts of a table. If names are optional, also those of a list or of one value."""
        if isinstance(value, dict):
            return [f"{name}={text}" for name, item in value.items() for text in self.of.texts(item, folder)]
        if not self._common:
            raise ValueError(f"must be a table of names and values; got {value!r}")
        return super().texts(value if isinstance(value, list) else [value], folder)

    def toml(self, value: Any) -> str:
        """Return the lines of a table, or one value or a list if a value has no name."""
        if value.keys() == {""}:
            return self.of.toml(value[""])
        if "" in value:
            texts = (f"{name}={item}" if name else str(item) for name, item in value.items())
            return f"[{', '.join(map(quoted, texts))}]"
        return "\n".join(f"{key(name)} = {self.of.toml(item)}" for name, item in value.items())

    def _parse(self, text: str) -> tuple[str, Any]:
        name, equals, rest = text.rpartition("=") if self._common else text.partition("=")
        if not rest and not self._common:
            is_model = text.endswith((".keras", ".onnx", ".stepwell"))
            raise ValueError(f", such as {Path(text).stem}={text}" if is_model else "")
        if (equals or not self._common) and not self._is_name(name):
            raise ValueError(f" with {self._rule}")
        try:
            return name, self.of.parse(rest)
        except ValueError as error:
            raise ValueError(f" with {str(error) or self.of.rule}") from None


def checked(form: str, rule: str, keeps: Callable[[str], object], completes: Sequence[str] = ()) -> Format:
    """Format of a text that must satisfy a rule."""

    def parse(text: str) -> str:
        if not keeps(text):
            raise ValueError
        return text

    return Format(form, rule, parse, completes=completes)


def choice(*words: str) -> Format:
    """Format of one of several words."""
    return checked(f"[{'|'.join(words)}]", f"one of {', '.join(words)}", words.__contains__, words)


def count(smallest: int = 1, largest: int = MAX_COUNT) -> Format:
    """Format of a whole number."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,19}", text) or not smallest <= int(text) <= largest:
            raise ValueError
        return int(text)

    return Format("N", f"a whole number from {smallest} to {largest}", parse, types=_NUMBER)


def seconds(smallest: float = 0.0, largest: float = math.inf) -> Format:
    """Format of a time: a number of seconds, or a number with units."""
    return Format("TIME", "", lambda text: parse_seconds(text, smallest, largest), "{:.15g}".format, _NUMBER)


def size(smallest: int = 1, largest: int = MAX_BYTES) -> Format:
    """Format of a size: a number of bytes, or a number with a unit."""
    return Format("SIZE", "", lambda text: parse_bytes(text, smallest, largest), size_text, _NUMBER)


def file_path(form: str = "FILE", parse: Callable[[str], Path] | None = None) -> Format:
    """Format of the path of a file. ~ stands for a home folder."""
    return Format(form, "a path", parse or parse_path, write_path, resolve=resolve_path, completes="file")


def parse_path(text: str) -> Path:
    """Read a path."""
    if not text:
        raise ValueError
    try:
        return expanded(text)
    except LookupError as error:
        raise ValueError(f"a path that exists: {error}") from None


def write_path(path: Path) -> str:
    """Return the absolute path, or - for standard error."""
    return str(path) if str(path) == "-" else str(path.absolute())


def resolve_path(text: str, folder: Path) -> str:
    """Return the absolute path of a path in a config file of this folder."""
    return text if text == "-" or text.startswith("~") else str(folder.absolute() / text)


def is_version(text: str) -> bool:
    """Whether a text is NAME or NAME@VERSION."""
    name, at, version = text.partition("@")
    return is_name(name) and (not at or version_of(version) is not None)


def _parse_data_file(text: str) -> Path:
    file = parse_path(text)
    if file.suffix not in {".npy", ".npz"} or not file.is_file():
        raise ValueError("an .npy or .npz file that exists")
    return file


def _parse_share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:  # nan is none of these
        raise ValueError
    return share


def _parse_flag(text: str) -> bool:
    if text.lower() not in _FLAGS:
        raise ValueError
    return _FLAGS[text.lower()]


def _parse_policy(text: str) -> VersionPolicy:
    try:
        return VersionPolicy.parse(text)
    except ValueError:
        raise ValueError from None


def _parse_tcp(text: str) -> Address:
    host, _, port = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if (
        not bare
        or not re.fullmatch(r"[0-9]{1,5}", port)
        or int(port) > 65535
        or (":" in bare) is (bare == host)
    ):
        raise ValueError
    if bare == "*":  # the C library takes it for loopback
        raise ValueError(f"{_TCP_RULE}; 0.0.0.0 and [::] are all interfaces")
    return Address(bare, int(port))


def _parse_listen(text: str) -> Address | UnixAddress:
    kind, _, path = text.partition(":")
    if kind != "unix":
        return _parse_tcp(text)
    if path.startswith("//"):  # a URL without a host: the third slash begins the path
        path = path[2:] if path.startswith("///") else ""
    path = os.path.abspath(path) if path and "\0" not in path else ""
    if not path or len(os.fsencode(path)) > _MAX_SOCKET_PATH_BYTES:
        limit = f"with an absolute path of at most {_MAX_SOCKET_PATH_BYTES} bytes"
        raise ValueError(f"unix:PATH or unix:///PATH, {limit}")
    return UnixAddress(path)


def _resolve_listen(text: str, folder: Path) -> str:
    kind, _, path = text.partition(":")
    is_relative = kind == "unix" and path and not path.startswith("/")
    return f"unix:{folder.absolute() / path}" if is_relative else text


def _parse_store(text: str) -> StoreUrl | str:
    if "://" in text:
        return parse_store_url(text)
    if text not in {"disk", "memory"}:
        got = "a text with '@'" if "@" in text else repr(text)  # perhaps a mistyped URL with a password
        raise UrlError(f"must be disk, memory, or the URL of a Valkey such as valkey://HOST/0; got {got}")
    return text


_TCP_RULE = "HOST:PORT, or [HOST]:PORT for IPv6, with a port from 0 to 65535"

TEXT, CLAIM = Format("TEXT", "", str), checked("NAME", "the name of a claim", bool)
MODELS = Table(
    file_path("PATH"), is_name=is_version, rule=f"{NAME_RULE}, or NAME@VERSION with {VERSION_RULE}"
)
FLAG = Format("", "true or false", _parse_flag, lambda value: str(value).lower(), _FLAG)
COUNT, SECONDS = count(), seconds()
SHARE = Format("RATIO", "a number from 0 to 1", _parse_share, "{:.15g}".format, _NUMBER)
FILE, DATA_FILE = file_path(), file_path("FILE.npy", _parse_data_file)
FOLDER = dataclasses.replace(file_path("DIR"), completes="dir")
LISTEN = Format("ADDRESS", f"{_TCP_RULE}, or unix:PATH", _parse_listen, resolve=_resolve_listen)
ADDRESS = Format("HOST:PORT", _TCP_RULE, _parse_tcp)
ADDRESS_OR_OFF = Format(
    "HOST:PORT|off", f"{_TCP_RULE}, or off", lambda text: text if text == "off" else _parse_tcp(text)
)
ORIGIN = checked("ORIGIN", "*, or SCHEME://HOST[:PORT] in lower case, as browsers send it", _ORIGIN.fullmatch)
URL = checked("URL", "http://HOST:PORT or https://HOST:PORT", _URL.fullmatch)
STORE = Format("disk|memory|URL", "", _parse_store, completes=("disk", "memory"))
MODEL_NAME = checked("NAME", f"the name of a model, {NAME_RULE}", is_name)
MODULE = checked("MODULE", "the name of a module", _DOTTED.fullmatch)
FUNCTION = checked("MODULE:FUNCTION", "a module and a function as MODULE:FUNCTION", _FUNCTION.fullmatch)
# Commas between numbers are part of one value.
POLICY = Format("POLICY", POLICY_RULE, _parse_policy, separator=r",(?!\s*\d+\s*(?:,|$))")


def key(name: str) -> str:
    """Return a name as a TOML key."""
    return name if _BARE_KEY.fullmatch(name) else quoted(name)


def quoted(text: str) -> str:
    """Return a text as a TOML basic string: with JSON's escapes, and DEL escaped."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def expanded(text: str) -> Path:
    """Return the path with ~ or ~NAME expanded, because shells expand neither in `--option=~/x`.

    Raises:
        LookupError: there is no such home folder.
    """
    if not text.startswith("~"):
        return Path(text)
    path = os.path.expanduser(text)
    if path.startswith("~") or (text.partition("/")[0] == "~" and os.environ.get("HOME") == ""):
        raise LookupError(f"{text.partition('/')[0]} has no home folder on this machine")
    return Path(path)
