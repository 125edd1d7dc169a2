"""What happens to replicas and their Valkey while clients are at work: one function for each kind of trouble.

Each lets the load run for a random while before and after, so that the moment is anywhere in what is under way, and leaves
everything running.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Iterator

from support.checks.history import Log
from support.load.driver_process import Loading
from support.peers.proxy import Proxy
from support.servers.fault_servers import BEGINS, ENDS, SINCE
from support.servers.replica_processes import Replica, Replicas
from support.servers.valkey_servers import Sentinels, Valkey

LONGER_THAN_ANY_LIMIT_S = 1.5
"""Than attempts of `replica_driver` wait, and than a replica waits for a Valkey whose URL says SHORT."""
SHORT = "timeout_ms=500"
"""Not where replicas of Valkey are waited for: it may take them a second to say what they have on their disk."""
_MAX_CHANGES = 60
_LONGEST_S = 0.05
_REPLICATED_MS = 20_000
_LOOKED_S = 3.0
"""A replica looks every two seconds who is the primary."""


def at_random(load: Loading, chance: random.Random) -> None:
    """Let some changes be acknowledged, and a moment pass."""
    load.wait_acknowledged(chance.randrange(1, _MAX_CHANGES))
    pass_s(chance.uniform(0, _LONGEST_S))


def pass_s(seconds: float) -> None:
    """Let time pass: of what is tested here it is the cause, not something to wait for."""
    threading.Event().wait(seconds)


def kill_replica(
    replicas: Replicas,
    load: Loading,
    chance: random.Random,
    about_to: Callable[[], None] = lambda: None,
) -> Replica:
    """Kill one, let others go on with its sessions, and start it again. Returns it; `about_to` is called before."""
    at_random(load, chance)
    one = chance.choice(list(replicas))
    about_to()
    assert one.kill() == -9, f"it had ended by itself:\n{one.logs()}"
    at_random(load, chance)
    one.start()
    return one


def pause_replica(replicas: Replicas, load: Loading, chance: random.Random) -> None:
    """Stop one for longer than any limit: others go on with its sessions, and then it believes it was never away."""
    at_random(load, chance)
    with chance.choice(list(replicas)).paused():
        pass_s(LONGER_THAN_ANY_LIMIT_S)
        at_random(load, chance)
    at_random(load, chance)


def restart_replicas(replicas: Replicas, load: Loading, chance: random.Random) -> None:
    """One after the other ends in good order and comes back."""
    for one in replicas:
        at_random(load, chance)
        assert one.stop() == 0, one.logs()
        at_random(load, chance)
        one.start()
    at_random(load, chance)


def restart_valkey(valkey: Valkey, load: Loading, chance: random.Random) -> None:
    """It is killed, and comes back with what it has in its file."""
    at_random(load, chance)
    valkey.kill()
    pass_s(chance.uniform(0, 1))
    valkey.start()
    at_random(load, chance)


def pause_valkey(valkey: Valkey, load: Loading, chance: random.Random) -> None:
    """It does nothing for longer than any limit."""
    at_random(load, chance)
    valkey.pause()
    pass_s(LONGER_THAN_ANY_LIMIT_S)
    valkey.resume()
    at_random(load, chance)


@contextlib.contextmanager
def unavailable(valkey: Valkey, how: str) -> Iterator[None]:
    """It is killed meanwhile, or paused, or all is well with it."""
    if how == "kill":
        valkey.kill()
    if how == "pause":
        valkey.pause()
    yield
    if how == "kill":
        valkey.start()
    if how == "pause":
        valkey.resume()


def fail_over(watched: Sentinels, load: Loading, chance: random.Random) -> None:
    """The primary is killed, or paused, or merely replaced; it comes back as a replica.

    Where the servers wait for all replicas of Valkey, nothing is acknowledged before it is back.
    """
    at_random(load, chance)
    old, how = watched.primary(), chance.choice(["kill", "pause", "replace"])
    with unavailable(old, how):
        pass_s(chance.uniform(0, 0.3))
        watched.fail_over()
    watched.wait_ready(len(watched.servers) - 1)
    load.wait_acknowledged(_MAX_CHANGES)
    at_random(load, chance)


def lose(watched: Sentinels, load: Loading, chance: random.Random, log: Log, how: str = "") -> None:
    """A fail-over of a store whose replicas nobody waits for: last writes are lost. It writes down when.

    The old primary is killed, or paused, or merely replaced; then it acknowledges changes for a while that are lost.
    """
    at_random(load, chance)
    old, how = watched.primary(), how or chance.choice(["kill", "pause", "replace", "replace"])
    log.mark(SINCE)
    old.ask("SET", "all before this", "")
    assert old.ask("WAIT", 1, _REPLICATED_MS) >= 1, "the replica does not get what is written"
    at_random(load, chance)
    log.mark(BEGINS)
    with unavailable(old, how):
        watched.fail_over()
    watched.wait_ready(len(watched.servers) - 1)
    pass_s(_LOOKED_S)
    log.mark(ENDS)
    load.wait_acknowledged(_MAX_CHANGES)


def part(ways: list[Proxy], load: Loading, chance: random.Random) -> None:
    """Between one replica and Valkey nothing gets through in one direction or in both, or connections are cut."""
    at_random(load, chance)
    way, how = chance.choice(ways), chance.choice(["requests", "answers", "both", "cut"])
    if how == "cut":
        way.be("refuse")
    if how in ("requests", "both"):
        way.hold("requests")
    if how in ("answers", "both"):
        way.hold("answers")
    pass_s(chance.uniform(0, LONGER_THAN_ANY_LIMIT_S))
    at_random(load, chance)
    way.release()
    way.be("clean")
    at_random(load, chance)
