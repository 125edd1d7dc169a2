"""The types of values that settings have, as they are written on the command line, in variables and in the config file."""

from __future__ import annotations

import glob
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem
from typing_extensions import override

from stepwell.cli._types import ParamType
from stepwell_server.addresses import Address, UnixAddress
from stepwell_server.core.model_names import NAME_RULE, VERSION_RULE, is_name, parse_reference
from stepwell_server.core.version_policy import POLICY_RULE, VersionPolicy
from stepwell_server.settings import expanded
from stepwell_server.store.valkey.connection.url import UrlError, is_store_url
from stepwell_server.store.valkey.connection.url import parse as parse_store_url

_MOST = 10**18
_LONGEST_SOCKET_PATH = 107
"""Bytes that Linux has room for."""


class Text(ParamType):
    """A value that is read from a text. Of several in one variable there are commas between them."""

    rule = ""
    """What the text must be."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read it; what has been read already stays."""
        if not isinstance(value, str):
            return value
        try:
            return self.read(value)
        except ValueError as error:
            self.fail(f"must be {str(error) or self.rule}; got {value!r}", param, ctx)

    def read(self, text: str) -> Any:
        """The value of a text.

        Raises:
            ValueError: it has none. The message says what it must be, if that is not `rule`.
        """
        raise NotImplementedError

    @override
    def split_envvar_value(self, rv: str) -> Sequence[str]:
        return [item.strip() for item in rv.split(",")]


class TcpAddress(Text):
    """HOST:PORT, as an `Address`."""

    name = "address"
    rule = "HOST:PORT, or [HOST]:PORT for IPv6, with a port from 0 to 65535"

    @override
    def read(self, text: str) -> Address:
        host, _, port = text.rpartition(":")
        bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        if (
            not bare
            or not re.fullmatch(r"\d{1,5}", port)
            or int(port) > 65535
            or (":" in bare) is (bare == host)
        ):
            raise ValueError
        return Address(bare, int(port))


class Url(Text):
    """http://HOST:PORT or https://HOST:PORT, perhaps with a path."""

    name = "url"
    rule = "http://HOST:PORT or https://HOST:PORT"

    @override
    def read(self, text: str) -> str:
        if not re.fullmatch(
            r"https?://[^\s/:@]+(:\d{1,5})?(/\S*)?|https?://\[[0-9a-fA-F:.]+\](:\d{1,5})?(/\S*)?", text
        ):
            raise ValueError
        return text


class AddressOrOff(TcpAddress):
    """HOST:PORT as an `Address`, or "off"."""

    rule = f"{TcpAddress.rule}, or off"

    @override
    def read(self, text: str) -> Address | str:  # type: ignore[override]
        return text if text == "off" else super().read(text)


class AnyAddress(TcpAddress):
    """HOST:PORT or unix:PATH, as an `Address` or a `UnixAddress`."""

    rule = f"{TcpAddress.rule}, or unix:PATH"

    @override
    def read(self, text: str) -> Address | UnixAddress:  # type: ignore[override]
        kind, _, path = text.partition(":")
        if kind != "unix":
            return super().read(text)
        if path.startswith("//"):  # a URL; without a host, so that a third slash begins the path
            path = path[2:] if path.startswith("///") else ""
        path = os.path.abspath(path) if path and "\0" not in path else ""
        if not path or len(os.fsencode(path)) > _LONGEST_SOCKET_PATH:
            raise ValueError(
                f"unix:PATH or unix:///PATH, the path made absolute of at most {_LONGEST_SOCKET_PATH} bytes"
            )
        return UnixAddress(path)


class PathOf(Text):
    """A path; ~ is a home.

    Args:
        what: "file" or "dir", for shells that complete it.
    """

    def __init__(self, what: str) -> None:
        self.name = what

    @override
    def read(self, text: str) -> Path:
        try:
            if text:
                return expanded(text)
        except LookupError as error:
            raise ValueError(f"a path that can be found: {error}") from None
        raise ValueError("a path")

    def shell_complete(
        self,
        ctx: click.Context,  # noqa: ARG002 - click's signature
        param: click.Parameter,  # noqa: ARG002
        incomplete: str,
    ) -> list[CompletionItem]:
        """Leave it to the shell."""
        return [CompletionItem(incomplete, type=self.name)]


class StorePlace(PathOf):
    """A path, or the URL of a store that several servers share."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A `Path` or a `StoreUrl`."""
        if not isinstance(value, str) or not is_store_url(value):
            return super().convert(value, param, ctx)
        try:
            return parse_store_url(value)
        except UrlError as error:
            self.fail(str(error), param, ctx)


class StoreFolder(PathOf):
    """The folder of one server's store."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read it. What is refused is not repeated: a URL may have a password."""
        if isinstance(value, str) and is_store_url(value):
            self.fail(
                "must be the data directory of one server; got the URL of a store that servers share: docs/valkey.md says "
                "what is done with those",
                param,
                ctx,
            )
        return super().convert(value, param, ctx)


class DataFile(PathOf):
    """A file of sequences that exists."""

    @override
    def read(self, text: str) -> Path:
        file = super().read(text)
        if file.suffix not in {".npy", ".npz"} or not file.is_file():
            raise ValueError("an .npy or .npz file that exists")
        return file


