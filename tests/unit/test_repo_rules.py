"""The repository's own rules find what they are there to find."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import check_repo
import pytest
import repository as files
from wrap_documents import wrapped

Write = Callable[[str, str], None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes a file of a repository that the rules are run on."""
    repository = tmp_path / "someone" / "checkout"
    repository.mkdir(parents=True)
    subprocess.run(["git", "init", "--quiet"], cwd=repository, check=True, timeout=200)
    monkeypatch.setattr(files, "ROOT", repository)

    def write_one(name: str, text: str) -> None:
        path = repository / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        subprocess.run(["git", "add", name], cwd=repository, check=True, timeout=200)
        files.tracked_files.cache_clear()
        files.text_of.cache_clear()

    yield write_one
    files.tracked_files.cache_clear()
    files.text_of.cache_clear()


def test_a_long_module_is_found_and_generated_code_is_not(write: Write) -> None:
    write("client/stepwell/long.py", "x = 1\n" * 801)
    write("client/stepwell/v1/long_pb2.py", "x = 1\n" * 801)
    write("client/stepwell/short.py", "x = 1\n" * 800)
    assert list(check_repo.module_length()) == ["client/stepwell/long.py: 801 lines, 800 at most"]


@pytest.mark.parametrize(
    "text",
    [
        "https://" + "pypi" + ".org/project/numpy",
        "-" + "-index-url https://mirror.example",
        "-" + "-extra-index-url https://mirror.example",
        '"resolved"' + ': "https://mirror.example/x.tgz"',
        "https://mirror.example/" + "simple/'",
    ],
)
def test_a_registry_host_is_found(write: Write, text: str) -> None:
    write("notes.txt", f"first\n{text}\n")
    (finding,) = check_repo.no_registry_hosts()
    assert finding.startswith("notes.txt:2:")


def test_a_lock_file_is_found(write: Write) -> None:
    write("sub/uv.lock", "")
    assert len(list(check_repo.no_lock_files())) == 1
    write(check_repo.LOCK_FILE_OF_THE_CONSOLE, '{"version": "1.2.3"}')
    assert len(list(check_repo.no_lock_files())) == 1
    write(check_repo.LOCK_FILE_OF_THE_CONSOLE, '{"resolved": "somewhere"}')
    assert len(list(check_repo.no_lock_files())) == 2


def test_a_path_of_this_machine_is_found(write: Write, tmp_path: Path) -> None:
    write("notes.md", f"see {tmp_path}/someone/else\n")
    write("fine.md", "see /usr/share/dict/words\n")
    (finding,) = check_repo.no_machine_paths()
    assert finding.startswith("notes.md:1:")


def test_a_loose_constraint_is_found(write: Write) -> None:
    write("constraints.txt", "numpy==2.4.6\ngrpcio>=1.78\n")
    write("constraints-gen.txt", "protobuf==6.33.6\n")
    write("constraints-release.txt", "twine==7.0.0\n")
    write("constraints-triton.txt", "tritonclient==2.73.0\n")
    assert list(check_repo.constraints_are_exact()) == ["constraints.txt:2: not name==version: grpcio>=1.78"]


def test_a_stale_path_in_a_document_is_found(write: Write) -> None:
    write("server/stepwell_server/engine/loop.py", "")
    write("docs/more.md", "up: [README](../README.md)\n")
    write(
        "README.md",
        "`server/stepwell_server/engine/loop.py`, `engine/loop.py`, `engine/`, `lstm/h`, `out/x.py`, [more](docs/more.md), "
        "[gone](docs/gone.md), `engine/gone.py`, `scripts/`\n",
    )
    named = [finding.split()[2] for finding in check_repo.documents_name_real_paths()]
    assert named == ["docs/gone.md,", "engine/gone.py,", "scripts/,"]


def test_a_room_without_a_line_in_the_map_is_found(write: Write) -> None:
    write("ARCHITECTURE.md", "| `cli` | commands | `x.py` |\n| `store/disk` | LMDB | `y.py` |\n")
    for name in ("cli/a.py", "cli/toolkit/b.py", "_core/c.py", "client.py"):
        write(f"client/stepwell/{name}", "")
    for name in ("store/disk/d.py", "store/disk/wal/e.py", "store/valkey/f.py"):
        write(f"server/stepwell_server/{name}", "")
    assert list(check_repo.architecture_has_each_room()) == [
        "ARCHITECTURE.md: has no line for client/stepwell/_core",
        "ARCHITECTURE.md: has no line for server/stepwell_server/store/valkey",
    ]


def test_a_stale_target_in_a_document_is_found(write: Write) -> None:
    write("Makefile", "demo: x\n\ttrue\n")
    write("README.md", "`make demo`, and make sure of `make tea`\n\n```sh\nmake coffee\n```\n")
    named = [finding.split("`")[1] for finding in check_repo.documents_name_real_targets()]
    assert named == ["make tea", "make coffee"]


@pytest.mark.parametrize(("newest", "findings"), [("0.1.0", 0), ("0.2.0", 1), ("unreleased", 1)])
def test_a_changelog_without_the_version_is_found(write: Write, newest: str, findings: int) -> None:
    write("pyproject.toml", '[project]\nversion = "0.1.0"\n')
    write("CHANGELOG.md", f"# Changelog\n\n## [{newest}]\n\n## [0.0.1]\n")
    assert len(list(check_repo.changelog_has_the_version())) == findings


