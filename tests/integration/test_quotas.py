"""Quotas from a file, as clients and operators see them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

import stepwell
from support.servers.server_process import FEATURES, serve
from support.telemetry.scrape import Scrape

_PATIENCE_S = 60.0


def test_quotas_of_a_file_are_kept_told_read_again_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "quotas.toml"
    path.write_text("[default]\nsessions = 2\nsteps_per_second = 1000\nburst = 20\n")
    x = np.ones((1, FEATURES), np.float32)
    with (
        serve("--quotas", str(path), "--metrics-listen", "127.0.0.1:0", "--log-format", "json") as server,
        stepwell.connect(server.address, timeout_s=_PATIENCE_S) as client,
    ):
        first = client.open_session("forecast", session_id="one")
        client.open_session("forecast", session_id="two")
        refused = _refusal(client)
        assert "sessions of all callers together" in refused.message
        assert (refused.quota, refused.reason) == ("sessions", "QUOTA_EXCEEDED")
        assert refused.retry_after_s > 0
        client.close_session("two")
        client.open_session("forecast", session_id="three")
        with pytest.raises(
            stepwell.InvalidInputError, match="at most the burst of the quota steps_per_second"
        ):
            first.step(np.ones((1, 21, FEATURES), np.float32))
        for _ in range(40):  # the SDK waits as long as it is told, and each is applied once
            first.step(x)
        assert first.position == 40
        scrape = Scrape.of(json.loads(server.wait_for_log('"metrics"'))["address"])
        assert scrape.value("stepwell_tenant_sessions", "") == 2
        assert scrape.value("stepwell_tenant_steps_total", "") >= 40
        assert scrape.value("stepwell_tenant_refused_total", "", "sessions") >= 1
        other = tmp_path / "other"
        other.write_text("[default]\nsessions = none\n")
        os.replace(other, path)
        server.wait_for_log("the changed quotas cannot be used")
        other.write_text("[default]\nsessions = 3\n")
        os.replace(other, path)
        server.wait_for_log("reloaded the quotas")
        client.open_session("forecast", session_id="four")


def _refusal(client: stepwell.Client) -> stepwell.OverloadedError:
    """Of a session more than there may be."""
    for limit_s in (0.5, 5.0, 50.0):  # a busy machine gets more time
        try:
            client.open_session("forecast", timeout_s=limit_s)
        except stepwell.OverloadedError as error:
            return error
        except stepwell.DeadlineExceededError:
            continue
        break
    raise AssertionError("it was not refused")


def test_a_broken_file_is_refused_at_the_start(tmp_path: Path) -> None:
    path = tmp_path / "quotas.toml"
    path.write_text("[default]\nsession = 2\n")
    with serve("--quotas", str(path), ready=False) as server:
        code, _, err = server.finish()
    assert code == 2
    assert f"--quotas: {path}: [default] must have sessions, " in err
