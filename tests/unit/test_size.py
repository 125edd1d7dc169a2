"""Sizes are counted as scripts/size.py says, and its bounds can only be kept."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import repository
import size

PYTHON = '''"""A docstring is none."""

import os  # 1

LIMIT = (
    1,
    2,
)  # 2


class Store:  # 3
    """Neither is this."""

    limit: int = 0  # 4
    """Nor this."""

    def read(self, path: str) -> str | None:  # 5
        # a comment
        if os.path.exists(path):  # 6
            return path; print("x")  # 7, 8
        elif path:  # 9
            pass  # 10
        "nor this"
        return None  # 11
'''

LUA_IN_PYTHON = '''SCRIPT = """
local value = redis.call("GET", KEYS[1])

return value
"""
OTHER = """
no Lua
"""
'''

RUST = """\
//! About the module.
#![warn(missing_docs)]

/* A comment
   of two lines. */
use std::fmt;

/// About the function.
fn main() {
    // a comment
    let x = 1; // counts
}
"""

LUA = """\
-- a comment
local x = 1

return x -- counts
"""


def of_one(name: str, text: str) -> size.Size:
    return size.size_of({name: text})


@pytest.mark.parametrize(
    ("name", "text", "count"),
    [
        ("client/stepwell/a.py", PYTHON, 11),
        ("client/stepwell/a.py", LUA_IN_PYTHON, 2 + 2),
        ("client/stepwell/a.rs", RUST, 4),
        ("client/stepwell/a.lua", LUA, 2),
        ("client/stepwell/a.ts", RUST, 4),
        ("client/stepwell/a.sh", "#!/bin/sh\n\nls\n", 1),
    ],
    ids=["Python", "Lua in Python", "Rust", "Lua", "TypeScript", "shell"],
)
def test_python_counts_by_statements_and_other_code_by_lines(name: str, text: str, count: int) -> None:
    assert of_one(name, text).rooms == {"client/stepwell": count}


@pytest.mark.parametrize(
    ("name", "room"),
    [
        ("client/stepwell/a.py", "client/stepwell"),
        ("client/stepwell/cli/a.py", "client/stepwell/cli"),
        ("client/stepwell/cli/top/a.py", "client/stepwell/cli"),
        ("server/stepwell_server/store/disk/a.py", "server/stepwell_server/store"),
        ("server/front/src/serve/a.rs", "server/front/src"),
        ("scripts/a.py", "scripts"),
        ("tests/unit/a.py", "tests"),
        ("tests/support/sim/a.py", "tests"),
    ],
)
def test_a_room_is_a_folder_of_a_package_or_a_folder_at_the_top(name: str, room: str) -> None:
    assert of_one(name, "x = 1\n").rooms == {room: 1}


def test_generated_code_does_not_count_and_text_of_the_product_does() -> None:
    names = ("client/stepwell/v1/a_pb2.py", "client/stepwell/v1/a_pb2_grpc.pyi", "docs/a.json", "docs/a.py")
    assert [size.counts_at_all(name) for name in names] == [False, False, False, True]
    moved = "server/stepwell_server/rules.json"
    assert size.counts_at_all(moved)
    counted = of_one(moved, '{"code":\n\n"x = 1"}\n')
    assert counted.rooms == {}
    assert counted.counts["lines_of_other_text"] == 2


def test_what_makes_code_heavy_is_counted() -> None:
    def constructor(count: int) -> str:
        names = [f"a{number}: int" for number in range(count - 1)]
        return f"class A:\n    def __init__(self, {', '.join(names)}, *, last: int) -> None: ...\n"

    files = {f"server/stepwell_server/core/m{number}.py": "" for number in range(14)}
    files["server/stepwell_server/core/heavy.py"] = constructor(8) + "MOST_ROWS = 1  # what it is told\n"
    assert not any(count for name, count in size.size_of(files).counts.items() if name != "words_to_decode")
    files["server/stepwell_server/core/more.py"] = (
        constructor(9) + "store.is_local or store.local is not None\n"
    )
    files["tests/unit/long.py"] = constructor(9) + "\n" * 799
    assert size.size_of(files).counts == {
        "files_over_800_lines": 1,
        "folders_over_15_modules": 1,
        "constructors_over_8_arguments": 1,
        "words_to_decode": 2,
        "words_to_decode_in_documents": 0,
        "questions_about_the_kind_of_store": 2,
        "lines_of_other_text": 0,
    }


@pytest.mark.parametrize(
    ("name", "text", "in_code", "in_documents"),
    [
        ("server/stepwell_server/core/a.py", "# it goes\n# on, and it is told\nSTEPS_AT_ONCE = 1\n", 3, 0),
        ("server/front/src/a.rs", "/// It goes\n/// on: MOST_ROWS.\n", 2, 0),
        ("README.md", "It goes on. All but for\none are told apart, with what is under way on it.\n", 0, 2),
        ("docs/guides/client.md", "- It goes\n  on.\n\n> Callers are\n> told.\n", 0, 2),
        ("proto/stepwell/v1/a.proto", "// One of those\n// that ended.\n", 0, 1),
        (
            "CONTRIBUTING.md",
            "| instead of | write |\n| --- | --- |\n| goes on | continues |\n\nIt goes on.\n",
            0,
            1,
        ),
        ("docs/surface/sdk.txt", "It goes on.\n", 0, 0),
        ("docs/reference/cli.md", "It goes on.\n", 0, 0),
        ("proto/google/api/http.proto", "// It goes on.\n", 0, 0),
        ("tests/support/README.md", "It goes on.\n", 0, 0),
    ],
)
def test_words_to_decode_count_in_the_product_and_in_documents(
    name: str, text: str, in_code: int, in_documents: int
) -> None:
    files = {name: text} if size.counts_at_all(name) else {}
    counts = size.size_of(files).counts
    assert (counts["words_to_decode"], counts["words_to_decode_in_documents"]) == (in_code, in_documents)
    assert counts["lines_of_other_text"] == 0


Write = Callable[[str, int], None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes modules of so many statements into a repository of the test's own."""
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True, timeout=200)
    monkeypatch.setattr(repository, "ROOT", tmp_path)
    (tmp_path / "scripts").mkdir()

    def write_one(name: str, count: int) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1\n" * count)
        subprocess.run(["git", "add", name], cwd=tmp_path, check=True, timeout=200)
        repository.tracked_files.cache_clear()
        repository.text_of.cache_clear()

    yield write_one
    repository.tracked_files.cache_clear()
    repository.text_of.cache_clear()


