"""Help that teaches: every command, option and JSON key is explained, and every example parses."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from stepwell import config
from stepwell.cli import _of_server, main
from stepwell.cli.toolkit import target
from stepwell.cli.toolkit.help import Command, Group
from stepwell.cli.toolkit.lazy import Lazy

ROOT = Path(__file__).resolve().parents[2]


def walk(
    command: click.Command, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            loaded = child.load() if isinstance(child, Lazy) else child
            yield from walk(loaded, (*path, name))


COMMANDS = dict(walk(main))
OF_CLIENTS = [
    path
    for path in COMMANDS
    if path
    and path[0] not in {"completion", "envoy-config"}
    and not isinstance(main.commands[path[0]], _of_server.OfServer)
]


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_has_help_that_teaches(path: tuple[str, ...]) -> None:
    command = COMMANDS[path]
    text = CliRunner().invoke(main, [*path, "--help"]).output

    assert command.help
    assert command.help.count(".") >= 2
    assert "Examples:" in text
    assert isinstance(command, Group) or "Exit codes:" in text


@pytest.mark.parametrize("name", main.commands)
def test_lists_say_what_the_command_says_of_itself(name: str) -> None:
    assert main.commands[name].short_help == COMMANDS[name,].short_help


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_option_and_json_key_is_explained(path: tuple[str, ...]) -> None:
    command = COMMANDS[path]
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]

    assert all(option.help for option in options)
    if any("--json" in option.opts for option in options):
        assert isinstance(command, Command)
        assert command.json_keys


def test_help_names_both_time_limits() -> None:
    text = " ".join(CliRunner().invoke(main, ["models", "load", "--help"]).output.split())
    limits = f"{target.DEFAULT_TIMEOUT_S:g}; to load a model {config.DEFAULT_LOAD_TIMEOUT_S:g}"
    assert f"including retries. [default: ({limits})]" in text


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_example_is_a_command_line_that_parses(path: tuple[str, ...]) -> None:
    command = COMMANDS[path]
    assert isinstance(command, Command | Group)

    for example in command.examples:
        assert example.startswith("stepwell ")
        assert (
            COMMANDS.get(tuple(example.split()[1:3]))
            or COMMANDS.get((example.split()[1],))
            or "COMMAND" in example
        )


@pytest.mark.parametrize("path", OF_CLIENTS, ids=" ".join)
def test_what_talks_to_a_server_takes_the_server(path: tuple[str, ...]) -> None:
    command = COMMANDS[path]
    if not isinstance(command, click.Group):
        assert {"--server", "--timeout-s", "--json"} <= {
            name for option in command.params for name in option.opts
        }


def test_the_surface_names_every_command_and_option() -> None:
    lines = (ROOT / "docs" / "surface" / "commands.txt").read_text(encoding="utf-8").splitlines()

    for path, command in COMMANDS.items():
        name = " ".join(("stepwell", *path))
        assert {f"{name}: command", f"{name}: group"} & set(lines)
        for option in (parameter for parameter in command.params if isinstance(parameter, click.Option)):
            assert any(line.startswith(f"{name} {', '.join(option.opts)}") for line in lines)


def test_version() -> None:
    result = CliRunner().invoke(main, ["--version"])

    assert result.output == f"stepwell {importlib.metadata.version('stepwell')}\n"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "sys.argv = ['stepwell', '--help']\n"
        "from stepwell.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    print([name for name in ('rich', 'tensorflow', 'stepwell_server') if name in sys.modules])\n"
    )

    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=True
    )

    assert finished.stdout.splitlines()[-1] == "[]"


def test_a_command_is_read_without_the_others() -> None:
    code = (
        "import sys\n"
        "sys.argv = ['stepwell', 'completion', 'bash']\n"
        "from stepwell.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    print(sorted(name for name in sys.modules if name.startswith('stepwell.cli.') and '._' not in name and 'toolkit' not in name))\n"
    )

    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=True
    )

    assert finished.stdout.splitlines()[-1] == "['stepwell.cli.completion']"


def test_serve_without_its_packages_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_of_server, "packages_of", lambda _extra: ["click", "no-such-package"])

    ways = (
        "'.[server]' ./server/front, or for compiled models (.stepwell) only "
        "pip install '.[serve]' ./server/front, in a clone of Stepwell"
    )
    # What a model needs beside these depends on its kind: `require_frameworks` says it.
    for arguments, doing in ((["serve", "m=x.keras"], "serving"), (["compile", "x.onnx"], "compiling")):
        result = CliRunner().invoke(main, arguments)

        assert result.exit_code == 2
        assert result.stderr == (
            f"stepwell: error: {doing} needs packages that are not installed (no-such-package): pip install {ways}\n"
        )


def test_commands_of_the_server_are_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    named = {name for name, command in main.commands.items() if isinstance(command, _of_server.OfServer)}
    assert named == {each.name for each in importlib.metadata.entry_points(group=_of_server.COMMANDS)}

    # A distribution of an older or a broken installation.
    monkeypatch.setattr(importlib.metadata.Distribution, "entry_points", importlib.metadata.EntryPoints())
    for arguments in (["serve", "m=x.keras"], ["tokens", "list"], ["models", "show", "x.stepwell"]):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 2
        assert result.stderr.startswith("stepwell: error: the installed stepwell lacks '")
        assert "install Stepwell again, pip install '.[server]' ./server/front (in a clone" in result.stderr
        assert result.stderr.count("\n") == 1


def test_the_command_of_the_server_is_found_without_reading_other_distributions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Each start would read the files of all of them.
    monkeypatch.delattr(importlib.metadata, "distributions")
    assert _of_server.entry_point(_of_server.COMMANDS, "serve").name == "serve"


def test_compiling_needs_what_serving_a_compiled_model_does_and_the_frameworks() -> None:
    listed = [_of_server.packages_of(extra) for extra in ("serve", "server")]
    assert [len(names) for names in listed] == [len(set(names)) for names in listed]
    serve, server = map(set, listed)
    assert "ai-edge-litert" in serve
    assert server - serve == {"h5py", "keras", "tensorflow"}
    assert serve < server


def test_a_server_that_cannot_start_says_so() -> None:
    result = CliRunner().invoke(main, ["serve", "m=gone.keras"])

    assert result.exit_code == 2
    assert result.stderr.startswith("stepwell: error: ")
    assert "gone.keras does not exist" in result.stderr
