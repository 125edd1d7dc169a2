"""The set-up of docs/operate/run.md as it is written: its blocks in order, from a clone and an empty environment to a step over TLS.

What needs systemd, a container tool or a cluster is marked in the page. pip finds the dependencies in this environment,
as it would in one where they are installed: that they suffice in an empty one is tried by `make release`. It builds the
native front from its sources, without the optimizer, and with the crates that `make front` has compiled before: with a
copy of them, as the module without the optimizer must not come into a wheel that is built meanwhile.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from support.servers.both_fronts import needs_native

PAGE = "docs/operate/run.md"
SECTION = re.compile(r"^## Set up\n(.*?)^## ", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"(?:<!-- test: ([^\n]*) -->\n)?^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
BACKGROUND = "in the background"
REASONS = {"systemd", "container tool"}
"""Why a block is not run."""
READY = re.compile(r"^stepwell: native front, listening on \S+:(\d+)$", re.MULTILINE)

UNOPTIMIZED = "[profile.release.package.stepwell-front]\nopt-level = 0\ncodegen-units = 16\n"
"""Settings of cargo for the front alone, with which the crates need not be compiled anew."""


class Block(NamedTuple):
    """A fenced block of the page."""

    mark: str
    language: str
    text: str

    @property
    def reason(self) -> str:
        """Why it is not run; empty if it is."""
        found = re.fullmatch(r"not run \((.*)\)", self.mark)
        return found[1] if found else ""


def blocks(root: Path) -> list[Block]:
    (text,) = SECTION.findall((root / PAGE).read_text())
    return [Block(*found) for found in BLOCK.findall(text)]


def test_each_block_is_run_or_says_why_not(root: Path) -> None:
    found = blocks(root)
    assert {block.mark for block in found} == {
        "",
        BACKGROUND,
        *(f"not run ({r})" for r in REASONS),
    }
    for block in found:
        assert block.reason or block.language in {"sh", "python", "toml"}, block
        if re.search(r"\b(systemctl|podman|docker|kubectl)\b", block.text):
            assert block.reason in REASONS, block


class Reader:
    """Somebody who does what the page says, in two shells.

    Args:
        folder: An empty one, in which everything is.
        clone: A clone of the repository.
        environment: What the shells have at first.
    """

    def __init__(self, folder: Path, clone: Path, environment: dict[str, str]) -> None:
        self._folder = folder
        self._clone = clone
        self._environment = environment
        self.substituted: dict[str, int] = {}
        """What stands for others of the page's paths and addresses, and how often it was there."""
        self._stands_for: dict[str, str] = {}
        # a path that a .pth file names is not searched for other such files: nothing is editable there
        dependencies = f"echo '{sysconfig.get_path('platlib')}' > $(echo /opt/stepwell/lib/python3.*)/site-packages/others.pth"
        self._stand("-m venv /opt/stepwell\n", f"-m venv /opt/stepwell\n{dependencies}\n")
        for name in ("/opt/stepwell", "/etc/stepwell"):
            self._stand(name, str(folder / name.removeprefix("/")))
        self._stand("0.0.0.0:50051", "0.0.0.0:0")
        self._stand("127.0.0.1:9464", "127.0.0.1:0")
        self._server: subprocess.Popen[str] | None = None

    def _stand(self, name: str, other: str) -> None:
        self.substituted.setdefault(name, 0)
        self._stands_for[name] = other

    def _read(self, text: str) -> str:
        for name, other in self._stands_for.items():
            self.substituted[name] += text.count(name)
            text = text.replace(name, other)
        return text

    def do(self, block: Block) -> str:
        """Do what a block says; what it prints."""
        text = self._read(block.text)
        if block.language == "toml":  # the first line is the file's name
            first, _, _ = text.partition("\n")
            Path(first.removeprefix("# ")).write_text(text)
            return ""
        if block.mark == BACKGROUND:
            self._start(text)
            return ""
        if block.language == "python":
            (self._folder / "block.py").write_text(text)
            text = f"python {self._folder / 'block.py'}"
        return self._run(text)

    def _run(self, text: str) -> str:
        """Run commands in the shell, whose variables the next ones have."""
        kept = self._folder / "variables"
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", f"{text}\nenv -0 > '{kept}'"],
            cwd=self._clone,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=1500,
            check=False,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}"
        pairs = (pair.partition("=") for pair in kept.read_text().split("\0") if pair)
        self._environment = {name: value for name, _, value in pairs}
        return done.stdout

    def _start(self, text: str) -> None:
        """Start a server, and wait until it listens."""
        with (self._folder / "log").open("w") as log:
            self._server = subprocess.Popen(
                ["bash", "-euc", f"exec {text}"],
                cwd=self._clone,
                env=self._environment,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self._server.stdout is not None
        ready = self._server.stdout.readline()
        found = READY.match(ready)
        assert found, f"{ready}\n{(self._folder / 'log').read_text()}"
        self._stand("localhost:50051", f"localhost:{found[1]}")

    def stop(self) -> int | None:
        """Stop the server as Ctrl-C does; its exit code."""
        if self._server is None:
            return None
        self._server.send_signal(signal.SIGINT)
        self._server.communicate(timeout=100)
        return self._server.returncode


@pytest.fixture
def reader(root: Path) -> Iterator[Reader]:
    """With a home of their own, the programs of the system, Python and cargo, and the settings of pip of this machine."""
    with tempfile.TemporaryDirectory(prefix="stepwell-page-") as name:
        folder = Path(name)
        clone, home = folder / "clone", folder / "home"
        home.mkdir()
        (folder / "opt").mkdir()
        temporary = folder / "tmp"
        (temporary / ".cargo").mkdir(parents=True)
        (temporary / ".cargo" / "config.toml").write_text(UNOPTIMIZED)
        copy(root, clone)
        compiled = root / "server" / "front" / "target" / "release"
        if compiled.is_dir():
            shutil.copytree(compiled, folder / "target" / "release")
        programs = [Path(sys.base_prefix) / "bin", Path(shutil.which("cargo") or "/usr/bin/cargo").parent]
        environment = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_"))}
        for tool in ("CARGO", "RUSTUP"):
            at = os.environ.get(f"{tool}_HOME", str(Path.home() / f".{tool.lower()}"))
            environment |= {f"{tool}_HOME": at} if Path(at).exists() else {}
        environment |= {
            "HOME": str(home),
            "PATH": os.pathsep.join([*map(str, programs), "/usr/local/bin", "/usr/bin", "/bin"]),
            # what was downloaded and compiled before
            "PIP_CACHE_DIR": os.environ.get("PIP_CACHE_DIR", str(Path.home() / ".cache" / "pip")),
            "PIP_CONSTRAINT": str(root / "constraints.txt"),
            "PIP_COMPILE": "0",  # no bytecode of modules that are never imported
            "CARGO_TARGET_DIR": str(folder / "target"),
            # the crate is copied there to be built, and cargo reads the settings in the folders above it
            "TMPDIR": str(temporary),
        }
        reading = Reader(folder, clone, environment)
        try:
            yield reading
        finally:
            reading.stop()


def copy(root: Path, target: Path) -> None:
    """Copy the files of the repository, as a clone has them."""
    import repository

    for name in repository.tracked_files():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, target / name, follow_symlinks=False)


@pytest.mark.slow
@pytest.mark.timeout(2400)
@needs_native
@pytest.mark.skipif(shutil.which("openssl") is None, reason="the page makes a certificate with openssl")
def test_from_an_empty_environment_to_a_step_over_tls_with_a_token(root: Path, reader: Reader) -> None:
    printed = [reader.do(block) for block in blocks(root) if not block.reason]

    (doctor,) = [text for text in printed if "nothing is wrong" in text]
    assert re.search(r"^front:\n +serves +native$", doctor, re.MULTILINE)
    assert len([text for text in printed if "\nfront: native\n" in text]) == 1  # stepwell models
    assert len([text for text in printed if text.endswith("]] 1 native\n")]) == 1  # the step from Python
    assert reader.stop() == 0
    assert all(reader.substituted.values()), reader.substituted
