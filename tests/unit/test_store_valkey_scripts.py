"""The scripts of the store on Valkey, one alone."""

from __future__ import annotations

import random

import numpy as np

from stepwell_server.store.record import HEADER
from stepwell_server.store.valkey import scripts
from stepwell_server.store.valkey.keys import HEAD
from support.servers.valkey_servers import Valkey


def test_scripts_read_headers_as_records_have_them() -> None:
    values = np.frombuffer(random.Random(1).randbytes(HEADER.itemsize), HEADER)[0]
    wanted = {
        name: int(values[name])
        for name in HEADER.names or ()
        if HEADER[name].kind == "u" and HEADER[name].itemsize <= 4
    }
    source = f"{scripts.RECORD} return {{HEAD_BYTES, {', '.join(f'{name}_of(KEYS[1])' for name in wanted)}}}"
    value = bytes(HEAD.size) + values.tobytes()
    assert {"model_bytes", "fields_bytes", "batch_size", "fingerprint_bytes"} <= set(wanted)
    with Valkey(append="") as valkey:
        assert valkey.ask("EVAL", source, 1, value) == [len(value), *wanted.values()]
