"""The pytest plugin: a real server with your models, for tests of code that uses them.

pytest loads it wherever this package is installed; `-p no:stepwell` disables it. It has two fixtures:

- `stepwell_server`, one for the whole run: a `stepwell.testing.LocalServer`. It starts when the first test requests
  it, and keeps sessions in memory.
- `stepwell_client`, one for each test: a `stepwell.Client` of that server. After the test it closes the sessions that
  the test has opened, with any client. If the test has killed the server, the next test gets a new one.

The server serves the models that you name in one of three ways:

- the ini option `stepwell_models`, with a line NAME=PATH for each model;
- a fixture `stepwell_models` of your own (scope "session"), which returns paths or Keras models by name and replaces
  the option;
- marks `@pytest.mark.stepwell_models(NAME=PATH, ...)` of the tests in the run.

Paths are relative to the ini file. `stepwell_args`, an ini option or a fixture, has additional options of `stepwell
serve`. If a test that uses the server fails, the report shows the last lines of its log.

The fixtures import the heavy packages, so a run that does not use them pays nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from stepwell import Client
    from stepwell._admin.model_files import ModelSource
    from stepwell.testing import LocalServer

_MODELS = "stepwell_models"
_ARGS = "stepwell_args"
_SHOWN_LINES = 30


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the ini options."""
    parser.addini(
        _MODELS, "models for the fixture stepwell_server, a line NAME=PATH for each", "linelist", []
    )
    parser.addini(_ARGS, "further options of `stepwell serve` for the fixture stepwell_server", "args", [])


def pytest_configure(config: pytest.Config) -> None:
    """Registers the mark."""
    config.addinivalue_line(
        "markers", f"{_MODELS}(NAME=PATH, ...): models that the test needs from the fixture stepwell_server"
    )


@pytest.fixture(scope="session")
def stepwell_models(pytestconfig: pytest.Config) -> Mapping[str, ModelSource]:
    """The models by name, from the ini option. Define a fixture of this name to replace it."""
    models: dict[str, ModelSource] = {}
    for line in pytestconfig.getini(_MODELS):
        name, equals, path = (part.strip() for part in line.partition("="))
        if not (name and equals and path) or name in models:
            pytest.fail(
                f"{_MODELS} must have lines NAME=PATH with different names; got {line!r}", pytrace=False
            )
        models[name] = _folder(pytestconfig) / path
    return models


@pytest.fixture(scope="session")
def stepwell_args(pytestconfig: pytest.Config) -> list[str]:
    """Options of `stepwell serve`, from the ini option. Define a fixture of this name to replace it."""
    args: list[str] = pytestconfig.getini(_ARGS)
    return args


@pytest.fixture(scope="session")
def stepwell_server(
    request: pytest.FixtureRequest,
    stepwell_models: Mapping[str, ModelSource],
    stepwell_args: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[LocalServer]:
    """A server with all models that the run needs."""
    from stepwell._admin import model_files
    from stepwell.errors import InvalidInputError
    from stepwell.testing import LocalServer, ServerStartError

    models = _with_marked(request.session, stepwell_models)
    if not models:
        pytest.fail(
            f"stepwell_server needs models: name them in the ini option {_MODELS}, in a fixture {_MODELS} of your own, "
            f"or by @pytest.mark.{_MODELS}(NAME=PATH)",
            pytrace=False,
        )
    folder = str(tmp_path_factory.mktemp("stepwell"))
    try:
        sources = model_files.named(models, None)
        files = {name: model_files.file_of(name, source, folder) for name, source in sources.items()}
        server = LocalServer({name: file.path for name, file in files.items()}, extra_args=stepwell_args)
        server.start()
    except (InvalidInputError, OSError, ServerStartError) as error:
        raise pytest.fail.Exception(f"stepwell_server cannot start: {error}", pytrace=False) from None
    with contextlib.ExitStack() as stack:
        stack.callback(server.kill)
        yield server


@pytest.fixture
def stepwell_client(stepwell_server: LocalServer) -> Iterator[Client]:
    """A client for one test."""
    import stepwell

    if stepwell_server.pid is None:
        stepwell_server.restart()
    with stepwell.connect(stepwell_server.address) as client:
        before = {info.session_id for info in client.sessions()}
        yield client
    if stepwell_server.pid is None:
        return
    try:
        # Not with the test's client, which the test may have closed.
        with stepwell.connect(stepwell_server.address) as client:
            for info in client.sessions():
                if info.session_id not in before:
                    with contextlib.suppress(stepwell.SessionGoneError):
                        client.close_session(info.session_id)
    except stepwell.UnavailableError:
        if stepwell_server.pid is not None:
            raise  # otherwise it has just ended, and its sessions with it


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Adds the server's log to the report of a failed test that uses it."""
    report = yield
    if report.failed:
        server: LocalServer | None = getattr(item, "funcargs", {}).get("stepwell_server")
        if server is not None:
            lines = server.logs().splitlines()[-_SHOWN_LINES:]
            report.sections.append(("stepwell_server log", "\n".join(lines)))
    return report


def _folder(config: pytest.Config) -> Path:
    return config.rootpath if config.inipath is None else config.inipath.parent


def _with_marked(session: pytest.Session, models: Mapping[str, ModelSource]) -> dict[str, ModelSource]:
    """Returns the models, with those that the marks of all tests of the run add."""
    if not isinstance(models, Mapping):
        pytest.fail(
            f"the fixture {_MODELS} must be a mapping of names to models; got {models!r}", pytrace=False
        )
    found = dict(models)
    for item in session.items:
        for mark in item.iter_markers(_MODELS):
            if mark.args:
                pytest.fail(
                    f"{item.nodeid}: the mark {_MODELS} must have NAME=PATH only; got {mark.args[0]!r}",
                    pytrace=False,
                )
            for name, source in mark.kwargs.items():
                own = _folder(item.config) / source if isinstance(source, str | Path) else source
                if found.setdefault(name, own) != own:
                    pytest.fail(
                        f"{item.nodeid}: the mark {_MODELS} must give {name!r} the model that it has elsewhere in the run, "
                        f"{found[name]}; got {own}",
                        pytrace=False,
                    )
    return found
