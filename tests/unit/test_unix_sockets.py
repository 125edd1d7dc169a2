"""The file of a Unix socket: what may be replaced, and what is left alone."""

from __future__ import annotations

import contextlib
import socket
import stat
from pathlib import Path

import pytest

from stepwell_server.rpc.fronts.unix_socket import SocketFile, bind, clear


def test_only_what_nobody_listens_on_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with bind(str(path), 1):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with pytest.raises(OSError, match="in use: a server listens on it"):
            bind(str(path), 1)
        with contextlib.ExitStack() as stack:
            # as many as may wait do: there is no room for one who only wants to know
            with contextlib.suppress(BlockingIOError):
                while True:
                    waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
                    waiting.setblocking(False)
                    waiting.connect(str(path))
            with pytest.raises(OSError, match="in use: a server listens on it"):
                clear(str(path))
    with bind(str(path), 1):
        pass
    path.unlink()
    path.write_text("somebody's")
    with pytest.raises(OSError, match="a file that is not a socket"):
        bind(str(path), 1)
    assert path.read_text() == "somebody's"
    with pytest.raises(OSError, match="its folder does not exist"):
        bind(str(tmp_path / "nowhere" / "socket"), 1)


def test_what_another_server_has_put_there_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with bind(str(path), 1):
        mine = SocketFile(str(path))
    with bind(str(path), 1):
        mine.remove()
        assert path.exists()
        SocketFile(str(path)).remove()
        assert not path.exists()
        mine.remove()
