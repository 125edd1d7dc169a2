"""`python -m stepwell_server` as a replica that breaks a rule of a shared store: the proof that the checker would see it.

    faulty_replica.py DEFECT [arguments of the server]

`replica_processes.Replica` starts it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

# A script has its own folder there, not the one of all tests.
sys.path[0] = os.fspath(Path(__file__).parents[2])

from stepwell_server.core import exactly_once  # noqa: E402
from stepwell_server.store.valkey import scripts  # noqa: E402
from support.servers.faulty_server import replace  # noqa: E402

# What is changed here must not be imported before: others would hold it as it was.


def trust_copies() -> None:
    """What is in the arena is answered as it is, whatever other replicas have done since."""
    from stepwell_server.store.base import KNOWN, StoredSession
    from stepwell_server.store.valkey.store import ValkeyStore

    fetch = ValkeyStore.fetch

    async def trusting(
        store: ValkeyStore, ids: Sequence[str], known: Sequence[int] = ()
    ) -> list[StoredSession]:
        found = await fetch(store, ids, known)
        return [KNOWN if stamp else each for stamp, each in zip(known or [0] * len(ids), found, strict=True)]

    replace(ValkeyStore, "fetch", trusting)


def commit_blindly() -> None:
    """A commit writes whatever it has, over whatever is there: two owners both succeed."""
    compared = "if has == sub(follows, 8 * i - 7, 8 * i) then"
    source = scripts.REPLACE.source.replace(compared, "if true then")
    assert source != scripts.REPLACE.source, "the script compares in other words now"
    sha = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest().encode()
    blind = scripts.Script(source, sha)
    replace(scripts, "ALL", tuple(blind if one is scripts.REPLACE else one for one in scripts.ALL))
    replace(scripts, "REPLACE", blind)


def forget_requests() -> None:
    """What was applied already, here or elsewhere, is refused when it is sent again."""
    judge = exactly_once.judge

    def strict(*arguments: Any) -> exactly_once.Verdict | None:
        verdict = judge(*arguments)
        if verdict is None:
            return None
        nobody = np.zeros_like(verdict.replay)
        return dataclasses.replace(verdict, replay=nobody, conflict=verdict.conflict | verdict.replay)

    replace(exactly_once, "judge", strict)


def answer_early() -> None:
    """Every third commit is reported as kept and is not sent."""
    from stepwell_server.store.base import ALL_KEPT
    from stepwell_server.store.valkey.store import ValkeyStore

    apply, count = ValkeyStore.apply, 0

    async def losing(store: ValkeyStore, batch: Any) -> Any:
        nonlocal count
        count += bool(len(batch.puts))
        return ALL_KEPT if len(batch.puts) and count % 3 == 0 else await apply(store, batch)

    replace(ValkeyStore, "apply", losing)


DEFECTS: dict[str, Callable[[], None]] = {
    "trust-copies": trust_copies,
    "commit-blindly": commit_blindly,
    "forget-requests": forget_requests,
    "answer-early": answer_early,
}


def main() -> NoReturn:
    """Break something, then serve."""
    defect, *arguments = sys.argv[1:]
    DEFECTS[defect]()
    from stepwell_server.__main__ import main as serve

    serve(arguments)


if __name__ == "__main__":
    main()
