"""Install programs that tests and the demo of a cluster run, where they are missing and we may: Valkey, promtool.

They are Debian's packages; elsewhere, or without root, it says what to install. Debian would start a server when its
package is installed: it is kept from that. Exit codes: 0 they are there, 1 they are not.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = {
    "valkey-server": "the tests of replicas",
    "valkey-sentinel": "the tests of replicas",
    "promtool": "the tests of alert rules",
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
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        print(
            f"{_failing(wanted)}. Install Valkey 7.2 or newer and Prometheus's promtool;"
            f" on Debian, as root: apt-get install {' '.join(wanted)}"
        )
        return 1
    print(f"Installing Debian's packages {', '.join(wanted)}", flush=True)
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "--yes", "--quiet=2", "--no-install-recommends", *wanted]
    with no_services():
        for step in (install, ["apt-get", "update", "--quiet=2"], install):
            subprocess.run(step, env=quiet, stdout=subprocess.DEVNULL, check=False)
            if not missing():
                return 0
    print(f"{_failing(missing())}: they could not be installed, see above")
    return 1


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
