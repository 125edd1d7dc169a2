"""Chooses the front of a server: the native one if it is installed and compatible, else the Python one."""

from __future__ import annotations

import dataclasses
from importlib import metadata
from typing import TYPE_CHECKING

from stepwell import _install
from stepwell_server.errors import StartError
from stepwell_server.rpc.fronts.base import OtherFront

if TYPE_CHECKING:
    from stepwell_server.rpc.fronts.native import NativeFront

HOW = f"for the native front, install cargo (https://rustup.rs) and run: {_install.advice(_install.NATIVE_FRONT)}"
"""How to get the native front, for the end of a sentence."""
HINT = f"slower, this machine only; for the native one: {_install.NATIVE_FRONT}, {_install.IN_A_CLONE}"
"""A short version, for the ready line of a server."""


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """The front of a server."""

    native: type[NativeFront] | None
    """None: use the Python front."""
    problem: str = ""
    """Why the Python front is used although `--front` does not ask for it; else empty."""

    @property
    def name(self) -> str:
        """`native` or `python`."""
        return "python" if self.native is None else "native"

    @property
    def advice(self) -> str:
        """The problem and how to get the native front; empty if there is no problem."""
        return f"{self.problem}; {HOW}" if self.problem else ""


def choose(option: str) -> Choice:
    """Return the front for a value of `--front`.

    Raises:
        StartError: the option is `native`, but the native front cannot be used.
    """
    if option == "python":
        return Choice(None)
    native, problem = _installed()
    if native is None and option == "native":
        raise StartError(f"--front native: {problem}; {HOW}")
    return Choice(native, problem)


def _installed() -> tuple[type[NativeFront] | None, str]:
    """Return the native front, or the reason why it cannot be used."""
    try:
        from stepwell_server.rpc.fronts.native import VERSION, NativeFront
    except OtherFront as error:
        return None, str(error)
    except ModuleNotFoundError as error:
        return None, "stepwell-front is not installed" if error.name == "stepwell_front" else _broken(error)
    except ImportError as error:
        # from a wheel without the compiled module, which explains the reason itself
        return None, str(error) if error.name == "stepwell_front" else _broken(error)
    own = metadata.version("stepwell")
    if own != VERSION:
        return None, f"stepwell-front must have the version of stepwell, {own}; {VERSION} is installed"
    return NativeFront, ""


def _broken(error: ImportError) -> str:
    return f"stepwell-front cannot be imported: {error}"