@pytest.fixture
def check(write: Write, capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """Holds a repository with bounds of 1,000 and 100 against them, and returns what is found."""
    write("client/stepwell/a.py", 1000)
    write("tests/unit/a.py", 100)
    assert size.main(["--update"]) == 0
    capsys.readouterr()

    def run() -> str:
        code = size.main(["--check"])
        found = capsys.readouterr().out
        assert code == bool(found)
        return found

    assert run() == ""
    return run


def bounds() -> dict[str, int]:
    read = size.read_bounds()
    assert read is not None
    return dict(read.rooms)


def test_a_room_over_its_bound_is_found_and_only_raised_by_name(
    write: Write, check: Callable[[], str]
) -> None:
    write("client/stepwell/a.py", 1001)
    write("tests/unit/a.py", 101)
    assert "client/stepwell: 1001, at most 1000 (+1)" in check()
    assert size.main(["--update"]) == 1
    assert bounds() == {"client/stepwell": 1000, "tests": 100}
    assert size.main(["--raise", "tests"]) == 1
    assert bounds() == {"client/stepwell": 1000, "tests": 101}
    assert size.main(["--raise", "client/stepwell"]) == 0


def test_a_bound_far_over_its_count_is_found_so_that_gains_are_kept(
    write: Write, check: Callable[[], str]
) -> None:
    write("client/stepwell/a.py", 981)
    write("tests/unit/a.py", 90)
    assert check() == ""
    write("client/stepwell/a.py", 980)
    write("tests/unit/a.py", 89)
    found = check()
    assert "client/stepwell: 980, the bound is 1000: lower it" in found
    assert "tests: 89, the bound is 100: lower it" in found
    assert size.main(["--update"]) == 0
    assert bounds() == {"client/stepwell": 980, "tests": 89}


def test_a_room_without_a_line_and_a_line_without_a_room_are_found(
    write: Write, check: Callable[[], str]
) -> None:
    write("server/front/src/a.rs", 5)
    write("client/stepwell/a.py", 0)
    found = check()
    assert "server/front/src: has no line" in found
    assert "client/stepwell: has a line in scripts/size.toml and no code" in found
    assert size.main(["--update"]) == 1
    assert bounds() == {"tests": 100}
    assert size.main(["--raise", "server/front/src"]) == 0
    assert bounds() == {"tests": 100, "server/front/src": 5}


def test_a_room_to_raise_must_be_there(
    write: Write, check: Callable[[], str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        size.main(["--raise", "client/stepwel"])
    assert "--raise: must be a room that has code, one of client/stepwell, tests; got client/stepwel" in (
        capsys.readouterr().err
    )


def test_other_counts_may_only_fall(check: Callable[[], str]) -> None:
    path = repository.ROOT / size.BOUNDS
    text = path.read_text()
    path.write_text(text.replace("words_to_decode = 0", "words_to_decode = 1"))
    assert "words_to_decode: 0, the bound is 1: lower it" in check()
    module = repository.ROOT / "client" / "stepwell" / "a.py"
    module.write_text(module.read_text() + "# it is told what goes on, and is told\n")
    repository.text_of.cache_clear()
    assert "words_to_decode: 3, at most 1, which may only fall" in check()
    assert size.main(["--update"]) == 1


def test_two_commits_are_compared(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    write("client/stepwell/a.py", 1000)
    write("server/front/rules.txt", 3)
    (repository.ROOT / "server" / "front" / "LICENSE").symlink_to("rules.txt")
    git = ["git", "-c", "user.name=Ann", "-c", "user.email=ann@example.org"]
    subprocess.run(["git", "add", "."], cwd=repository.ROOT, check=True, timeout=200)
    subprocess.run([*git, "commit", "--quiet", "-m", "One"], cwd=repository.ROOT, check=True, timeout=200)
    write("client/stepwell/a.py", 1050)
    write("tests/unit/a.py", 7)
    assert size.main(["--since", "HEAD"]) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["1,000", "1,050", "+50", "client/stepwell"] in shown
    assert ["0", "7", "+7", "tests"] in shown
    assert ["1,000", "1,050", "+50", "product"] in shown
    assert ["3", "3", "lines_of_other_text"] in shown