class ModelName(Text):
    """The name of a model."""

    name = "name"
    rule = f"the name of a model, {NAME_RULE}"

    @override
    def read(self, text: str) -> str:
        if not is_name(text):
            raise ValueError
        return text


class ModuleName(Text):
    """The name of a module of Python."""

    name = "module"
    rule = "the name of a module"

    @override
    def read(self, text: str) -> str:
        if not all(word.isidentifier() for word in text.split(".")):
            raise ValueError
        return text


class FunctionName(Text):
    """MODULE:FUNCTION."""

    name = "function"
    rule = "MODULE:FUNCTION"

    @override
    def read(self, text: str) -> str:
        module, _, function = text.partition(":")
        if not all(word.isidentifier() for word in (*module.split("."), *function.split("."))):
            raise ValueError
        return text


class Policy(Text):
    """A policy of versions."""

    name = "policy"

    @override
    def read(self, text: str) -> VersionPolicy:
        try:
            return VersionPolicy.parse(text)
        except ValueError:
            raise ValueError(POLICY_RULE) from None

    def split_envvar_value(self, rv: str) -> Sequence[str]:
        """At commas, but for those between numbers: they belong to one value."""
        return [item.strip() for item in re.split(r",(?!\s*\d+\s*(?:,|$))", rv)]


class Share(Text):
    """A number from 0 to 1."""

    name = "float"
    rule = "a number from 0 to 1"

    @override
    def read(self, text: str) -> float:
        try:
            share = float(text)
        except ValueError:
            share = math.nan
        if not 0 <= share <= 1:  # nan is none of these
            raise ValueError
        return share


class WholeNumber(Text):
    """A whole number of at least 1, as the value of `PerModel`."""

    name = "integer"
    rule = f"a whole number from 1 to {_MOST}"

    @override
    def read(self, text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,19}", text) or not 1 <= int(text) <= _MOST:
            raise ValueError(self.rule)
        return int(text)


class Collected(Text):
    """Several values that become a dict."""

    def collected(
        self, pairs: Sequence[tuple[str, Any]], param: click.Parameter, ctx: click.Context
    ) -> dict[str, Any]:
        """All of them, each name once."""
        raise NotImplementedError


class PerModel(Collected):
    """A value for all models, which has the empty name, or NAME=VALUE for one of them.

    Args:
        form: How the value is written, such as "POLICY".
        of: What it is.
    """

    name = "per model"

    def __init__(self, form: str, of: Text) -> None:
        self.form = form
        self.of = of

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, Any]:
        """Read the name, if there is one, and have the value read."""
        name, equals, text = value.rpartition("=")
        if equals and not is_name(name):
            self.fail(f"must be {self.form} or NAME={self.form} with {NAME_RULE}; got {value!r}", param, ctx)
        try:
            return name, self.of.read(text)
        except ValueError as error:
            self.fail(f"must be {self.form} or NAME={self.form} with {error}; got {value!r}", param, ctx)

    @override
    def collected(
        self, pairs: Sequence[tuple[str, Any]], param: click.Parameter, ctx: click.Context
    ) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, value in pairs:
            if name in values:
                whose = f"for {name!r}" if name else "for all models"
                self.fail(f"must be given once for each name; got it twice {whose}", param, ctx)
            values[name] = value
        return values

    def split_envvar_value(self, rv: str) -> Sequence[str]:
        """As the values are split."""
        return self.of.split_envvar_value(rv)


class Named(Collected):
    """NAME=VALUE with the name of a model; several become a dict.

    Args:
        form: How it is written, such as "NAME=PATH".
        of: What the value is.
        versions: It may be NAME@VERSION too.
    """

    name = "named"

    def __init__(self, form: str, of: ParamType, *, versions: bool = False) -> None:
        self.form = form
        self.of = of
        self._versions = versions

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, Any]:
        """Read the name, and have the value read."""
        name, _, text = value.partition("=")
        if not text:
            example = (
                f", such as {Path(value).stem}={value}" if value.endswith((".keras", ".stepwell")) else ""
            )
            self.fail(f"must be {self.form}{example}; got {value!r}", param, ctx)
        if not self._is_name(name):
            version = f", or NAME@VERSION with {VERSION_RULE}" if self._versions else ""
            self.fail(f"must be {self.form} with {NAME_RULE}{version}; got {value!r}", param, ctx)
        try:
            return name, self.of.convert(text, param, ctx)
        except click.BadParameter as error:
            self.fail(f"{value!r}: {error.message}", param, ctx)

    def _is_name(self, text: str) -> bool:
        if not self._versions:
            return is_name(text)
        try:
            return parse_reference(text).label is None
        except ValueError:
            return False

    @override
    def collected(
        self, pairs: Sequence[tuple[str, Any]], param: click.Parameter, ctx: click.Context
    ) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, value in pairs:
            if name in values:
                self.fail(f"must be {self.form} with different names; got {name!r} twice", param, ctx)
            values[name] = value
        return values

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Files after the name. Where the shell takes NAME= for a part of the word, they are found here."""
        name, equals, begun = incomplete.partition("=")
        if not isinstance(self.of, PathOf):
            return []
        if not equals:
            return self.of.shell_complete(ctx, param, incomplete)
        found = sorted(glob.glob(f"{glob.escape(begun)}*"))
        return [
            CompletionItem(f"{name}={path}{'/' if os.path.isdir(path) else ''}", type="plain")
            for path in found
        ]
