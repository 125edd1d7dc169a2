"""The pytest plugin in real runs of pytest, which find it by themselves."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support.models import programs

pytest_plugins = ["pytester"]

TESTS = """
import functools
import os
import pathlib
import numpy as np
import pytest
import stepwell

@pytest.fixture(scope="module")
def kept(stepwell_server):
    with stepwell.connect(stepwell_server.address) as client:
        yield client.open_session("seq", session_id="kept").id

def x(client, model):
    return np.zeros((1, *client.model(model).inputs[0].shape), np.float32)

def test_it_steps(kept, stepwell_server, stepwell_client, record_property):
    assert stepwell_server.logs().count("max_connections=77") == 1  # of stepwell_args
    stepwell_client.open_session("seq", session_id="left").step(x(stepwell_client, "seq"))
    with stepwell.connect(stepwell_server.address) as other:
        other.open_session("seq")
    stepwell_client.close()

def test_sessions_are_gone(kept, stepwell_client):
    assert [info.session_id for info in stepwell_client.sessions()] == ["kept"]

@pytest.mark.stepwell_models(marked=os.environ["GRU"])
def test_marked(stepwell_client):
    assert [model.name for model in stepwell_client.models()] == ["marked", "seq"]

def test_it_fails(stepwell_client):
    stepwell_client.open_session("seq", session_id="seen-in-the-log")
    assert 1 == 2

def test_it_kills(stepwell_server, stepwell_client):
    stepwell_server.kill()

def test_it_ends_while_sessions_are_closed(monkeypatch, stepwell_server, stepwell_client):
    short = functools.partial(stepwell.connect, connect_timeout_s=0.1)
    monkeypatch.setattr(stepwell, "connect", short)
    pids = iter([stepwell_server.pid])
    stepwell_server.kill()
    monkeypatch.setattr(type(stepwell_server), "pid", property(lambda _server: next(pids, None)))

def test_it_is_back(stepwell_server, stepwell_client):
    assert stepwell_client.sessions() == []
    pathlib.Path("pid").write_text(str(stepwell_server.pid))
"""


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A folder for a run, which finds compiled models in the tests' cache."""
    seq, gru = programs.saved("lstm_dense"), programs.saved("gru_reset_after")
    (pytester.path / "models").mkdir()
    (pytester.path / "models" / "seq.keras").symlink_to(seq.path)
    monkeypatch.setenv("STEPWELL_CACHE_DIR", str(seq.cache_dir))
    monkeypatch.setenv("GRU", str(gru.path))
    return pytester


def test_a_run_has_one_server_and_each_test_a_clean_client(run: pytest.Pytester) -> None:
    run.makeini(
        "[pytest]\nstepwell_models =\n    seq = models/seq.keras\nstepwell_args = --max-connections 77\n"
    )
    run.makepyfile(TESTS)
    result = run.runpytest_subprocess("-pno:cacheprovider", "-pno:asyncio", "-Werror", "--strict-markers")
    result.assert_outcomes(passed=6, failed=1)
    result.stdout.fnmatch_lines(
        ["*stepwell_server log*", "*session opened model=seq session=seen-in-the-log*"]
    )
    with pytest.raises(ProcessLookupError):
        os.kill(int(Path(run.path / "pid").read_text()), 0)


MISUSED = """
import pytest

def test_server(stepwell_server):
    pass
"""


@pytest.mark.parametrize(
    ("ini", "more", "message"),
    [
        ("", "", "stepwell_server needs models: name them in the ini option stepwell_models, *"),
        (
            "models/seq.keras",
            "",
            "stepwell_models must have lines NAME=PATH with different names; got 'models/seq.keras'",
        ),
        ("a = none.keras", "", "stepwell_server cannot start: *the model 'a'*none.keras'"),
        (
            "a = models/seq.keras",
            "\n@pytest.mark.stepwell_models(a='b.keras')\ndef test_other(): pass\n",
            "*test_other: the mark stepwell_models must give 'a' the model that it has elsewhere in the run, *",
        ),
        (
            "",
            "\n@pytest.fixture(scope='session')\ndef stepwell_models(): return {'a b': 'models/seq.keras'}\n",
            "stepwell_server cannot start: a name in models must be 1 to 128 letters, *; got 'a b'",
        ),
        (
            "a = models/seq.keras",
            "\n@pytest.mark.stepwell_models('b.keras')\ndef test_other(): pass\n",
            "*test_other: the mark stepwell_models must have NAME=PATH only; got 'b.keras'",
        ),
        (
            "",
            "\n@pytest.fixture(scope='session')\ndef stepwell_models(): return 'models/seq.keras'\n",
            "the fixture stepwell_models must be a mapping of names to models; got 'models/seq.keras'",
        ),
        (
            "a = models/seq.keras",
            "\n@pytest.fixture(scope='session')\ndef stepwell_args(): return '--import x'\n",
            "stepwell_server cannot start: extra_args must be a list of strings; got '--import x'",
        ),
    ],
    ids=[
        *(
            "no_models",
            "no_line",
            "no_file",
            "two_models_of_a_name",
            "no_name",
            "no_name_in_a_mark",
            "no_mapping",
        ),
        "no_list",
    ],
)
def test_what_cannot_be_served_is_said_in_one_line(
    ini: str, more: str, message: str, run: pytest.Pytester
) -> None:
    run.makeini(f"[pytest]\nstepwell_models =\n    {ini}\n")
    run.makepyfile(MISUSED + more)
    result = run.runpytest_inprocess("-pno:cacheprovider", "-pno:asyncio", "-pno:xdist", "-pno:cov")
    result.assert_outcomes(errors=1, passed="test_other" in more)
    result.stdout.fnmatch_lines([message])
    result.stdout.no_fnmatch_line("*another exception occurred*")
