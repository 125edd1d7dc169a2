"""The first steps, and the pages about notebooks and tests: their code runs as they say."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

pytest_plugins = ["pytester"]

BLOCK = re.compile(r"^```(python|ini|sh|text)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, kind: str) -> list[str]:
    found = [code for language, code in BLOCK.findall(page.read_text()) if language == kind]
    assert found
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras's own, when saving
def test_the_first_steps(
    root: Path,
    compiled: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In order, in one namespace, with a server that is started, killed and started again where the page says so."""
    from stepwell.testing import LocalServer

    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    server: LocalServer | None = None
    printed = ""
    done = []
    with contextlib.ExitStack() as stack:
        for kind, code in BLOCK.findall((root / "docs" / "tutorials" / "first-steps.md").read_text()):
            if kind == "text":
                assert printed == code
            elif kind == "python":
                source = code.replace("127.0.0.1:50051", server.address) if server else code
                exec(compile(source, "first-steps.md", "exec"), names)  # noqa: S102  our own documentation
                printed = capsys.readouterr().out
            elif code.startswith("kill -9 "):
                assert server is not None
                server.kill()
            elif code == "stepwell serve forecast=forecast.keras\n" and server is None:
                served = LocalServer(
                    models={"forecast": Path("forecast.keras")},
                    data_dir=tmp_path / "data",
                    cache_dir=compiled,
                )
                server = stack.enter_context(served)
            elif code.startswith("stepwell serve ") and server is not None:
                server.restart()
            else:
                assert code.startswith("pip install ")
            done.append(kind)
    assert (done.count("sh"), done.count("text")) == (4, 4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras's own, when saving
def test_the_page_for_notebooks(
    root: Path, compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As cells, in order, in one namespace; the model is compiled beforehand, in this process."""
    from stepwell._admin import model_files
    from support.models import programs

    class Served:
        """The file that `stepwell.local` makes of the page's model."""

        def save(self, path: Path) -> None:
            made = model_files.file_of("made", names["model"], str(path.parent))
            Path(made.path).rename(path)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEPWELL_CACHE_DIR", str(compiled))
    names: dict[str, Any] = {"__name__": "__main__"}
    shown = []
    with asyncio.Runner() as runner:
        for number, block in enumerate(blocks(root / "docs" / "tutorials" / "notebooks.md", "python")):
            tree = ast.parse(block)
            last = tree.body[-1]
            if isinstance(last, ast.Expr):  # a cell shows the value of its last line
                tree.body[-1] = ast.Assign([ast.Name("shown", ast.Store())], last.value)
            ast.fix_missing_locations(tree)
            code = compile(tree, "notebooks.md", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            value = eval(code, names)  # noqa: S307  our own documentation
            if inspect.iscoroutine(value):
                runner.run(_awaited(value))
            if number == 0:
                programs.saved("notebooks_page", Served)
            value = names.pop("shown", None)
            if hasattr(value, "_repr_html_"):
                shown.append(type(value).__name__)
    assert shown == ["Listing", "SessionList", "State", "DataArray"]
    assert (names["first"].batch_size, names["frame"].shape) == (1, (4, 32))
    assert names["client"].server.pid is None


async def _awaited(value: Any) -> Any:
    return await value


@pytest.mark.slow
def test_the_page_for_tests(
    root: Path,
    model_path: Path,
    compiled: Path,
    pytester: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    page = root / "docs" / "guides" / "testing.md"
    (pytester.path / "models").mkdir()
    (pytester.path / "models" / "forecast.keras").symlink_to(model_path)
    monkeypatch.setenv("STEPWELL_CACHE_DIR", str(compiled))
    (ini,) = blocks(page, "ini")
    pytester.makeini(ini)
    code = "\n".join(blocks(page, "python"))
    pytester.makepyfile(code)
    result = pytester.runpytest_subprocess(
        "-pno:cacheprovider", "-pno:asyncio", "-Werror", "--strict-markers"
    )
    result.assert_outcomes(passed=code.count("\ndef test_"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras's own, when saving
def test_the_page_on_convolutions(
    root: Path,
    compiled: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its blocks run in order, in one namespace, and print what their comments say."""
    from stepwell.testing import LocalServer

    built, stepped, costs, module, own = blocks(root / "docs" / "guides" / "convolutions.md", "python")
    (tmp_path / "smoothing.py").write_text(module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(built + own, names)  # noqa: S102  our own documentation
    with LocalServer(
        {name: tmp_path / f"{name}.keras" for name in ("forecast", "smoothed")},
        cache_dir=compiled,
        env={"PYTHONPATH": str(tmp_path)},
        extra_args=["--import", "smoothing"],
        start_timeout_s=100,
    ) as server:
        exec(stepped.replace("127.0.0.1:50051", server.address) + costs, names)  # noqa: S102
        with names["stepwell"].connect(server.address) as client, client.open_session("smoothed") as session:
            assert list(session.get_state()) == ["smooth/state", "conv/last"]
    windows, *numbers = capsys.readouterr().out.splitlines()
    said = re.findall(r"# (.*)", stepped + costs)
    assert windows.startswith(said[0].removesuffix("...}"))
    assert numbers == [comment.split()[0] for comment in said[1:]]
