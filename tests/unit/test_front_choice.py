"""Which front a server has: the native one only if it is that of the same version, built from the same sources."""

from __future__ import annotations

import dataclasses
import re
import sys
from typing import cast

import pytest

from stepwell_server import app
from stepwell_server.core.front_limits import FrontLimits
from stepwell_server.settings import Settings
from support.fronts import needs_native


@dataclasses.dataclass
class Chosen:
    """What of the settings decides."""

    front: str


@needs_native
@pytest.mark.parametrize("front", ["auto", "native", "python"])
def test_a_front_of_another_version_is_not_used(
    front: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from stepwell_server.rpc.fronts import native

    settings = cast(Settings, Chosen(front))
    assert app._native_front(settings) is (None if front == "python" else native.NativeFront)
    monkeypatch.setattr(native, "VERSION", "0.0.1")
    if front == "native":
        with pytest.raises(app.StartError, match=r"must be of stepwell's version, .*; 0\.0\.1 is installed"):
            app._native_front(settings)
    else:
        assert app._native_front(settings) is None
        assert ("0.0.1 is installed" in caplog.text) == (front == "auto")


@needs_native
@pytest.mark.parametrize("front", ["auto", "native"])
@pytest.mark.parametrize("installed", [0, 999])
def test_a_front_built_from_other_sources_is_not_used(
    front: str, installed: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import stepwell_front

    if installed:
        monkeypatch.setattr(stepwell_front, "INTERFACE", installed)
    else:  # as those were that had no number
        monkeypatch.delattr(stepwell_front, "INTERFACE")
    monkeypatch.delitem(sys.modules, "stepwell_server.rpc.fronts.native", raising=False)
    settings = cast(Settings, Chosen(front))
    said = rf"must have interface \d+; the installed one, .*, has {installed}\. .* run scripts/front\.py"
    if front == "native":
        with pytest.raises(app.StartError, match=said):
            app._native_front(settings)
    else:
        assert app._native_front(settings) is None
        assert re.search(f"the front in Python serves: stepwell-front {said}", caplog.text)


def test_limits_beyond_what_64_bits_hold_twice_are_as_much_as_those_hold() -> None:
    for limits in (FrontLimits(1024, budget_bytes=2**63 - 1), FrontLimits(2**63 - 1)):
        assert 2 * int(limits.values["budget_bytes"]) < 2**64
        assert 2 * int(limits.values["connection_bytes"]) < 2**64
