"""Settings from options and variables, and the message for each that cannot be used."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from stepwell_server.addresses import Address, UnixAddress
from stepwell_server.settings import Settings, SettingsError, read_settings, variable_of


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "a,b.keras"
    path.write_bytes(b"")
    return f"forecast={path}"


def test_options_win_over_variables_and_variables_over_defaults(model: str) -> None:
    environment = {"STEPWELL_LISTEN": "0.0.0.0:1", "STEPWELL_MAX_BATCH_ROWS": "7", "STEPWELL_STORE": ""}
    settings = read_settings([model, "--listen", "[::1]:0"], environment)
    assert settings.listen == Address("::1", 0)
    assert str(settings.listen) == "[::1]:0"
    assert settings.max_batch_rows == 7
    assert settings.store == "disk"
    assert settings.compute_threads >= 1


def test_unix_sockets_have_absolute_paths(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for text, path in (("unix:/a/b", "/a/b"), ("unix:///a/b", "/a/b"), ("unix:b", f"{tmp_path}/b")):
        listen = read_settings([model, "--listen", text], {}).listen
        assert listen == UnixAddress(path)
        assert str(listen) == f"unix:{path}"


def test_the_files_of_tls_go_together(model: str) -> None:
    settings = read_settings([model, "--tls-cert", "c"], {"STEPWELL_TLS_KEY": "k"})
    assert (settings.tls_cert, settings.tls_key, settings.tls_client_ca) == (Path("c"), Path("k"), None)
    for arguments, message in (
        (["--tls-cert", "c"], "--tls-key: must be given with --tls-cert"),
        (["--tls-key", "k"], "--tls-cert: must be given with --tls-key"),
        (["--tls-client-ca", "a"], "--tls-cert: must be given with --tls-client-ca"),
    ):
        with pytest.raises(SettingsError, match=message):
            read_settings([model, *arguments], {})


def test_models_may_stand_between_options_and_have_commas(model: str) -> None:
    other = model.replace("forecast", "v1.2_other-name")
    settings = read_settings([model, "--store", "memory", other, "--import", "a.b", "--import", "c"], {})
    assert list(settings.models) == ["forecast", "v1.2_other-name"]
    assert settings.models["forecast"].name == "a,b.keras"
    assert settings.imports == ("a.b", "c")


def test_variables_hold_several_values_with_commas(tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / name).write_bytes(b"")
    environment = {"STEPWELL_MODELS": f"a={tmp_path}/x, b={tmp_path}/y", "STEPWELL_IMPORT": "m, n.o"}
    settings = read_settings([], environment)
    assert settings.models == {"a": tmp_path / "x", "b": tmp_path / "y"}
    assert settings.imports == ("m", "n.o")


def test_what_is_said_of_single_models(model: str, tmp_path: Path) -> None:
    data = tmp_path / "x.npy"
    data.write_bytes(b"")
    arguments = ["--probe-steps", "forecast=2000", "--trust-causality", "forecast"]
    settings = read_settings([model, *arguments, "--check-with", f"forecast={data}"], {})
    assert settings.probe_steps == {"forecast": 2000}
    assert settings.trust_causality == ("forecast",)
    assert settings.check_with == {"forecast": data}
    with pytest.raises(
        SettingsError, match=r"--trust-causality: there is no model 'other'; the models are forecast"
    ):
        read_settings([model, "--trust-causality", "other"], {})
    with pytest.raises(SettingsError, match=r"--probe-steps: there is no model 'other'"):
        read_settings([model, "--probe-steps", "other=5"], {})


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("probe-steps", "forecast", "NAME=N with the name of a model"),
        ("probe-steps", "forecast=0", "a number of time steps from 1 to 100000"),
        ("probe-steps", "forecast=1e3", "a number of time steps from 1 to 100000"),
        ("trust-causality", "a/b", "the name of a model"),
        ("check-with", "forecast=gone.npy", "an .npy or .npz file that exists"),
        ("check-with", "forecast", "NAME=FILE.npy with the name of a model"),
        ("listen", "50051", "HOST:PORT"),
        ("listen", "localhost:70000", "0 to 65535"),
        ("listen", "::1:5", "[HOST]:PORT"),
        ("listen", ":5", "HOST:PORT"),
        ("listen", "nowhere", "port from 0 to 65535, or unix:PATH"),
        ("listen", "unix:", "unix:PATH or unix:///PATH"),
        ("listen", "unix://host/path", "unix:PATH or unix:///PATH"),
        ("listen", "unix:/" + 107 * "x", "of at most 107 bytes"),
        ("metrics-listen", "localhost:http", "HOST:PORT"),
        ("metrics-listen", "unix:/path", "HOST:PORT"),
        ("max-batch-rows", "0", "a whole number, 1 or more"),
        ("max-batch-rows", "ten", "a whole number"),
        ("max-batch-rows", "9" * 30, "a whole number"),
        ("resident-rows", "-1", "a whole number"),
        ("max-session-idle-s", "nan", "a number of seconds"),
        ("max-session-idle-s", "inf", "a number of seconds"),
        ("drain-timeout-s", "-0.5", "a number of seconds"),
        ("max-model-bytes", "0", "a whole number, 1 or more"),
        ("max-compile-memory-bytes", "1GB", "a whole number"),
        ("compile-timeout-s", "-1", "a number of seconds"),
        ("compute-threads", "1.5", "a whole number"),
        ("store", "redis", "one of disk, memory"),
        ("durability", "none", "one of sync, async"),
        ("log-level", "loud", "one of debug"),
        ("log-format", "xml", "one of text, json"),
        ("import", "not a module", "the name of a module"),
        ("max-message-bytes", "5", "1024 or more"),
        ("max-connections", "0", "a whole number, 1 or more"),
        ("max-calls-per-connection", "none", "a whole number, 1 or more"),
        ("max-held-bytes", "1000", "1024 or more"),
    ],
)
def test_a_value_that_cannot_be_read_is_named_with_its_origin(
    model: str, option: str, value: str, rule: str
) -> None:
    variable = "STEPWELL_" + option.replace("-", "_").upper()
    for origin, arguments, environment in (
        (f"--{option}", [model, f"--{option}={value}"], {}),
        (variable, [model], {variable: value}),
    ):
        with pytest.raises(SettingsError) as caught:
            read_settings(arguments, environment)
        message = str(caught.value)
        assert message.startswith(f"{origin} must be ")
        assert rule in message
        assert repr(value) in message
        assert "\n" not in message


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        ([], r"give at least one as NAME=PATH.keras, or in STEPWELL_MODELS"),
        (["forecast"], r"model must be NAME=PATH.keras; got 'forecast'"),
        (["=x.keras"], r"a name of 1 to 128 letters"),
        (["a b=x.keras"], r"a name of 1 to 128 letters.*got 'a b=x.keras'"),
        (["a" * 129 + "=x.keras"], r"a name of 1 to 128 letters"),
        (["a=x.keras", "a=y.keras"], r"different names; got 'a' twice"),
        (["a=/nowhere/x.keras"], r"model a: PATH must be a .keras file; /nowhere/x.keras does not exist"),
        (["a=/"], r"model a: PATH must be a .keras file; / is a folder"),
    ],
)
def test_models_that_cannot_be_served(models: list[str], expected: str) -> None:
    with pytest.raises(SettingsError, match=expected):
        read_settings(models, {})


def test_a_saved_model_folder_is_told_from_another(tmp_path: Path) -> None:
    (tmp_path / "saved_model.pb").touch()
    with pytest.raises(
        SettingsError, match=r"is a SavedModel folder, which holds a graph and no Keras model: "
    ):
        read_settings([f"a={tmp_path}"], {})
    (tmp_path / "keras_metadata.pb").touch()
    with pytest.raises(SettingsError, match=r"is a SavedModel folder of Keras 2: .*tf_keras") as caught:
        read_settings([f"a={tmp_path}"], {})
    assert f"load_model('{tmp_path.name}').save_weights('name.weights.h5')" in str(caught.value)


def test_a_data_dir_and_the_memory_store_exclude_each_other(model: str) -> None:
    rule = "nothing is kept on disk; give one of the two"
    with pytest.raises(SettingsError, match=f"^--data-dir: with --store memory {rule}$"):
        read_settings([model, "--store", "memory", "--data-dir", "/x"], {})
    environment = {"STEPWELL_STORE": "memory", "STEPWELL_DATA_DIR": "/x"}
    with pytest.raises(SettingsError, match=f"^STEPWELL_DATA_DIR: with STEPWELL_STORE=memory {rule}$"):
        read_settings([model], environment)


def test_the_command_line_wins_over_a_variable_that_contradicts_it(model: str) -> None:
    assert read_settings([model, "--store", "memory"], {"STEPWELL_DATA_DIR": "/x"}).store == "memory"
    settings = read_settings([model, "--data-dir", "/y"], {"STEPWELL_STORE": "memory"})
    assert (settings.store, settings.data_dir) == ("disk", Path("/y"))
    both = {"STEPWELL_STORE": "lmdb", "STEPWELL_DATA_DIR": "/x"}
    assert read_settings([model, "--store=memory"], both).store == "memory"


@pytest.mark.parametrize(
    ("variable", "value", "arguments"),
    [
        ("STEPWELL_LISTEN", "nowhere", ["--listen", "127.0.0.1:0"]),
        ("STEPWELL_RESIDENT_ROWS", "many", ["--resident-rows", "7"]),
        ("STEPWELL_IMPORT", "not a module", ["--import", "m"]),
        ("STEPWELL_MODELS", "forecast", []),
    ],
)
def test_a_variable_that_cannot_be_read_stops_the_start_though_the_option_is_given(
    model: str, variable: str, value: str, arguments: list[str]
) -> None:
    with pytest.raises(SettingsError, match=f"^{variable} must be .*'{value}'"):
        read_settings([model, *arguments], {variable: value})


def test_a_path_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.keras").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = read_settings(["m=~/m.keras", "--data-dir=~/data"], {"STEPWELL_CACHE_DIR": "~/cache"})
    assert settings.models == {"m": tmp_path / "m.keras"}
    assert (settings.data_dir, settings.cache_dir) == (tmp_path / "data", tmp_path / "cache")


def test_a_home_that_is_not_there_is_refused(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "")
    for variable in ("XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(SettingsError, match=r"^--data-dir: give a folder; without a home \(HOME\)"):
        read_settings([model, "--cache-dir", "/c"], {})
    with pytest.raises(SettingsError, match=r"^--cache-dir: give a folder; without a home \(HOME\)"):
        read_settings([model, "--data-dir", "/d"], {})
    assert read_settings([model, "--store", "memory", "--cache-dir", "/c"], {}).store == "memory"
    with pytest.raises(SettingsError, match=r"^--data-dir must be a folder: ~ has no home here; got '~/x'"):
        read_settings([model, "--data-dir", "~/x", "--cache-dir", "/c"], {})
    with pytest.raises(SettingsError, match=r"^model must be NAME=PATH\.keras .*: ~nobody_here has no home"):
        read_settings(["m=~nobody_here/m.keras"], {})


def test_the_data_dir_has_a_default_in_the_users_data_folder(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", "/somewhere")
    assert read_settings([model], {}).data_dir == Path("/somewhere/stepwell")
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert read_settings([model], {}).data_dir == Path("/home/me/.local/share/stepwell")


@pytest.mark.parametrize("arguments", [["--lissten", "x"], ["--listen"], ["--max-batch", "3"]])
def test_unknown_and_incomplete_options_are_one_line(model: str, arguments: list[str]) -> None:
    with pytest.raises(SettingsError, match=arguments[0].rstrip("s")) as caught:
        read_settings([model, *arguments], {})
    assert "\n" not in str(caught.value)


def test_help_explains_every_option_and_names_its_variable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        read_settings(["--help"], {}, prog="stepwell serve")
    assert caught.value.code == 0
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "usage: stepwell serve" in text
    for name in ("MODELS", "IMPORT"):
        assert f"in the variable, with commas between them. [STEPWELL_{name}]" in text.replace(
            "In the", "in the"
        )
    for field in dataclasses.fields(Settings):
        assert re.search(rf"[.)] (Default: \S+ )?\[{variable_of(field.name)}\]", text), field.name


def test_cache_dir_follows_xdg(monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert read_settings([model], {}).cache_dir == Path("/somewhere/stepwell")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert read_settings([model], {}).cache_dir == Path.home() / ".cache" / "stepwell"


def test_a_message_must_fit_into_what_may_be_held(model: str) -> None:
    with pytest.raises(SettingsError, match=r"--max-held-bytes must be at least .* 2048; got 1024"):
        read_settings([model, "--max-held-bytes", "1024", "--max-message-bytes", "2048"], {})
