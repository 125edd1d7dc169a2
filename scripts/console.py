"""Build the console's bundle with npm and esbuild, or check that the committed one is fresh and small.

    scripts/console.py            build console/ into server/stepwell_server/console/dist/
    scripts/console.py --check    exit 1 if the bundle is stale or too large

Without npm, or where npm does not reach its packages, the check compares the sources with the digest that the last
build recorded.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "console"
BUNDLE = ROOT / "server" / "stepwell_server" / "console" / "dist"
DIGEST = "sources.sha256"
MAX_GZIPPED_BYTES = 200_000
PINNED = ("package.json", "package-lock.json", "build.mjs", "tsconfig.json")
BUILD = "run `make console`, and commit the result"


def digest() -> str:
    """Return a digest of everything that the bundle is made of."""
    found = hashlib.sha256()
    sources = sorted(path for path in (SOURCES / "src").rglob("*") if path.is_file())
    for path in [*(SOURCES / name for name in PINNED), *sources]:
        found.update(f"{path.relative_to(SOURCES)}\0".encode() + path.read_bytes() + b"\0")
    return found.hexdigest()


def install() -> None:
    """Install the packages of the lock file.

    Raises:
        LookupError: there is no npm, or it does not reach its packages.
    """
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        raise LookupError("node and npm are not installed")
    wanted = hashlib.sha256((SOURCES / "package-lock.json").read_bytes()).hexdigest()
    stamp = SOURCES / "node_modules" / ".installed"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    # esbuild's own script only makes its first start faster
    command = [npm, "ci", "--ignore-scripts", "--silent", "--fetch-retries=1", "--fetch-timeout=30000"]
    try:
        subprocess.run(command, cwd=SOURCES, check=True)
    except subprocess.CalledProcessError as error:
        raise LookupError(f"npm cannot install the packages ({error})") from error
    stamp.write_text(wanted)


def build(folder: Path) -> None:
    """Check the types, and build into a folder."""
    subprocess.run([SOURCES / "node_modules" / ".bin" / "tsc"], cwd=SOURCES, check=True)
    subprocess.run(["node", "build.mjs", folder], cwd=SOURCES, check=True)
    (folder / DIGEST).write_text(f"{digest()}\n")


def findings() -> Iterator[str]:
    """Yield what is wrong with the committed bundle."""
    gzipped = sum(
        len(gzip.compress((BUNDLE / name).read_bytes()))
        for name in ("index.html", "console.js", "console.css")
    )
    print(f"the console has {gzipped:,} bytes gzipped, {MAX_GZIPPED_BYTES:,} at most")
    if gzipped > MAX_GZIPPED_BYTES:
        yield f"the console must have at most {MAX_GZIPPED_BYTES:,} bytes gzipped; has {gzipped:,}"
    if (BUNDLE / DIGEST).read_text().strip() != digest():
        yield f"the console's bundle is not made from these sources: {BUILD}"
    try:
        install()
    except LookupError as error:
        print(f"not built: {error}")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder)
        for path in sorted(folder.iterdir()):
            if not (BUNDLE / path.name).exists() or path.read_bytes() != (BUNDLE / path.name).read_bytes():
                yield f"{path.name} of the console is not what its sources make: {BUILD}"
    subprocess.run(["node", "build.mjs", "--test"], cwd=SOURCES, check=True)


def main() -> int:
    """Build, or check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="check the committed bundle")
    with contextlib.suppress(subprocess.CalledProcessError):
        if parser.parse_args().check:
            found = list(findings())
            print("\n".join(found))
            return 1 if found else 0
        try:
            install()
        except LookupError as error:
            print(f"the console cannot be built: {error}", file=sys.stderr)
            return 1
        build(BUNDLE)
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