def test_an_undocumented_and_an_unread_variable_are_found(write: Write) -> None:
    write("server/stepwell_server/x.py", "")
    write("scripts/apt_get.py", "")
    write("tests/support/secured.py", 'SWITCH = "STEPWELL_TEST_SOMETHING"\n')
    write("README.md", "`STEPWELL_LISTEN`, `STEPWELL_NOTHING`, `STEPWELL_TEST_SOMETHING`\n")
    findings = list(check_repo.environment_variables_are_documented())
    assert "README.md: names STEPWELL_NOTHING, which nothing reads" in findings
    assert "STEPWELL_STORE: is read, and no document names it" in findings
    assert not [finding for finding in findings if "STEPWELL_LISTEN" in finding or "SOMETHING" in finding]


def test_a_workflow_that_runs_something_of_its_own_is_found(write: Write) -> None:
    write("Makefile", "test: ## Run all tests\n\ttrue\n")
    write(".github/workflows/ci.yml", "    steps:\n      - run: .ci/run\n      - run: make test\n")
    assert list(check_repo.commands_are_make_targets()) == []
    write(".github/workflows/ci.yml", "    steps:\n      - run: pytest\n      - name: x\n        run: |\n")
    assert list(check_repo.commands_are_make_targets()) == [
        ".github/workflows/ci.yml: runs 'pytest'; must be a make target or .ci/run",
        ".github/workflows/ci.yml: runs '|'; must be a make target or .ci/run",
    ]


def test_a_hook_that_is_no_make_target_is_found(write: Write) -> None:
    write("Makefile", "check-lint: ## Does ruff find anything?\n\ttrue\n")
    hooks = "repos:\n  - repo: local\n    hooks:\n      - entry: make -o .venv/.installed check-lint\n"
    write(".pre-commit-config.yaml", hooks)
    assert list(check_repo.commands_are_make_targets()) == []
    write(
        ".pre-commit-config.yaml", hooks + "      - entry: make check-types\n  - repo: https://x.example/y\n"
    )
    assert list(check_repo.commands_are_make_targets()) == [
        ".pre-commit-config.yaml: hooks must be local, make targets; got those of https://x.example/y",
        ".pre-commit-config.yaml: runs 'make check-types'; must be a make target",
    ]


def test_versions_of_python_that_disagree_are_found(write: Write) -> None:
    write("Makefile", "SUPPORTED := not (3, 11) <= sys.version_info[:2] <= (3, 12)\n")
    write(
        "pyproject.toml",
        '[project]\nrequires-python = ">=3.11,<3.13"\n'
        'classifiers = ["Programming Language :: Python :: 3.11", "Programming Language :: Python :: 3.12"]\n',
    )
    write(".github/workflows/ci.yml", '        python: ["3.11", "3.12"]\n')
    assert list(check_repo.python_versions_agree()) == []
    write(".github/workflows/ci.yml", '        python: ["3.11"]\n')
    assert list(check_repo.python_versions_agree()) == [
        ".github/workflows/ci.yml: must be Python ['3.11', '3.12'], as requires-python says; is ['3.11']"
    ]


@pytest.mark.parametrize("text", ["no line break", "a space \n", "a tab\tinside\n", "carriage return\r\n"])
def test_what_goes_against_the_editorconfig_is_found(write: Write, text: str) -> None:
    write("notes.txt", text)
    (finding,) = check_repo.files_keep_the_editorconfig()
    assert finding.startswith("notes.txt")


def test_a_module_without_a_docstring_is_found(write: Write) -> None:
    write("tests/unit/test_one.py", '"""Ones."""\n')
    write("tests/unit/__init__.py", "")
    write("tests/unit/test_two.py", "# Twos.\nimport re\n")
    assert list(check_repo.modules_say_what_they_hold()) == [
        "tests/unit/test_two.py: must begin with a docstring that says what it holds"
    ]


LONG = "word " * 30
"""150 columns."""


def test_prose_is_wrapped_and_what_is_no_prose_is_left_alone() -> None:
    left_alone = [
        f"# {LONG}",
        f"| {LONG} |",
        f"```\n{LONG}\n```",
        f"<!-- {LONG} -->",
        "x" * 150,
        "short\nlines\n",
    ]
    for text in left_alone:
        assert wrapped(text) == text
    text = f"{LONG}\nand more\n\n- {LONG}\n  and more\n- short\n"
    new = wrapped(text)
    assert max(len(line) for line in new.split("\n")) <= 100
    assert new.split() == text.split()
    assert wrapped(new) == new
    assert [line[:6] for line in new.split("\n")] == ["word w"] * 2 + ["", "- word", "  word", "- shor", ""]


def test_a_code_span_stays_on_one_line_and_no_line_begins_what_it_does_not_mean() -> None:
    text = f"{'a' * 90} `make test ARGS=x` and {'b ' * 33}- c {'d ' * 30}"
    new = wrapped(text)
    assert "`make test ARGS=x`" in new
    assert not [line for line in new.split("\n") if line.startswith("- ")]
    assert new.split() == text.split()


def test_a_document_that_is_not_wrapped_is_found(write: Write) -> None:
    write("docs/page.md", LONG)
    (finding,) = check_repo.documents_are_wrapped()
    assert finding.startswith("docs/page.md")
