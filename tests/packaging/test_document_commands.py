"""Every `stepwell ...` command of the documents is one that the command line accepts."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from stepwell.cli import main

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    page
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "deploy").rglob("*.md")]
    if page.name != "CHANGELOG.md"  # history
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHELLS = {"sh", "bash", "console"}
INLINE = re.compile(r"`(stepwell [^`]*)`")
IN_UNITS = re.compile(r"^(?:ExecStart=\S*/|\s*command:\s*)(stepwell .*)$", re.MULTILINE)
"""systemd units and the like, whose lines are commands."""
PROGRAM = "stepwell"
SEPARATORS = {";", "|", "&&", "||", "&", ">", "<", ">>", "(", ")"}
PLACEHOLDERS = {"ADDRESS": "127.0.0.1:50051"}
"""What a page writes for a value that its reader has, where the command line judges the value."""
FILES = (
    *("stepwell.toml", "sequences.npy", "forecast.sessions", "all.sessions", "old.sessions", "etc/valkey"),
    *("etc/stepwell.toml", "etc/server.crt", "etc/server.key", "etc/tokens"),
)
"""Files that commands of the documents read and that readers have."""
PYTHON_PAGES = {
    "README.md": "tests/packaging/test_examples.py",
    "docs/guides/client.md": "tests/packaging/test_examples.py",
    "docs/guides/sessions.md": "tests/packaging/test_examples.py",
    "docs/guides/record.md": "tests/packaging/test_examples.py",
    "docs/guides/watch.md": "tests/packaging/test_examples.py",
    "docs/guides/many-users.md": "tests/packaging/test_examples.py",
    "docs/guides/convolutions.md": "tests/packaging/test_pages.py",
    "docs/guides/decoders.md": "tests/integration/test_decoders.py",
    "docs/guides/other-languages.md": "tests/packaging/test_other_languages.py",
    "docs/index.md": "tests/packaging/test_examples.py",
    "docs/operate/run.md": "tests/packaging/test_production_page.py",
    "docs/guides/steps.md": "tests/packaging/test_examples.py",
    "docs/tutorials/first-steps.md": "tests/packaging/test_pages.py",
    "docs/tutorials/notebooks.md": "tests/packaging/test_pages.py",
    "docs/guides/testing.md": "tests/packaging/test_pages.py",
    "docs/tutorials/seed.md": "tests/integration/test_seed_docs.py",
    "docs/guides/coming-from-triton.md": "tests/integration/test_triton_clients.py",
    "docs/guides/pytorch.md": "tests/integration/test_pytorch.py",
    "docs/guides/speech.md": "tests/packaging/test_vad.py",
    "docs/guides/reinforcement-learning.md": "tests/integration/test_examples.py",
}
"""The test that runs all Python blocks of a page."""


def commands_in_shell(text: str) -> Iterator[list[str]]:
    """The arguments of each `stepwell` in a block of shell."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
        words.whitespace_split = True
        for is_separator, part in itertools.groupby(words, SEPARATORS.__contains__):
            found = list(part)
            if is_separator:
                continue
            places = [place for place, word in enumerate(found) if Path(word).name == PROGRAM]
            for place in places[:1]:
                if all("=" in word or word in {"sudo", "exec", "time"} for word in found[:place]):
                    yield found[place + 1 :]


def inline_commands(text: str) -> Iterator[list[str]]:
    """The same of `stepwell ...` between backticks; `load|unload` stands for two commands."""
    for found in INLINE.findall(re.sub(r"\s+", " ", FENCE.sub("", text))):
        words = shlex.split(found)[1:]
        for chosen in itertools.product(*(word.split("|") if word[0] != "-" else [word] for word in words)):
            yield list(chosen)


def commands_of(page: Path) -> Iterator[tuple[list[str], bool]]:
    """Arguments of each command of a page, and whether it must be whole: a name in a sentence need not be."""
    text = page.read_text()
    for language, block in FENCE.findall(text):
        if language in SHELLS:
            yield from ((found, True) for found in commands_in_shell(block))
        yield from ((shlex.split(found)[1:], True) for found in IN_UNITS.findall(block))
    yield from ((found, False) for found in inline_commands(text))


COMMANDS = {
    f"{page.relative_to(ROOT)}: {shlex.join(found)}": (found, is_whole)
    for page in PAGES
    for found, is_whole in commands_of(page)
}


def parse(arguments: list[str], *, is_whole: bool) -> None:
    """Parse a command line as the program does, and run nothing.

    Raises:
        click.UsageError: the command line is wrong.
    """
    command: click.Command = main
    context = click.Group.make_context(main, PROGRAM, list(arguments))
    while isinstance(command, click.Group):
        rest = [*context._protected_args, *context.args]
        if not rest and (command.invoke_without_command or not is_whole):
            return
        name, chosen, rest = command.resolve_command(context, rest)
        assert chosen is not None
        context = chosen.make_context(name, rest, parent=context)
        command = context.command


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the documents' commands read."""
    monkeypatch.chdir(tmp_path)
    for name in FILES:
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.touch(mode=0o600)
    (tmp_path / "etc/valkey").write_text("a password")
    (tmp_path / "etc/valkey").chmod(0o600)
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_line_accepts(command: str, home: Path) -> None:
    arguments, is_whole = COMMANDS[command]
    given = [PLACEHOLDERS.get(word, word).replace("/etc/stepwell/", f"{home}/etc/") for word in arguments]
    try:
        parse(given, is_whole=is_whole)
    except click.exceptions.Exit:
        pass  # --help, --version
    except (click.MissingParameter, click.exceptions.NoArgsIsHelpError):
        if is_whole:
            raise
    except click.BadOptionUsage as error:
        # a sentence may name an option without its value
        if is_whole or "requires an argument" not in error.message or given[-1] != error.option_name:
            raise


def test_the_documents_have_commands_of_each_kind() -> None:
    """The patterns above find what they are for."""
    found = {(page.name, tuple(words), whole) for page in PAGES for words, whole in commands_of(page)}
    serve = ("serve", "forecast=forecast.keras", "--http-listen", "127.0.0.1:8080")
    assert ("README.md", serve, True) in found
    assert any(page == "versions.md" and words[:2] == ("models", "default") for page, words, _ in found)
    assert len(found) > 100


@pytest.mark.parametrize("wrong", ["models default forecast 7", "serve --no-such", "store COMMAND"])
def test_a_wrong_command_is_noticed(wrong: str, home: Path) -> None:
    with pytest.raises(click.UsageError):
        parse(shlex.split(wrong), is_whole=False)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_test_runs_the_python_of(page: Path) -> None:
    has_python = "python" in {language for language, _ in FENCE.findall(page.read_text())}
    test = PYTHON_PAGES.get(str(page.relative_to(ROOT)))
    assert has_python == (test is not None), "each page with Python has the test that runs it in PYTHON_PAGES"
    assert test is None or page.name in (ROOT / test).read_text()
