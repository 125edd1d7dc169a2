"""Several servers that share a Valkey: replicas, as processes of their own, each with a port that it keeps.

with Valkey() as valkey, Replicas(valkey.url(), 3) as replicas:
    replicas.addresses, replicas[1].kill(), replicas[1].start(), replicas[2].pause(), replicas[2].resume()
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from support.secured import Server
from support.servers.fault_servers import arguments
from support.servers.valkey_servers import until

_FAULTY = Path(__file__).with_name("faulty_replica.py")


class Replica(Server):
    """One of them. `defect` is one of faulty_replica.DEFECTS, empty: none."""

    def __init__(self, url: str, *extra: str, defect: str = "") -> None:
        super().__init__(**arguments(None, extra))
        self._store = ["--store", url]
        self._defect = defect

    def pause(self) -> None:
        """Let it do nothing; its connections stay open. Returns when it has stopped."""
        os.kill(self._running(), signal.SIGSTOP)
        stat = Path(f"/proc/{self._running()}/stat")
        until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "it does not stop", self.logs)

    def resume(self) -> None:
        """Let it go on."""
        os.kill(self._running(), signal.SIGCONT)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Let it do nothing within the block."""
        self.pause()
        try:
            yield
        finally:
            self.resume()

    def _command(self) -> list[str]:
        python, module, name, *arguments = super()._command()
        if not self._defect:
            return [python, module, name, *arguments]
        return [python, os.fspath(_FAULTY), self._defect, *arguments]

    def _running(self) -> int:
        assert self.pid is not None, "it does not run"
        return self.pid


class Replicas:
    """This many of them, started at the same time. Leaving the block ends them.

    Args:
        urls: of the Valkey, the same for all or one for each.
        count: how many.
        extra: further options of `stepwell serve`.
        defect: of each, see `Replica`.
    """

    def __init__(self, urls: str | Sequence[str], count: int, *extra: str, defect: str = "") -> None:
        each = [urls] * count if isinstance(urls, str) else list(urls)
        assert len(each) == count, f"{count} replicas need as many URLs; got {len(each)}"
        self._all = [Replica(url, *extra, defect=defect) for url in each]
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            for one in self._all:
                stack.callback(self._end, one)
            # The first one makes the store, if it is new; all at once is for them to get right.
            with ThreadPoolExecutor(len(self._all)) as pool:
                list(pool.map(Replica.start, self._all))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def __getitem__(self, index: int) -> Replica:
        return self._all[index]

    def __iter__(self) -> Iterator[Replica]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    @property
    def addresses(self) -> list[str]:
        """Of each."""
        return [one.address for one in self._all]

    @property
    def address(self) -> str:
        """Of all, as clients take it."""
        return ",".join(self.addresses)

    def logs(self) -> str:
        """What each has written in its last life."""
        return "\n".join(f"--- replica {i}\n{one.logs()}" for i, one in enumerate(self._all))

    @staticmethod
    def _end(one: Replica) -> None:
        if one.pid is not None:
            one.kill()
