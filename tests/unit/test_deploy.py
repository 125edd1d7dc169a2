"""What is in deploy/ and what the pages for operators say: it names what there is, and its commands run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from stepwell_server.cli.serve import SETTINGS, serve
from stepwell_server.errors import reasons

ROOT = Path(__file__).parents[2]
DEPLOY, DOCS = ROOT / "deploy", ROOT / "docs" / "operate"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
OPTIONS = {name for option in serve.params for name in option.opts if name.startswith("--")}
VARIABLES = {"STEPWELL_CONFIG", *(setting.variable for setting in SETTINGS)}


def _blocks(page: Path, kind: str) -> list[str]:
    return [text for language, text in BLOCK.findall(page.read_text()) if language == kind]


def test_every_option_of_serve_that_is_named_there_is_one() -> None:
    kubernetes = (DEPLOY / "kubernetes.yaml").read_text()
    container = (DEPLOY / "Containerfile").read_text()
    named = set(re.findall(r"- (--[a-z-]+)=", kubernetes))
    named |= set(re.findall(r'"(--[a-z-]+)"', container))
    for page in (*(ROOT / "docs").rglob("*.md"), ROOT / "README.md"):
        for command in re.findall(r"stepwell serve ((?:[^\n`]|\\\n)*)", page.read_text()):
            named |= set(re.findall(r"(?<!\S)(--[a-z][a-z-]*)", command))
    assert len(named) > 10
    assert named - OPTIONS <= {"--help"}
    unit = (DEPLOY / "stepwell.service").read_text()
    variables = set(re.findall(r"STEPWELL_[A-Z_]+", unit + container))
    assert len(variables) > 5
    assert variables <= VARIABLES


def test_every_reason_and_every_alert_has_its_section() -> None:
    headings = set(re.findall(r"^### (\S+)$", (DOCS / "when-it-breaks.md").read_text(), re.MULTILINE))
    assert set(reasons()) <= headings
    alerts = [
        alert
        for file in DEPLOY.glob("prometheus/*.yml")
        for alert in re.findall(r"alert: (\S+)", file.read_text())
    ]
    assert set(alerts) <= headings


def test_the_image_is_pinned_and_runs_as_nobody_in_particular() -> None:
    text = (DEPLOY / "Containerfile").read_text()
    lines = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)).splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line.strip() and not line.startswith(" ")]
    base = next(value for name, value in steps if name == "ARG" and value.startswith("PYTHON="))
    assert re.fullmatch(r"PYTHON=python:3\.\d+\.\d+-slim-trixie", base)
    assert [value.split()[0] for name, value in steps if name == "FROM"] == ["${PYTHON}", "${PYTHON}"]
    assert "ADD" not in [name for name, _ in steps]
    last = [name for name, _ in steps[max(n for n, step in enumerate(steps) if step[0] == "FROM") :]]
    assert last.index("USER") > last.index("RUN")
    assert {"HEALTHCHECK", "ENTRYPOINT", "CMD", "VOLUME"} <= set(last)
    (user,) = [value for name, value in steps if name == "USER"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    for name, value in steps:
        if name == "COPY" and not value.startswith("--from"):
            assert all((ROOT / source).exists() for source in value.split()[:-1]), value
    assert not re.search(r"https?://(?!127)|curl |wget |index.url|:latest", text)
    # what builds the native front, as docs/operate/run.md has it
    assert "$(python server/front/backend/front_cargo.py)" in text
    assert "REQUIRE_NATIVE_FRONT=1" in text
    assert '".[$EXTRA]" ./server/front' in text


def test_temporary_files_of_the_image_are_in_a_volume() -> None:
    """The root file system may be read-only, and no server starts without a folder for them."""
    text = (DEPLOY / "Containerfile").read_text()
    (volumes,) = re.findall(r"^VOLUME (\[.*\])$", text, re.MULTILINE)
    (folder,) = re.findall(r"^ +TMPDIR=(\S+)", text, re.MULTILINE)
    assert folder in json.loads(volumes)


@pytest.mark.parametrize(
    ("builder", "begins"),
    [
        ("podman", "podman build "),
        ("docker", "docker build "),
        ("buildah", "buildah --storage-driver vfs bud "),
    ],
)
def test_the_image_is_built_by_whatever_is_there(builder: str, begins: str) -> None:
    script = [sys.executable, str(ROOT / "scripts" / "image.py"), "--builder", builder, "--print"]
    arguments = ["--tag", "stepwell:1", "--base", "debian", "--", "--build-arg", "NATIVE=no"]
    done = subprocess.run([*script, *arguments], capture_output=True, text=True, check=True)
    (command,) = done.stdout.splitlines()
    assert command.startswith(begins)
    assert command.endswith("--build-arg NATIVE=no --tag stepwell:1 --file deploy/Containerfile .")
    assert "--build-arg PYTHON=localhost/stepwell-base:trixie" in command


def test_the_unit_is_one(tmp_path: Path) -> None:
    text = (DEPLOY / "stepwell.service").read_text()
    for line in ("Type=notify-reload", "DynamicUser=yes", "ProtectSystem=strict", "NoNewPrivileges=yes"):
        assert f"\n{line}\n" in text
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("no systemd-analyze here, which reads the unit as systemd does")
    unit = tmp_path / "stepwell.service"
    unit.write_text(text.replace("/opt/stepwell/bin/stepwell", "/bin/true"))
    verified = subprocess.run([analyze, "verify", str(unit)], capture_output=True, text=True, check=False)
    assert "stepwell.service" not in verified.stderr.replace(
        str(unit), "stepwell.service" * verified.returncode
    )
    rated = subprocess.run(
        [analyze, "security", "--offline=true", str(unit)], capture_output=True, text=True, check=False
    )
    found = re.search(r"exposure level for stepwell.service: ([\d.]+)", rated.stdout)
    assert found is not None
    assert float(found[1]) < 2


def test_kubernetes_finds_what_it_wants() -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML comes with the checks of the alert rules")
    service, server = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    assert service["spec"]["selector"] == server["spec"]["template"]["metadata"]["labels"]
    pod = server["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    volumes = {volume["name"] for volume in pod["volumes"]}
    volumes |= {claim["metadata"]["name"] for claim in server["spec"]["volumeClaimTemplates"]}
    (container,) = pod["containers"]
    # what is in an emptyDir every user can write, and is refused; a secret is the group's to read
    shared = {volume["name"] for volume in pod["volumes"] if "emptyDir" in volume}
    assert [mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] in shared] == ["/tmp"]
    for volume in pod["volumes"]:
        assert "secret" not in volume or volume["secret"]["defaultMode"] == 0o440
    places = [mount["mountPath"] for mount in container["volumeMounts"]]
    for option in container["args"]:
        _, _, path = option.partition("=")
        assert not path.startswith("/") or any(path.startswith(f"{place}/") for place in places), option
    for container in pod["containers"]:
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert not container["image"].endswith(":latest")
    (container,) = pod["containers"]
    ports = {port["name"] for port in container["ports"]}
    probes = {container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("liveness", "readiness")}
    assert probes == {"/livez", "/readyz"}
    assert {container[f"{kind}Probe"]["httpGet"]["port"] for kind in ("liveness", "readiness")} <= ports


def test_the_commands_for_certificates_and_the_settings_of_production_are_right(tmp_path: Path) -> None:
    """The whole page is run by tests/packaging/test_production_page.py, which takes minutes."""
    certificates = [
        block
        for block in _blocks(DOCS / "secure.md", "sh")
        if block.startswith("openssl") and shutil.which("openssl") is not None
    ]
    tokens = f'"{sys.executable}" -m stepwell tokens add shop --tenant acme --file tokens'
    for block in (tokens, *certificates):
        done = subprocess.run(
            ["bash", "-euc", block], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    (settings,) = _blocks(DOCS / "run.md", "toml")
    file = tmp_path / "stepwell.toml"
    file.write_text(settings)
    secrets = {"STEPWELL_AUTH_TOKENS": str(tmp_path / "tokens"), "STEPWELL_DATA_DIR": str(tmp_path / "data")}
    if certificates:
        secrets |= {"STEPWELL_TLS_CERT": str(tmp_path / "server.crt")}
        secrets |= {"STEPWELL_TLS_KEY": str(tmp_path / "server.key")}
    shown = subprocess.run(
        [sys.executable, "-m", "stepwell", "serve", "--config", str(file), "--show-config"],
        env={**os.environ, **secrets},
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    assert 'listen = "0.0.0.0:50051"' in shown.stdout
    assert isinstance(serve, click.Command)
