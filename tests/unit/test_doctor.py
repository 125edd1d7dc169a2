"""`stepwell doctor`: what it finds wrong, and that it leaves nothing behind and disturbs nobody."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import os
import re
import resource
import shutil
import socket
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner

from stepwell.cli import _of_server, main
from stepwell_server import doctor
from stepwell_server.addresses import Address, UnixAddress
from stepwell_server.cli.doctor import doctor as command
from stepwell_server.compile.host import sandbox
from stepwell_server.compile.host.sandbox import Protection
from stepwell_server.doctor import Examination
from stepwell_server.rpc.fronts.choice import Choice, choose
from stepwell_server.settings import Settings
from stepwell_server.store.disk.lock import DirectoryLock
from stepwell_server.store.encryption.keyring import add_key
from stepwell_server.store.factory import open_store
from stepwell_server.store.valkey.connection.url import parse
from support.clock import ManualClock
from support.servers.valkey_servers import Valkey
from support.stores.disk_store import record
from support.stores.valkey_store import opened, put

NOW = 4_000_000_000.0
"""Later than any file."""


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Of a machine on which nothing is wrong, whatever this one is like."""
    monkeypatch.setattr(doctor, "_flush_times_ms", lambda folder: [1.0, 2.0, 30.0])
    monkeypatch.setattr(doctor, "_file_system", lambda folder: "ext4")
    monkeypatch.setattr(doctor, "cgroup_values", lambda name: ["max 100000"])
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(2**40, 2**39, 2**39))
    monkeypatch.setattr(doctor, "choose", lambda option: Choice(object()))  # type: ignore[arg-type]
    monkeypatch.setattr(sandbox, "tried", lambda: Protection("namespace", "seccomp", "Landlock"))
    monkeypatch.setattr(doctor, "_version", lambda package: "1.2.3")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY,) * 2)
    return Settings(
        listen=Address("127.0.0.1", 0),
        data_dir=tmp_path / "data",
        cache_dir=tmp_path / "cache",
        compute_threads=4,
    )


def examined(
    settings: Settings, *, serves: bool = True, now: float = NOW, pid: int | None = None
) -> Examination:
    found = Examination(settings, ManualClock(now=now), serves=serves, listening=lambda port: pid)
    found.examine()
    return found


def wrong(settings: Settings, **how: Any) -> list[str]:
    return [str(finding) for finding in examined(settings, **how).findings if finding.is_wrong]


def advice(settings: Settings, **how: Any) -> list[str]:
    return [str(finding) for finding in examined(settings, **how).findings if not finding.is_wrong]


@pytest.fixture
def taken() -> Iterator[Address]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield Address(*listener.getsockname())


def test_secrets_are_read_as_a_server_reads_them(settings: Settings, tmp_path: Path) -> None:
    names = ("tokens", "metrics", "keys", "quotas")
    files = {name: tmp_path / name for name in names}
    for file in files.values():
        file.write_text("[")
        file.chmod(0o600)
    settings = dataclasses.replace(
        settings,
        auth_tokens=files["tokens"],
        metrics_token_file=files["metrics"],
        encryption_key_file=files["keys"],
        quotas=files["quotas"],
        audit_log=tmp_path / "none" / "audit.jsonl",
    )
    found = wrong(settings)
    options = {"--metrics-token-file", "--quotas", "--encryption-key-file", "--auth-tokens", "--audit-log"}
    assert len(found) == len(options)
    assert {line.partition(":")[0] for line in found} == options
    files["tokens"].chmod(0o644)
    assert any("readable by its owner only" in line for line in wrong(settings))


def test_a_store_that_a_server_would_refuse(settings: Settings, tmp_path: Path) -> None:
    assert settings.data_dir is not None
    keys = tmp_path / "keys"
    add_key(keys, "one")
    store = open_store(
        "disk", data_dir=settings.data_dir, durability="async", clock=ManualClock(), key_file=keys
    )
    asyncio.run(store.close())
    assert wrong(dataclasses.replace(settings, encryption_key_file=keys)) == []
    (line,) = wrong(settings)
    assert line.startswith(f"--encryption-key-file: the store in {settings.data_dir} is encrypted with key")
    other = tmp_path / "other keys"
    add_key(other, "two")
    (line,) = wrong(dataclasses.replace(settings, encryption_key_file=other))
    assert "the key file must have all keys that encrypt the store" in line

    shutil.rmtree(settings.data_dir)
    settings.data_dir.mkdir(mode=0o700)
    with tarfile.open(Path(__file__).parents[1] / "data" / "store-schema-8.tar.xz") as archive:
        archive.extractall(settings.data_dir, filter="data")
    assert any(
        line.startswith("--data-dir: the store in") and "must have schema version" in line
        for line in wrong(settings)
    )


