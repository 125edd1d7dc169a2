"""Install programs that tests and the demo of a cluster run, where they are missing and we may: Valkey, promtool, chromium.

They are Debian's packages; elsewhere, without root, or with STEPWELL_NO_APT set, it says what to install. Debian would
start a server when its package is installed: it is kept from that. Exit codes: 0 they are there, 1 they are not.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import apt_get

PROGRAMS = {
    "valkey-server": "the tests of replicas",
    "valkey-sentinel": "the tests of replicas",
    "promtool": "the tests of alert rules",
    "chromium": "the tests of the console",
}
"""Which tests need them, by the names of the programs, which are also those of their packages."""
POLICY = Path("/usr/sbin/policy-rc.d")
#: Debian asks this program whether a package may start its services; 101: no.
DENY = "#!/bin/sh\nexit 101\n"


def main() -> int:
    """Returns the exit code."""
    wanted = missing()
    if not wanted:
        return 0
    if problem := apt_get.refusal():
        print(
            f"{_failing(wanted)}; {problem}. Install Valkey 7.2 or newer, Prometheus's promtool and"
            f" Chromium; on Debian, as root: apt-get install {' '.join(wanted)}"
        )
        return 1
    with no_services():
        apt_get.install(wanted, what="programs for the tests")
    if wanted := missing():
        print(f"{_failing(wanted)}: they could not be installed, see above")
        return 1
    return 0


def missing() -> list[str]:
    """The programs that are not there."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


def _failing(names: list[str]) -> str:
    tests = " and ".join(sorted({PROGRAMS[name] for name in names}))
    return f"{', '.join(names)} missing: {tests} will fail"


@contextlib.contextmanager
def no_services() -> Iterator[None]:
    """Within the block, packages start no services. A policy that is there already is left alone."""
    if POLICY.exists():
        yield
        return
    POLICY.write_text(DENY)
    POLICY.chmod(0o755)
    try:
        yield
    finally:
        POLICY.unlink()


if __name__ == "__main__":
    sys.exit(main())
