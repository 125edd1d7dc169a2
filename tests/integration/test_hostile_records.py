"""What a tenant's user imports harms nobody, over the wire: lists of administrators, other sessions of the call."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stepwell
from stepwell._admin.session_file import Writer, read
from stepwell.v1 import sessions_pb2
from stepwell_server.core.namespaces import prefix_of
from stepwell_server.store.fields import OWNER, VERSION, pack_fields
from stepwell_server.store.record import HEADER, with_checksum
from support.servers.served import local_server
from support.stores.records import decode

pytestmark = pytest.mark.plain("it has callers of its own")

#: As the server knows the session `a` of the tenant: its records are bound to it.
ID = f"{prefix_of('evil')}a"
Forge = Callable[[bytes], bytes]


def column(name: str, value: float) -> Forge:
    def forge(record: bytes) -> bytes:
        changed = bytearray(record)
        np.frombuffer(changed, HEADER, 1)[name] = value
        return bytes(changed)

    return forge


def parts(**changes: Any) -> Forge:
    return lambda record: dataclasses.replace(decode(ID, record), **changes).encode(ID)


FORGED: dict[str, Forge] = {
    "created-nan": column("created", math.nan),
    "created-infinity": column("created", math.inf),
    "created-1e300": column("created", 1e300),
    "created-33658": column("created", 1e12),
    "created-tomorrow-and-more": column("created", 4e9),
    "last-used-nan": column("last_used", math.nan),
    "position": column("position", 2**63),
    "no-rows": column("batch_size", 0),
    "fingerprint-beyond": column("fingerprint_bytes", 255),
    "model-beyond": column("model_bytes", 65_535),
    "fields-beyond": column("fields_bytes", 65_535),
    "limit-beyond": column("max_idle_ms", 2**63),
    "rows-beyond": column("rows_bytes", 2**32 - 1),
    "no-utf-8": lambda record: record[: HEADER.itemsize] + b"\xff" + record[HEADER.itemsize + 1 :],
    "state-nan": lambda record: parts(rows=b"\xff" * len(decode(ID, record).rows))(record),
    "reply-kind": parts(reply=200),
    "reply-recursion": parts(extra=b"\xff" + (100_000).to_bytes(4, "little") + b"[" * 100_000),
    "fields-60-KB": parts(fields=pack_fields({99: bytes(60_000)})),
    "fields-no-sense": parts(fields=b"\1"),
}
KNOWN = pack_fields({VERSION: b"\xff" * 13, OWNER: b"acme/somebody"})


def token(folder: Path, file: Path, name: str, role: str, tenant: str) -> str:
    command = [sys.executable, "-m", "stepwell", "tokens", "add", name]
    options = ["--tenant", tenant, "--role", role, "--file", str(file)]
    made = subprocess.run([*command, *options], check=True, capture_output=True, text=True, cwd=folder)
    return made.stdout.strip().split()[-1]


def test_forged_records_fail_alone_and_break_no_list(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    user = token(tmp_path, tokens, "eve", "user", "evil")
    admin = token(tmp_path, tokens, "root", "admin", "ops")
    quotas = tmp_path / "quotas.toml"
    quotas.write_text("[tenants.evil]\nbytes = 4000\n")
    quotas.chmod(0o600)
    arguments = ["--auth-tokens", str(tokens), "--quotas", str(quotas)]
    with local_server("seq", data_dir=tmp_path / "data", extra_args=arguments) as server:
        with stepwell.connect(server.address, token=user) as evil:
            x = np.random.default_rng(3).standard_normal((1, 2, 3)).astype(np.float32)
            evil.open_session("seq", session_id="a").step(x)
            evil.export_sessions(tmp_path / "good", ["a"])
            (entry,) = read(tmp_path / "good")
            forged = FORGED | {"known-fields": parts(fields=KNOWN), "good": lambda record: record}
            with Writer(tmp_path / "forged") as writer:
                for forge in forged.values():
                    record = with_checksum(ID, forge(entry.record))
                    moved = sessions_pb2.ExportedSession()
                    moved.CopyFrom(entry)
                    moved.record = record
                    moved.session_id = "a"
                    writer.add([moved])
            evil.close_session("a")
            failures = {}
            for name, moved in zip(forged, read(tmp_path / "forged"), strict=True):
                with Writer(tmp_path / "one") as writer:
                    writer.add([moved])
                report = evil.import_sessions(tmp_path / "one", existing="skip")
                if report.failures:
                    (error,) = report.failures.values()
                    failures[name] = str(error)
                else:
                    assert name in {"known-fields", "good"}
                    assert evil.session_info("a").max_idle_s is None
                    evil.close_session("a")
            assert failures.keys() == FORGED.keys()
            assert not [text for text in failures.values() if "internal error" in text]
            with pytest.raises(stepwell.OverloadedError, match="bytes of tenant 'evil'") as refused:
                evil.open_sessions("seq", 40)
            assert refused.value.quota == "bytes"
            evil.open_session("seq", session_id="left")
        with stepwell.connect(server.address, token=admin, tenant="*") as root:
            assert [info.session_id for info in root.sessions()] == ["left"]
