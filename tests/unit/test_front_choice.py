"""Which front a server has: the native one only if it is that of the same version, built from the same sources."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from stepwell_server.core.front_limits import FrontLimits
from stepwell_server.errors import StartError
from stepwell_server.rpc.fronts.choice import HOW, Choice, choose
from support.servers.both_fronts import needs_native

NATIVE = "stepwell_server.rpc.fronts.native"


def expect(front: str, problem: str) -> None:
    """The front in Python is chosen for this reason, and `native` is refused with it."""
    if front == "native":
        with pytest.raises(StartError) as caught:
            choose(front)
        assert str(caught.value) == f"--front native: {problem}; {HOW}"
        return
    chosen = choose(front)
    assert chosen == Choice(None, "" if front == "python" else problem)
    assert chosen.name == "python"
    assert chosen.advice == ("" if front == "python" else f"{problem}; {HOW}")


@needs_native
@pytest.mark.parametrize("asked", ["auto", "native", "python"])
def test_a_front_of_another_version_is_not_used(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from stepwell_server.rpc.fronts import native

    own = native.VERSION
    assert choose(asked) == Choice(None if asked == "python" else native.NativeFront)
    monkeypatch.setattr(native, "VERSION", "0.0.1")
    expect(asked, f"stepwell-front must have the version of stepwell, {own}; 0.0.1 is installed")


@needs_native
@pytest.mark.parametrize("asked", ["auto", "native"])
@pytest.mark.parametrize("installed", [0, 999])
def test_a_front_built_from_other_sources_is_not_used(
    asked: str, installed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import stepwell_front

    from stepwell_server.rpc.fronts import native

    if installed:
        monkeypatch.setattr(stepwell_front, "INTERFACE", installed)
    else:  # as those were that had no number
        monkeypatch.delattr(stepwell_front, "INTERFACE")
    monkeypatch.delitem(sys.modules, NATIVE)
    expect(
        asked,
        f"stepwell-front must have interface {native._INTERFACE}; the installed one, {native.VERSION}, has {installed}, because it was"
        " built from other sources",
    )


@pytest.mark.parametrize("asked", ["auto", "native", "python"])
@pytest.mark.parametrize(
    ("module", "problem"),
    [
        (None, "stepwell-front is not installed"),
        # of the wheel without the module (server/front/backend)
        ("raise ImportError('the reason of the wheel', name=__name__)", "the reason of the wheel"),
        ("import no_such_module", "stepwell-front cannot be imported: No module named 'no_such_module'"),
        ("raise ImportError('libx.so')", "stepwell-front cannot be imported: libx.so"),
    ],
)
def test_without_the_native_front_the_reason_is_known(
    asked: str, module: str | None, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, NATIVE, raising=False)
    if module is None:
        monkeypatch.setitem(sys.modules, "stepwell_front", None)
    else:
        (tmp_path / "stepwell_front.py").write_text(module)
        monkeypatch.delitem(sys.modules, "stepwell_front", raising=False)
        monkeypatch.syspath_prepend(tmp_path)
    expect(asked, problem)


def test_limits_beyond_what_64_bits_hold_twice_are_as_much_as_those_hold() -> None:
    for limits in (FrontLimits(1024, budget_bytes=2**63 - 1), FrontLimits(2**63 - 1)):
        assert 2 * int(limits.values["budget_bytes"]) < 2**64
        assert 2 * int(limits.values["connection_bytes"]) < 2**64
