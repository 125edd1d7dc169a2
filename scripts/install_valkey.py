"""Install Valkey's programs for the tests and the demo of a cluster, where they are missing and we may.

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

PROGRAMS = ("valkey-server", "valkey-sentinel")
"""Also the names of their packages."""
POLICY = Path("/usr/sbin/policy-rc.d")
#: Debian asks this program whether a package may start its services; 101: no.
DENY = "#!/bin/sh\nexit 101\n"


def main() -> int:
    """Returns the exit code."""
    if not missing():
        return 0
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        print(
            f"{' and '.join(missing())} missing: the tests of replicas will fail. Install Valkey 7.2 or newer;"
            f" on Debian, as root: apt-get install {' '.join(PROGRAMS)}"
        )
        return 1
    print(f"Installing Debian's packages {' and '.join(PROGRAMS)}", flush=True)
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "--yes", "--quiet=2", "--no-install-recommends", *PROGRAMS]
    with no_services():
        for step in (install, ["apt-get", "update", "--quiet=2"], install):
            subprocess.run(step, env=quiet, stdout=subprocess.DEVNULL, check=False)
            if not missing():
                return 0
    print(f"{' and '.join(missing())} could not be installed, see above: the tests of replicas will fail")
    return 1


def missing() -> list[str]:
    """The programs that are not there."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


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
