"""Every piece of Python in the documents and docstrings runs, against a real server, and prints what it says."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import doctest
import importlib
import inspect
import io
import logging
import os
import pkgutil
import re
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import stepwell
import stepwell.testing
from stepwell.testing import LocalServer

README_ADDRESS = "127.0.0.1:50051"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
SERVE = re.compile(r"stepwell serve ([\w.-]+)=(\S+\.keras)")
TOP_LEVEL_AWAIT = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def public_modules() -> list[ModuleType]:
    """The modules of the SDK that have examples; not the generated ones, not the command line."""
    names = [info.name for info in pkgutil.iter_modules(stepwell.__path__, "stepwell.")]
    skipped = {"stepwell.__main__", "stepwell.cli", "stepwell.v1"}
    return [stepwell, *(importlib.import_module(name) for name in names if name not in skipped)]


def examples() -> dict[str, doctest.DocTest]:
    """The docstrings with examples, by name."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = [test for module in public_modules() for test in finder.find(module, module.__name__)]
    return {test.name: test for test in found if test.examples}


EXAMPLES = examples()
DOCUMENTED = (stepwell, stepwell.aio, stepwell.config, stepwell.errors, stepwell.events, stepwell.testing)


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """The event loop of the examples that await."""
    with asyncio.Runner() as running:
        yield running


@contextlib.asynccontextmanager
async def async_world(address: str) -> AsyncIterator[dict[str, Any]]:
    async with stepwell.aio.connect(address) as client, client.open_session("forecast") as session:
        yield {"client": client, "session": session}


@contextlib.contextmanager
def sync_world(address: str) -> Iterator[dict[str, Any]]:
    with stepwell.connect(address) as client, client.open_session("forecast") as session:
        yield {"client": client, "session": session}


@contextlib.contextmanager
def world(name: str, runner: asyncio.Runner, address: str) -> Iterator[dict[str, Any]]:
    """The `client` and `session` of an example: those of the module it stands in."""
    if not name.startswith("stepwell.aio"):
        with sync_world(address) as names:
            yield names
        return
    entered = async_world(address)
    names = runner.run(entered.__aenter__())
    try:
        yield names
    finally:
        runner.run(entered.__aexit__(None, None, None))


async def result_of(awaitable: Any) -> Any:
    return await awaitable


def output_of(example: doctest.Example, names: dict[str, Any], runner: asyncio.Runner) -> str:
    """What one example prints, its value included; it may await."""
    code = compile(example.source, "<example>", "single", TOP_LEVEL_AWAIT, dont_inherit=True)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        value = eval(code, names)  # noqa: S307  our own documentation
        if inspect.iscoroutine(value):
            runner.run(result_of(value))
    return printed.getvalue()


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_the_example_of(
    name: str,
    runner: asyncio.Runner,
    server: LocalServer,
    model_path: Path,
    compiled: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEPWELL_CACHE_DIR", str(compiled))
    checker = doctest.OutputChecker()
    given = {"stepwell": stepwell, "np": np, "address": server.address, "model_path": model_path}
    with world(name, runner, server.address) as own:
        names = given | own
        for example in EXAMPLES[name].examples:
            got = output_of(example, names, runner)
            assert checker.check_output(example.want, got, OPTIONS), f"{example.source}-> {got}"


def public_names() -> Iterator[tuple[str, str]]:
    """Every public class, function and method by its full name, with the docstrings that may hold its example."""
    for module in DOCUMENTED:
        for name in getattr(module, "__all__", vars(module)):
            member = getattr(module, name)
            home = getattr(member, "__module__", None) or ""
            public = module is stepwell or (home.startswith("stepwell.") and "._" not in home)
            if (
                name.startswith("_")
                or not public
                or not (inspect.isclass(member) or inspect.isfunction(member))
            ):
                continue
            text = inspect.getdoc(member) or ""
            yield f"{module.__name__}.{name}", text
            if inspect.isclass(member):
                for own, method in vars(member).items():
                    inherited = any(hasattr(base, own) for base in member.__mro__[1:])
                    if inspect.isfunction(method) and not own.startswith("_") and not inherited:
                        shown = text if f".{own}(" in text else ""
                        yield f"{module.__name__}.{name}.{own}", (inspect.getdoc(method) or "") + shown


PUBLIC = dict(public_names())


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_the_public_name_is_documented(name: str) -> None:
    assert PUBLIC[name]
    assert name.endswith("Error") or ">>>" in PUBLIC[name], (
        "a public name has an example, or its class shows it"
    )


def test_the_page_on_steps(root: Path, server: LocalServer) -> None:
    """Its blocks run in order, with a client and a session of four rows."""
    blocks = BLOCK.findall((root / "docs" / "guides" / "steps.md").read_text())
    assert len(blocks) > 3
    with stepwell.connect(server.address) as client, client.open_session("forecast", batch_size=4) as session:
        names: dict[str, Any] = {"stepwell": stepwell, "np": np, "client": client, "session": session}
        for block in blocks:
            exec(compile(block, "steps.md", "exec", dont_inherit=True), names)  # noqa: S102  our own documentation


@pytest.mark.parametrize(
    ("document", "section"),
    [
        ("README.md", ""),
        pytest.param("docs/index.md", "", marks=pytest.mark.slow),
        ("docs/guides/client.md", ""),
        pytest.param("docs/guides/many-users.md", "", marks=pytest.mark.slow),
        pytest.param("docs/guides/record.md", "", marks=pytest.mark.slow),
        pytest.param("docs/guides/sessions.md", "", marks=pytest.mark.slow),
        pytest.param("docs/guides/watch.md", "", marks=pytest.mark.slow),
        ("docs/operate/run.md", "## Look after sessions"),
    ],
)
def test_the_blocks_of(
    document: str,
    section: str,
    root: Path,
    model_path: Path,
    compiled: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its blocks, from a section on, run in order, in one namespace; the server starts before the first that names its address.

    It serves the model of the document's own `stepwell serve NAME=PATH` if an earlier block has saved it there, else
    the tests' model under the name `forecast`.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEPWELL_CACHE_DIR", str(compiled))  # for what the README starts by itself
    log = logging.getLogger("stepwell")
    monkeypatch.setattr(log, "level", log.level)  # put back afterwards: a block may set it
    text = (root / document).read_text()
    text = text[text.index(section) :]
    blocks = BLOCK.findall(text)
    assert blocks, f"{document} has no Python block"
    if document == "docs/guides/client.md":  # it loads the file of the model that is served already
        shutil.copy(model_path, "forecast.keras")
    names: dict[str, Any] = {"__name__": "__main__"}
    with contextlib.ExitStack() as stack:
        address = None
        for block in blocks:
            if README_ADDRESS in block and address is None:
                served = dict(SERVE.findall(text))
                models = {name: path for name, path in served.items() if os.path.exists(path)}
                running = LocalServer(models=models or {"forecast": model_path}, cache_dir=compiled)
                address = stack.enter_context(running).address
            source = block.replace(README_ADDRESS, address or README_ADDRESS)
            exec(compile(source, document, "exec", dont_inherit=True), names)  # noqa: S102  our own documentation
