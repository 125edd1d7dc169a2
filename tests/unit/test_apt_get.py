"""What make's targets install with apt-get: only on a Debian, as root, and where no variable forbids it."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import Any

import apt_get  # type: ignore[import-not-found,unused-ignore]
import install_programs  # type: ignore[import-not-found,unused-ignore]
import pytest


@pytest.fixture
def root_on_debian(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/apt-get" if name == "apt-get" else None)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.delenv("STEPWELL_NO_APT", raising=False)


@pytest.mark.usefixtures("root_on_debian")
def test_a_variable_forbids_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert apt_get.refusal() == ""
    monkeypatch.setenv("STEPWELL_NO_APT", "1")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: pytest.fail("something was run"))
    assert apt_get.refusal() == "STEPWELL_NO_APT is set"
    assert install_programs.main() == 1
    printed = capsys.readouterr().out
    assert "will fail; STEPWELL_NO_APT is set. Install Valkey 7.2 or newer" in printed
    assert "as root: apt-get install valkey-server valkey-sentinel promtool chromium" in printed


def test_it_takes_root_and_a_debian(monkeypatch: pytest.MonkeyPatch, root_on_debian: None) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert apt_get.refusal() == "apt-get needs root"
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert apt_get.refusal() == "there is no apt-get"


@pytest.mark.parametrize("installs", [True, False])
def test_noise_is_shown_only_after_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *, installs: bool
) -> None:
    ran = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        ran.append(command[1])
        return subprocess.CompletedProcess(command, 0 if installs else 100, f"debconf: {command[1]}\n")

    monkeypatch.setattr(subprocess, "run", run)
    assert apt_get.install(["a", "b"], what="things") == installs
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] == (
        "Installing things (STEPWELL_NO_APT=1 forbids it): apt-get install a b"
    )
    assert ("debconf" in printed) == (not installs)
    assert ran == (["install"] if installs else ["install", "update", "install"])
