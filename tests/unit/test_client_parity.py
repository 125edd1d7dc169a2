"""The async client is the sync one, awaited; and the package is as light as it promises."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from typing import Any

import pytest

import stepwell
from stepwell._admin.aio_calls import AsyncSessionList
from stepwell._watch.aio_watch import AsyncWatch
from stepwell.aio_group import AsyncSessionGroup
from stepwell.aio_session import AsyncSession, Opening

PAIRS = [
    (stepwell.Client, stepwell.aio.AsyncClient),
    (stepwell.Session, AsyncSession),
    (stepwell.SessionGroup, AsyncSessionGroup),
]
LOCAL = {"__init__", "__len__", "__repr__", "record"}


def public(kind: type) -> dict[str, Any]:
    return {
        name: member
        for name, member in inspect.getmembers(kind)
        if not name.startswith("_") or (name == "__len__")
    }


@pytest.mark.parametrize(("sync", "aio"), PAIRS, ids=lambda kind: kind.__name__)
def test_same_names(sync: type, aio: type) -> None:
    assert public(sync).keys() == public(aio).keys()


@pytest.mark.parametrize(("sync", "aio"), PAIRS, ids=lambda kind: kind.__name__)
def test_same_signatures(sync: type, aio: type) -> None:
    for name, member in public(sync).items():
        if not callable(member):
            continue
        ours, theirs = inspect.signature(member), inspect.signature(public(aio)[name])
        assert list(ours.parameters.values()) == list(theirs.parameters.values()), name
        assert returned(theirs) == ours.return_annotation, name


def returned(signature: inspect.Signature) -> str:
    """What is there after awaiting, in the sync client's terms."""
    annotation = str(signature.return_annotation).removeprefix("Opening[").removesuffix("]")
    if str(signature.return_annotation).startswith(("Opening[", "AsyncSessionList")):
        return annotation.removeprefix("Async")
    if str(signature.return_annotation).startswith(AsyncWatch.__name__):
        return str(signature.return_annotation).removeprefix("Async")
    # a tape of the session's own replies needs no await, one of a watch does
    return str(signature.return_annotation).removesuffix(" | AbstractAsyncContextManager[Tape]")


@pytest.mark.parametrize(("sync", "aio"), PAIRS, ids=lambda kind: kind.__name__)
def test_what_does_io_is_awaited(sync: type, aio: type) -> None:
    for name, member in public(aio).items():
        if callable(member) and name not in LOCAL:
            opens = str(inspect.signature(member).return_annotation).startswith(
                (Opening.__name__, AsyncSessionList.__name__, AsyncWatch.__name__)
            )
            assert opens or inspect.iscoroutinefunction(member), name


def test_same_connect() -> None:
    ours = inspect.signature(stepwell.connect).parameters
    theirs = inspect.signature(stepwell.aio.connect).parameters
    # a function that has the token may be a coroutine function there
    as_sync = [one.replace(annotation=str(one.annotation).replace("Async", "")) for one in theirs.values()]
    assert list(ours.values()) == as_sync


def test_exports_are_sorted_and_hold_every_error() -> None:
    assert stepwell.__all__ == sorted(stepwell.__all__)
    assert all(hasattr(stepwell, name) for name in stepwell.__all__)
    assert set(stepwell.errors.__all__) <= set(stepwell.__all__)
    for name in stepwell.errors.__all__:
        assert issubclass(getattr(stepwell, name), stepwell.StepwellError)
        assert f"── {name}" in str(stepwell.errors.__doc__) or name == "StepwellError"


def test_every_public_name_is_documented_with_an_example() -> None:
    for kind in [*(kind for pair in PAIRS for kind in pair), stepwell.State]:
        assert ">>>" in str(kind.__doc__), kind
        for name, member in vars(kind).items():
            if inspect.isfunction(member) and not name.startswith("_"):
                assert ">>>" in str(member.__doc__), (kind, name)


def modules_after(statement: str) -> set[str]:
    code = f"import json, sys\n{statement}\nprint(json.dumps(list(sys.modules)))"
    path = {"PYTHONPATH": ":".join(sys.path)}
    out = subprocess.run([sys.executable, "-c", code], env=path, capture_output=True, check=True, timeout=200)
    return set(json.loads(out.stdout))


def test_importing_is_light() -> None:
    names = "".join(f"; stepwell.{name}" for name in stepwell.__all__)
    modules = modules_after(f"import stepwell, stepwell.testing{names}")
    heavy = {"rich", "click", "safetensors", "tensorflow", "keras", "stepwell_server", "ai_edge_litert"}
    assert not {name.partition(".")[0] for name in modules} & heavy
    assert "stepwell.client" in modules


@pytest.mark.parametrize(
    "statement",
    ["import stepwell", "import stepwell.v1", "import stepwell.pytest_plugin", "from stepwell import errors"],
)
def test_what_is_not_used_is_not_imported(statement: str) -> None:
    assert not modules_after(statement) & {"numpy", "grpc", "stepwell.client", "stepwell.aio"}


EACH_IN_A_FORK = """
import os, sys
import grpc.aio, numpy  # not again for each: they are not what is tried
assert "stepwell" not in sys.modules
for name in sys.argv[1:]:
    if not (pid := os.fork()):
        exec(f"from stepwell import {name}; import stepwell; assert {name} is stepwell.{name}")
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0, name
"""


@pytest.mark.slow
def test_every_name_is_there_however_it_is_asked_for() -> None:
    """Each as the first thing that is asked of the package."""
    assert set(stepwell.__all__) <= set(dir(stepwell))
    command = [sys.executable, "-c", EACH_IN_A_FORK, *stepwell.__all__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    assert not hasattr(stepwell, "nobody")
    with pytest.raises(ImportError):
        from stepwell import nobody  # type: ignore[attr-defined]  # noqa: F401