def zipped(*names: str) -> bytes:
    """Return a zip archive with these files."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, "{}")
    return file.getvalue()


SAVE = "save the model with model.save('name.keras')"
KERAS, STEPWELL = {"models": {"m": "m.keras"}}, {"models": {"m": "m.stepwell"}}
ONNX = {"models": {"m": "m.onnx"}}
HAS_ONNX = {"stepwell_server.doctor.require_frameworks": lambda _path: None}
ANYWHERE = {"listen": Address("0.0.0.0", 0)}
TLS = dict.fromkeys(("tls_cert", "tls_key", "tls_client_ca"), "tls")
OTHER_CA = {"stepwell_server.start_files.CertificateFiles": lambda *files: None}
SHARED = {"store": parse("valkey://127.0.0.1:1/0", {}), "data_dir": None}
PYTHON_FRONT = {"stepwell_server.doctor.choose": lambda option: Choice(None, "there is none")}
QUOTAS = b'[callers."acme/ann"]\nrows = 5\n'


def usage(free: int, used: int = 0) -> dict[str, Any]:
    return {"shutil.disk_usage": lambda folder: Usage(2**40, used, free)}


def limit(number: int) -> dict[str, Any]:
    return {"resource.getrlimit": lambda which: (number, number)}


def given(name: str, value: Any) -> dict[str, Any]:
    return {f"stepwell_server.doctor.{name}": lambda *_: value}


@pytest.mark.parametrize(
    ("changes", "machine", "files", "problems", "improvements"),
    [
        # disks and folders
        (
            {},
            given("_file_system", "nfs4"),
            {},
            ["is on nfs4, a network file system; use a folder on a local"],
            [],
        ),
        ({}, given("_file_system", "tmpfs"), {}, [], [r"is in memory \(tmpfs\)"]),
        ({}, given("_flush_times_ms", [30.0]), {}, [], ["a flush to the disk takes 30.0 ms"]),
        ({"durability": "async"}, given("_flush_times_ms", [30.0]), {}, [], []),
        (
            {"data_dir": "file/x", "cache_dir": "file"},
            {},
            {"file": b""},
            [
                "^--data-dir: {folder}/file is not writable: Not a directory; use another",
                "^--cache-dir: {folder}/file is not writable: Not a directory; use another",
            ],
            [],
        ),
        ({}, usage(2**20, 2**40 - 2**20), {}, ["is full; 1048576 bytes are free; free some space"] * 2, []),
        ({}, usage(2**34), {}, [], ["--data-dir: only 1.6% of the disk of", "--cache-dir: only 1.6%"]),
        # limits
        (
            {},
            limit(1024),
            {},
            ["files are limited to 1024 bytes"],
            ["the limit of 1024 open files allows only 768 connections"],
        ),
        (
            {},
            given("cgroup_values", ["250000 100000", "max 100000"]),
            {},
            [],
            ["4 compute threads share 2.5 processors.*use --compute-threads 2"],
        ),
        # modules, functions and quotas
        (
            {"migrations": {"a": "json:dumps", "b": "json:gone", "c": "no_such_module:f"}},
            {},
            {},
            ["^--migration: b=json:gone: json has no gone"],
            [],
        ),
        ({"migrations": {"a": "json:dumps"}, "imports": ("json.decoder",)}, {}, {}, [], []),
        (
            {"imports": ("json", "no_such_module.layers")},
            {},
            {},
            ["^--import: there is no module no_such_module.layers"],
            [],
        ),
        ({"quotas": "quotas.toml"}, {}, {"quotas.toml": QUOTAS}, [], []),
        (
            {"quotas": "quotas.toml", **SHARED},
            {},
            {"quotas.toml": QUOTAS},
            ["^--store: .*Connection refused", "^--quotas: "],
            [],
        ),
        # reach
        (
            ANYWHERE,
            {},
            {},
            ["^--listen: beyond loopback the server must use TLS and authenticate callers"],
            [],
        ),
        (ANYWHERE | {"insecure_listen": True}, {}, {}, [], []),
        (
            ANYWHERE | TLS,
            PYTHON_FRONT | OTHER_CA,
            {},
            [
                "^--listen: without the native front it must be a loopback address.*; there is none; for the native"
            ],
            ["^there is none: the Python front"],
        ),
        # files of the settings
        (
            {"models": {"m": "gone"}},
            {},
            {},
            ["PATH must be a .keras, .onnx or .stepwell file; {folder}/gone does not exist"],
            [],
        ),
        (
            STEPWELL,
            {},
            {"m.stepwell": b"PK"},
            ["model m: {folder}/m.stepwell: not a .stepwell file, or a truncated one"],
            [],
        ),
        (
            {"tls_cert": "gone", "tls_key": "gone"},
            {},
            {},
            ["--tls-cert: must be a readable file; {folder}/gone"],
            [],
        ),
        (
            KERAS,
            {},
            {"m.keras": b"junk"},
            [f"not a .keras file, or a truncated one; {re.escape(SAVE)}; use"],
            [],
        ),
        (KERAS, {}, {"m.keras": b""}, [f": is empty; {re.escape(SAVE)}; use another file$"], []),
        (
            KERAS,
            {},
            {"m.keras": b"\x89HDF\r\n\x1a\n"},
            ["^model m: {folder}/m.keras: an HDF5 file: Stepwell serves .keras files of Keras 3"],
            [],
        ),
        (
            KERAS,
            {},
            {"m.keras": zipped("config.json")},
            ["not a .keras file: it has no metadata.json, model.weights.h5; use another file$"],
            [],
        ),
        (
            KERAS,
            {},
            {"m.keras": zipped("config.json").replace(b"PK\x01\x02", b"PK\x01\x03")},
            [": corrupt .keras file: "],
            [],
        ),
        (KERAS, {}, {"m.keras": zipped("config.json", "metadata.json", "model.weights.h5")}, [], []),
        (ONNX, HAS_ONNX, {"m.onnx": b"a model", "m.toml": b"[shape]\nx = 3"}, [], []),
        (
            ONNX,
            HAS_ONNX,
            {"m.onnx": b"a model", "m.toml": b"[shapes]\nx = 3"},
            [
                r"^model m: {folder}/m.toml: there is no table \[shapes\]; the tables are state, .*; use another file$"
            ],
            [],
        ),
    ],
)
def test_problems_and_improvements(
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    machine: dict[str, Any],
    files: dict[str, bytes],
    problems: list[str],
    improvements: list[str],
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        (tmp_path / name).chmod(0o600)
    for name, value in machine.items():
        monkeypatch.setattr(name, value)
    paths = {"data_dir", "cache_dir", "quotas", *TLS}
    placed = {name: tmp_path / value for name, value in changes.items() if name in paths and value}
    if models := changes.get("models"):
        placed["models"] = {name: tmp_path / file for name, file in models.items()}
    changed = dataclasses.replace(settings, **changes | placed)
    for found, expected in ((wrong(changed), problems), (advice(changed), improvements)):
        assert len(found) == len(expected), found
        for line, pattern in zip(found, expected, strict=True):
            assert re.search(pattern.replace("{folder}", str(tmp_path)), line), line


def test_a_clock_that_is_wrong(settings: Settings, tmp_path: Path) -> None:
    assert "the clock shows 2001-09-09T01:46:40Z; set the clock" in wrong(settings, now=1e9)[0]
    (tmp_path / "data").mkdir(0o700)
    (tmp_path / "data" / "file").touch()
    os.utime(tmp_path / "data" / "file", (NOW + 3600,) * 2)
    assert "files of the store were written at 2096-10-02T08:06:40Z; set the clock" in wrong(settings)[0]


def test_folders_that_others_can_replace_are_wrong(settings: Settings, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    for name, line in zip(("data", "cache"), wrong(settings), strict=True):
        rule = "must be in a place where no other user can replace it"
        assert line.startswith(f"--{name}-dir: {tmp_path}/{name} {rule}")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root looks after the server of another user")
def test_root_looks_as_the_user_whose_the_data_folder_is(settings: Settings, tmp_path: Path) -> None:
    assert settings.data_dir is not None
    for folder in (settings.data_dir, settings.cache_dir):
        folder.mkdir(0o700)
        os.chown(folder, 54_321, 54_321)
    found = examined(settings)
    assert found.findings == []
    assert found.facts["data-dir"]["user"] == "user 54321"
    os.chown(settings.cache_dir, 54_322, -1)
    (line,) = wrong(settings)
    assert "its owner is user 54322, and the server runs as user 54321" in line


def test_nothing_is_wrong_and_nothing_is_left_behind(settings: Settings, tmp_path: Path) -> None:
    found = examined(settings)
    assert found.findings == []
    assert list(found.facts) == [
        "versions",
        "limits",
        "data-dir",
        "disk",
        "store",
        "cache-dir",
        "ports",
        "front",
        "compiling",
        "clock",
    ]
    assert found.facts["data-dir"]["exists"] is False
    assert found.facts["data-dir"]["used_by"] is None
    assert found.facts["disk"] == {"flush_ms": 2.0, "slowest_flush_ms": 30.0}
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_runs_is_said_and_not_wrong(settings: Settings, tmp_path: Path, taken: Address) -> None:
    (tmp_path / "data").mkdir()
    lock = DirectoryLock(tmp_path / "data", clock=ManualClock(now=NOW))
    lock.set_listen(str(taken))
    found = examined(dataclasses.replace(settings, listen=taken, metrics_listen=taken), pid=os.getpid())
    assert found.findings == []
    assert str(found.facts["data-dir"]["used_by"]).startswith(f"process {os.getpid()} on ")
    assert found.facts["ports"]["metrics-listen"] == f"{taken} is used by the running server"
    lock.release()
    assert examined(settings).facts["data-dir"]["used_by"] is None


def test_ports_and_sockets_that_are_taken(settings: Settings, tmp_path: Path, taken: Address) -> None:
    by = f"(process {os.getpid()}, "
    (line,) = wrong(dataclasses.replace(settings, listen=taken), pid=os.getpid())
    assert line.startswith(f"--listen: a server cannot listen on {taken}: Address already in use {by}")
    (line,) = wrong(dataclasses.replace(settings, metrics_listen=taken))
    assert line.startswith(
        f"--metrics-listen: a server cannot listen on {taken}: Address already in use; use"
    )
    left = tmp_path / "left"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(left))
        listener.listen()
        on_socket = dataclasses.replace(settings, listen=UnixAddress(str(left)))
        assert "it is in use" in wrong(on_socket)[0]
    assert wrong(on_socket) == []
    assert left.exists(), "a file that was left behind is the next server's to remove"


def test_a_store_that_is_shared(settings: Settings) -> None:
    def shared(url: str) -> Settings:
        return dataclasses.replace(settings, store=parse(url, {}), data_dir=None)

    with Valkey(append="always") as valkey:
        found = examined(shared(valkey.url()))
        assert found.findings == []
        assert found.facts["store"] == {
            "kind": "valkey",
            "url": valkey.url(),
            "servers": valkey.address,
            "exists": False,
            "partitions": None,
            "sessions": 0,
        }
        assert valkey.ask("DBSIZE") == 0  # nothing is made

        async def use() -> None:
            store = await opened(valkey.url())
            await put(store, [(i, record(i)) for i in "abc"], [0, 0, 0])
            await store.close()

        asyncio.run(use())
        facts = examined(shared(valkey.url())).facts["store"]
        assert (facts["exists"], facts["partitions"], facts["sessions"]) == (True, 64, 3)
        (problem,) = wrong(shared(valkey.url("?partitions=9")))
        assert problem.startswith("--store: partitions must be 64, as in the store")
        valkey.ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
        (said,) = advice(shared(valkey.url()))
        assert f"--store: {valkey.address}: maxmemory-policy must be noeviction" in said
        valkey.ask("CONFIG", "SET", "appendfsync", "no")
        (problem,) = wrong(shared(valkey.url()))
        assert "durability sync needs appendfsync always; it is no" in problem
    (problem,) = wrong(shared(valkey.url()))
    assert f"--store: {valkey.address} cannot be connected to: Connection refused" in problem


@pytest.mark.parametrize("option", ["auto", "native", "python"])
def test_which_front_serves_and_how_to_get_the_native_one(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, option: Any
) -> None:
    monkeypatch.setattr(doctor, "choose", choose)
    monkeypatch.setitem(sys.modules, "stepwell_front", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "stepwell_server.rpc.fronts.native", raising=False)
    found = examined(dataclasses.replace(settings, front=option))
    how = "for the native front, install cargo (https://rustup.rs) and run: pip install ./server/front (in a clone of Stepwell)"
    expected = {
        "auto": (
            "stepwell-front is not installed: the Python front, which a server would use, is slower and serves only this machine;"
            f" {how}"
        ),
        "native": f"--front native: stepwell-front is not installed; {how}; or omit --front",
    }
    assert [str(finding) for finding in found.findings] == [
        text for key, text in expected.items() if key == option
    ]
    assert [finding.is_wrong for finding in found.findings] == [True] * (option == "native") + [False] * (
        option == "auto"
    )
    reason = "stepwell-front is not installed" if option == "auto" else None
    assert found.facts["front"] == {"serves": "python", "reason": reason}


def test_a_folder_of_models_is_looked_at(settings: Settings, tmp_path: Path) -> None:
    root = tmp_path / "models"
    with_folder = dataclasses.replace(settings, models_dir=root)
    assert "--models: must be a folder" in wrong(with_folder)[0]
    root.mkdir()
    assert f"--models: {root} contains no model; put one there as NAME/VERSION.keras" in wrong(with_folder)[0]
    (root / "m").mkdir()
    (root / "m/1.stepwell").write_bytes(b"PK")
    (root / "m/last.keras").touch()
    assert f"model m@1: {root}/m/1.stepwell: " in wrong(with_folder)[0]
    assert any(
        f"--models: {root}/m/last.keras must be named by its version" in each for each in advice(with_folder)
    )


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "c.toml"
    config.write_text('listen = "127.0.0.1:0"\ndata-dir = "data"\ncache-dir = "cache"\n')
    run = CliRunner(env={"STEPWELL_CONFIG": str(config)}).invoke
    document = json.loads(run(main, ["doctor", "--json"]).stdout)
    documented = ", ".join(keys for keys, _ in command.json_keys)
    assert set(document) == set(documented.split(", "))
    assert document["data_dir"]["path"] == str(tmp_path / "data")
    assert document["disk"]["flush_ms"] > 0
    assert document["store"] == {"kind": "disk"}
    assert document["versions"]["grpcio"]

    # the command line of serve is one of doctor too, and wins
    options = [
        f"--data-dir={tmp_path / 'other'}",
        "--max-batch-rows=7",
        "--trust-causality=a",
        "a=x.stepwell",
    ]
    assert (
        json.loads(run(main, ["doctor", "--json", *options]).stdout)["data_dir"]["path"]
        == f"{tmp_path}/other"
    )
    result = run(main, ["doctor", "--max-batch-rows=0"])
    assert result.exit_code == 1
    assert "wrong: Invalid value for '--max-batch-rows': must be a whole number from 1" in result.stdout

    config.write_text("lisen = 5")
    result = run(main, ["doctor"])
    assert result.exit_code == 1
    assert f"wrong: {config}: there is no setting 'lisen'; did you mean 'listen'?; correct" in result.stdout

    homeless = {"HOME": "", "XDG_DATA_HOME": None, "XDG_CACHE_HOME": None, "STEPWELL_CONFIG": None}
    result = CliRunner(env=homeless).invoke(main, ["doctor"])
    assert result.exit_code == 2
    assert result.stderr.startswith("stepwell: error: --cache-dir: give a folder; there is no default")

    lacking = {"serve": [], "server": ["no-such-framework"]}
    monkeypatch.setattr(_of_server, "packages_of", lacking.__getitem__)
    config.write_text("")
    result = run(main, ["doctor"])
    assert (
        "no .keras file can be compiled here because no-such-framework are not installed; serve compiled"
        in result.stdout
    )
    assert "data-dir:" in result.stdout
    monkeypatch.setattr(Examination, "_model", lambda *_: None)  # the file is empty
    for model, code in (("m.stepwell", 0), ("m.keras", 1)):
        (tmp_path / model).touch()
        config.write_text(f'models.m = "{model}"\nlisten = "127.0.0.1:0"\n')
        result = run(main, ["doctor"])
        assert result.exit_code == code, result.stdout
        assert ("wrong: no .keras file can be compiled here because no-such-framework" in result.stdout) == (
            code == 1
        )
    config.write_text("")

    lacking["serve"] = ["no-such-package"]
    result = run(main, ["doctor"])
    assert result.exit_code == 0, result.stdout
    assert "data-dir:" not in result.stdout
    assert (
        "no server can run here because no-such-package are not installed; to serve: pip install"
        in result.stdout
    )
    assert result.stdout.endswith("nothing is wrong\n")


def test_it_says_which_protection_compiling_has(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    found = examined(settings)
    assert found.facts["compiling"] == {"network": "namespace", "programs": "seccomp", "files": "Landlock"}
    monkeypatch.setattr(sandbox, "tried", lambda: Protection(programs="seccomp"))
    (said,) = advice(settings)
    assert said.startswith(
        "this machine cannot deny the process that compiles models access to the network and files of this user"
    )
    monkeypatch.undo()
    assert isinstance(sandbox.tried(), Protection)
