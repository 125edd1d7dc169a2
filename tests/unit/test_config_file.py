"""The config file: what it may hold, what wins over it, and that what is shown can be read again."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from unittest import mock

import click
import pytest
from click.testing import CliRunner, Result

from stepwell.cli import main
from stepwell_server.addresses import Address, UnixAddress
from stepwell_server.cli.options import given
from stepwell_server.cli.serve import SETTINGS, serve, settings_from
from stepwell_server.core.version_policy import VersionPolicy
from stepwell_server.settings import Settings

WHOLE = """
listen = "[::1]:6000"
tls-cert = "tls.crt"
tls-key = "/etc/tls.key"
insecure-listen = true
store = "disk"
data-dir = "data"
max-batch-rows = 100
max-session-idle-s = "1h30m"
drain-timeout-s = 2.5
max-message-bytes = "32MiB"
max-model-bytes = 1000000
import = ["a.b", "c"]
trust-causality = ["v1.2"]
probe-steps = {"v1.2" = 700}
models-dir = "all"
watch-models = true
version-policy = ["latest 3", "v1.2=2,4"]
wait-for-models = false
migration = {"widen" = "a.b:c"}

[models]
forecast = "models/forecast.keras"
"v1.2" = "/models/other.keras"
"v1.2@9" = "ninth.keras"
"""


def with_no_variables_but(environment: Mapping[str, str] | None) -> AbstractContextManager[object]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("STEPWELL_")}
    return mock.patch.dict(os.environ, clean | dict(environment or {}), clear=True)


def read(*arguments: str, environment: Mapping[str, str] | None = None) -> Settings:
    with with_no_variables_but(environment):
        return settings_from(given(serve.make_context("serve", list(arguments)), SETTINGS))


def run(*arguments: str, environment: Mapping[str, str] | None = None) -> Result:
    with with_no_variables_but(environment):
        return CliRunner().invoke(main, ["serve", *arguments])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "stepwell.toml"
    path.write_text(WHOLE)
    return path


def test_it_holds_what_the_options_do_and_paths_begin_at_its_folder(file: Path) -> None:
    expected = Settings(
        models={
            "forecast": file.parent / "models/forecast.keras",
            "v1.2": Path("/models/other.keras"),
            "v1.2@9": file.parent / "ninth.keras",
        },
        models_dir=file.parent / "all",
        watch_models=True,
        version_policy={"": VersionPolicy(latest=3), "v1.2": VersionPolicy(versions=frozenset({2, 4}))},
        wait_for_models=False,
        migrations={"widen": "a.b:c"},
        listen=Address("::1", 6000),
        insecure_listen=True,
        tls_cert=file.parent / "tls.crt",
        tls_key=Path("/etc/tls.key"),
        data_dir=file.parent / "data",
        max_batch_rows=100,
        max_session_idle_s=5400.0,
        drain_timeout_s=2.5,
        max_message_bytes=32 * 2**20,
        max_model_bytes=1_000_000,
        imports=("a.b", "c"),
        trust_causality=("v1.2",),
        probe_steps={"v1.2": 700},
    )
    assert read("--config", str(file)) == expected
    assert read(environment={"STEPWELL_CONFIG": str(file)}) == expected


@pytest.mark.parametrize("written", ["unix:s.sock", "unix:{folder}/s.sock", "unix://{folder}/s.sock"])
def test_a_socket_begins_at_its_folder_too(written: str, file: Path) -> None:
    file.write_text(f"listen = '{written.format(folder=file.parent)}'\n")
    assert read("--config", str(file)).listen == UnixAddress(str(file.parent / "s.sock"))


def test_standard_error_is_no_path_in_its_folder(file: Path) -> None:
    file.write_text("audit-log = '-'\n")
    assert read("--config", str(file)).audit_log == Path("-")
    assert f'audit-log = "-"  # {file}' in run("--config", str(file), "--show-config").stdout.splitlines()


def test_the_file_in_the_documents_is_one(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "operate" / "run.md").read_text()
    (tmp_path / "stepwell.toml").write_text(re.findall(r"^```toml\n(.*?)^```", page, re.M | re.S)[0])
    settings = read("--config", str(tmp_path / "stepwell.toml"))
    assert settings.models == {"forecast": Path("/opt/stepwell/models/forecast.stepwell")}
    assert settings.max_session_idle_s == 7 * 24 * 3600


def test_a_variable_wins_over_it_and_the_command_line_over_both(file: Path) -> None:
    environment = {"STEPWELL_MAX_BATCH_ROWS": "7", "STEPWELL_IMPORT": "z", "STEPWELL_CONFIG": "/nowhere"}
    other = ("v1.2=x.keras", "--import", "y")
    settings = read("--config", str(file), *other, environment=environment)
    assert settings.max_batch_rows == 7
    assert settings.imports == ("y",)
    assert settings.models == {"v1.2": Path("x.keras")}
    assert settings.listen == Address("::1", 6000)


def test_a_store_on_the_command_line_wins_over_the_folder_in_it(file: Path) -> None:
    assert read("--config", str(file), "--store", "memory").data_dir is None
    file.write_text(WHOLE.replace('store = "disk"', 'store = "memory"'))
    assert read("--config", str(file), "--data-dir", "/d").store == "disk"
    shown = run("--config", str(file), "--data-dir", "/d", "--show-config").stdout.splitlines()
    assert 'store = "disk"  # default' in shown
    assert (
        f"'data-dir' in {file}: cannot be used with 'store' in {file} memory"
        in run("--config", str(file)).stderr
    )


def test_what_is_shown_says_where_it_came_from_and_can_be_read_again(file: Path) -> None:
    environment = {"STEPWELL_RESIDENT_ROWS": "5"}
    arguments = (
        "--config",
        str(file),
        "--metrics-listen",
        "127.0.0.1:9",
        "--front",
        "python",
        "--show-config",
    )
    shown = run(*arguments, environment=environment)
    assert shown.exit_code == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert 'metrics-listen = "127.0.0.1:9"  # command line' in lines
    assert "resident-rows = 5  # STEPWELL_RESIDENT_ROWS" in lines
    assert f'max-message-bytes = "32MiB"  # {file}' in lines
    assert "max-calls-per-connection = 1000  # default" in lines
    assert "# max-connections is not set" in lines
    assert f"[models]  # {file}" in lines
    again = file.with_name("again.toml")
    again.write_text(shown.stdout)
    assert read("--config", str(again)) == read(*arguments[:-1], environment=environment)
    memory = run("--store", "memory", "--show-config")
    again.write_text(memory.stdout)
    assert read("--config", str(again)) == read("--store", "memory")


def test_a_policy_for_all_names_is_a_string_too(file: Path) -> None:
    file.write_text("models-dir = 'm'\nversion-policy = '3, 5'\n")
    assert read("--config", str(file)).version_policy == {"": VersionPolicy(versions=frozenset({3, 5}))}
    shown = run("--config", str(file), "--show-config").stdout
    assert f'version-policy = "3,5"  # {file}' in shown.splitlines()


def test_rows_are_a_number_a_table_or_a_list(tmp_path: Path) -> None:
    file = tmp_path / "rows.toml"
    models = "[models]\na = 'a.keras'\n'v1.2' = 'b.keras'\n"
    for text, expected in (
        ("resident-rows = 7\n", {"": 7}),
        ("resident-rows = {a = 9}\n", {"a": 9}),
        ("resident-rows = ['v1.2=9', '7']\n", {"v1.2": 9, "": 7}),
    ):
        file.write_text(text + models)
        settings = read("--config", str(file))
        assert settings.resident_rows == expected
        shown = run("--config", str(file), "--show-config").stdout
        file.write_text(shown)
        assert read("--config", str(file)) == settings, shown


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "max_batch_rows = 3",
            "{file}: there is no setting 'max_batch_rows'; did you mean 'max-batch-rows'?",
        ),
        ("lisen = 'x:1'", "{file}: there is no setting 'lisen'; did you mean 'listen'?"),
        ("config = 'x'", "{file}: there is no setting 'config'; the settings are models,"),
        ("zzz = 1", "{file}: there is no setting 'zzz'; the settings are models, listen, http-listen,"),
        ("insecure-listen = 'yes'", "'insecure-listen' in {file}: must be true or false; got 'yes'"),
        ("listen = 5", "'listen' in {file}: must be a non-empty string; got 5"),
        ("data-dir = ''", "'data-dir' in {file}: must be a non-empty string; got ''"),
        ("listen = 'here'", "'listen' in {file}: must be HOST:PORT"),
        ("max-batch-rows = 0", "'max-batch-rows' in {file}: must be a whole number from 1 to"),
        ("max-batch-rows = true", "'max-batch-rows' in {file}: must be a number or a non-empty string"),
        (
            "drain-timeout-s = 'soon'",
            "'drain-timeout-s' in {file}: must be a number of seconds, or a time such as",
        ),
        ("import = 'a'", "'import' in {file}: must be a list; got 'a'"),
        ("models = 'm=x.keras'", "'models' in {file}: must be a table of names and values; got 'm=x.keras'"),
        ("[models]\n'a b' = 'x'", "'models' in {file}: must be NAME=PATH with a name of 1 to 128"),
        ("[models]\nm = 5", "'models' in {file}: must be a non-empty string; got 5"),
        (
            "listen 5",
            "{file} is not TOML: Expected '=' after a key in a key/value pair (at line 1, column 8)",
        ),
        ("listen = 'a:1'\nlisten = 'a:2'", "{file} is not TOML: "),
        ("x = '\udcff'", "{file} is not TOML: 'utf-8' codec"),
        ("x = " + "[" * 9999, "{file} is not TOML: "),
        (
            "compute-threads = 10000",
            "'compute-threads' in {file}: must be a whole number from 1 to 4096; got '10000'",
        ),
    ],
)
@pytest.mark.parametrize("overridden", [False, True])
def test_what_it_may_not_hold(tmp_path: Path, text: str, says: str, overridden: bool) -> None:
    """Also where the command line says otherwise."""
    file = tmp_path / "c.toml"
    file.write_bytes(text.encode(errors="surrogateescape"))
    others = ("--listen", "a:1", "--max-batch-rows", "9", "--import", "b", "m=y.keras", "--data-dir", "d")
    result = run("--config", str(file), *(others if overridden else ()))
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("stepwell: error: ")
    assert says.format(file=file) in line


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert re.search(r"cannot read \S+: No such file", run("--config", str(tmp_path / "x.toml")).stderr)
    with pytest.raises(click.UsageError, match="cannot read /nowhere: No such file"):
        read(environment={"STEPWELL_CONFIG": "/nowhere"})
