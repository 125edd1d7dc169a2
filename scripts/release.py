"""Complete a release in dist/, which has the wheels already, and try it in a bare environment.

    python scripts/release.py        after `make wheels`; `make release` runs both

It adds the source distributions of both packages, the bills of materials (CycloneDX: all that a server installs, and
the crates in the native front), the release notes from CHANGELOG.md and the checksums. twine reads what a package index
would show. The bare environment has what `pip install 'stepwell[...]' stepwell-front` takes, from the wheels and from a
package index, at the versions of constraints.txt; scripts/release_check.py steps a session there.

With a tag such as v0.1.0 on the commit, everything that stands against publishing it is an error. Without one the run
is a rehearsal, which lists it.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

from tools import environment

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
#: What the environment of the bill of materials has: all that a server may use.
EXTRAS = "server,otel,valkey"
NOTES = "RELEASE_NOTES.md"
SUMS = "SHA256SUMS"


def main() -> int:
    """Complete the release; the exit code."""
    version = versions()["pyproject.toml"]
    found = list(hindrances(version, (ROOT / "CHANGELOG.md").read_text(), versions(), uncommitted()))
    if tagged(version) and found:
        print(f"v{version} must not be published:", *found, sep="\n  ")
        return 1
    wheels = sorted(DIST.glob("*.whl"))
    if [wheel.name.split("-")[:2] for wheel in wheels] != [
        ["stepwell", version],
        ["stepwell_front", version],
    ]:
        print(f"dist/ must have the wheels of {version}, which `make wheels` builds; it has {wheels}")
        return 1
    step("Source distributions")
    sources = [source_distribution(folder) for folder in (ROOT, ROOT / "server" / "front")]
    step("Package metadata, as a package index reads it")
    programs = environment("release")
    run(programs / "twine", "check", "--strict", *wheels, *sources)
    step("Release notes")
    (DIST / NOTES).write_text(notes(version, (ROOT / "CHANGELOG.md").read_text()))
    with tempfile.TemporaryDirectory(prefix="stepwell-release-") as name:
        step(f"A bare environment: stepwell[{EXTRAS}] and stepwell-front (one to three minutes)")
        python = bare_environment(Path(name), wheels)
        step("Bills of materials")
        bills_of_materials(version, python, programs, wheels[1])
        step("A session in the bare environment")
        run(
            "env",
            "TF_CPP_MIN_LOG_LEVEL=3",
            python,
            "-I",
            ROOT / "scripts" / "release_check.py",
            version,
            cwd=name,
        )
    write_sums()
    print(f"\ndist/ is complete: {', '.join(sorted(path.name for path in DIST.iterdir()))}")
    if found:
        print("A rehearsal. Before it is published:", *found, sep="\n  ")
    return 0


def versions() -> dict[str, str]:
    """The version that each file names."""
    packages = {"pyproject.toml": "project", "server/front/Cargo.toml": "package"}
    return {
        name: tomllib.loads((ROOT / name).read_text())[table]["version"] for name, table in packages.items()
    }


def hindrances(version: str, changelog: str, named: dict[str, str], changed: list[str]) -> Iterator[str]:
    """What must be mended before a version is published, a line each."""
    for name, other in named.items():
        if other != version:
            yield f"{name}: the version must be {version}; got {other}"
    heading = re.search(rf"^## \[{re.escape(version)}\](.*)$", changelog, re.MULTILINE)
    if heading is None:
        yield f"CHANGELOG.md: must have a section ## [{version}]"
    elif not re.fullmatch(r" - \d{4}-\d\d-\d\d", heading[1]):
        yield f"CHANGELOG.md: the section [{version}] must have a date such as 2026-12-01; got {heading[1].removeprefix(' - ')!r}"
    if changed:
        yield f"the tree must have no uncommitted changes; got {', '.join(changed[:5])}"


def uncommitted() -> list[str]:
    """The files that differ from the commit."""
    return git("status", "--porcelain").splitlines()


def tagged(version: str) -> bool:
    """Whether the commit has the tag of this version."""
    return f"v{version}" in git("tag", "--points-at", "HEAD").splitlines()


def git(*arguments: str) -> str:
    """What git prints."""
    return subprocess.run(
        ["git", "-c", "safe.directory=*", *arguments], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout


def notes(version: str, changelog: str) -> str:
    """The section of a version, as a document of its own.

    Raises:
        LookupError: there is none.
    """
    found = re.search(
        rf"^## \[{re.escape(version)}\][^\n]*\n(.*?)(?=^## \[|\Z)", changelog, re.MULTILINE | re.DOTALL
    )
    if found is None:
        raise LookupError(f"CHANGELOG.md has no section [{version}]")
    return f"# Stepwell {version}\n\n{found[1].strip()}\n"


def source_distribution(project: Path) -> Path:
    """Build the sdist of a project with its own backend, which needs nothing that is not here."""
    backend = tomllib.loads((project / "pyproject.toml").read_text())["build-system"]
    code = (
        "import importlib, sys; sys.path[:0] = sys.argv[3:];"
        "print(importlib.import_module(sys.argv[1]).build_sdist(sys.argv[2]))"
    )
    paths = [project / name for name in backend.get("backend-path", [])]
    done = subprocess.run(
        [sys.executable, "-c", code, backend["build-backend"], DIST, *paths],
        cwd=project,
        check=True,
        capture_output=True,
        text=True,
    )
    return DIST / done.stdout.splitlines()[-1]


def bare_environment(folder: Path, wheels: list[Path]) -> Path:
    """Install the wheels, and what they need, where nothing of this repository is; its interpreter."""
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv")
    python = folder / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "install"]
    server, front = wheels
    constraints = ["--constraint", ROOT / "constraints.txt"]
    run(*pip, "--quiet", "--no-compile", *constraints, f"{server}[{EXTRAS}]", front)
    return python


def bills_of_materials(version: str, python: Path, programs: Path, front: Path) -> None:
    """Write the CycloneDX documents: of what is installed, and of the crates that the native front was built of."""
    bill = DIST / f"stepwell-{version}.cdx.json"
    run(
        *(programs / "cyclonedx-py", "environment", "--output-reproducible", "--validate"),
        *("--pyproject", ROOT / "pyproject.toml", "--mc-type", "application"),
        *("--output-format", "JSON", "--output-file", bill, python),
    )
    crates = DIST / f"stepwell_front-{version}.cdx.json"
    with zipfile.ZipFile(front) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".cyclonedx.json")]
        crates.write_bytes(archive.read(name))
    for path in (bill, crates):  # whoever reads them has no use for the folder of this clone
        path.write_text(path.read_text().replace(f"{ROOT.as_uri()}/", ""))


def write_sums() -> None:
    """Write the checksums of all that is published, as `sha256sum --check` reads them."""
    files = sorted(path for path in DIST.iterdir() if path.name != SUMS)
    sums = (f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files)
    (DIST / SUMS).write_text("".join(sums))


def step(text: str) -> None:
    """Show what comes next."""
    print(f"\n-- {text}", flush=True)


def run(*command: object, cwd: str | None = None) -> None:
    """Run a program, whose output is shown."""
    subprocess.run([str(part) for part in command], cwd=cwd or ROOT, check=True)


if __name__ == "__main__":
    sys.exit(main())
