"""Settings from options and variables, and the message for each that cannot be used."""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import click
import pytest
from click.testing import CliRunner

from stepwell.cli import main
from stepwell_server.addresses import Address, UnixAddress
from stepwell_server.cli.options import config_option, given, setting_options
from stepwell_server.cli.serve import SETTINGS, serve, settings_from
from stepwell_server.core.version_policy import VersionPolicy
from stepwell_server.errors import StartError
from stepwell_server.settings import Settings, sources
from stepwell_server.settings.fields import settings_of
from stepwell_server.settings.formats import MODEL_NAME, SECONDS, Several
from stepwell_server.store.valkey.connection.url import Login, StoreUrl, Tls


def read_settings(arguments: Sequence[str], environment: Mapping[str, str]) -> Settings:
    """What `stepwell serve` would start with."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("STEPWELL_")}
    with mock.patch.dict(os.environ, clean | dict(environment), clear=True):
        settings = settings_from(given(serve.make_context("serve", list(arguments)), SETTINGS))
        settings.require_models()
        return settings


def refused(arguments: Sequence[str], environment: Mapping[str, str]) -> str:
    """What `stepwell serve` says of settings that cannot be used."""
    with pytest.raises((click.UsageError, StartError)) as caught:
        read_settings(arguments, environment)
    error = caught.value
    message = error.format_message() if isinstance(error, click.UsageError) else str(error)
    assert "\n" not in message
    return message


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


def test_metrics_are_off_only_if_one_says_so(model: str) -> None:
    assert (
        read_settings([model], {}).metrics_listen is None
    )  # the server sees whether the default port is free
    assert read_settings([model], {"STEPWELL_METRICS_LISTEN": "off"}).metrics_listen == "off"
    assert read_settings([model, "--metrics-listen", "[::1]:0"], {}).metrics_listen == Address("::1", 0)


def test_the_files_of_tls_go_together(model: str) -> None:
    settings = read_settings([model, "--tls-cert", "c"], {"STEPWELL_TLS_KEY": "k"})
    assert (settings.tls_cert, settings.tls_key, settings.tls_client_ca) == (Path("c"), Path("k"), None)
    for arguments, message in (
        (["--tls-cert", "c"], "--tls-cert: must be given with --tls-key"),
        (["--tls-key", "k"], "--tls-key: must be given with --tls-cert"),
        (["--tls-client-ca", "a"], "--tls-client-ca: must be given with --tls-cert"),
    ):
        assert refused([model, *arguments], {}) == message


def test_what_is_said_of_callers_goes_together(model: str) -> None:
    jwks = ["--auth-jwks", "j", "--auth-jwt-audience", "a", "--auth-jwt-issuer", "i"]
    settings = read_settings([model, *jwks], {"STEPWELL_AUTH_TOKENS": "t"})
    assert (settings.auth_tokens, settings.auth_jwt_tenant_claim, settings.asks_callers) == (
        Path("t"),
        "tenant",
        True,
    )
    named = read_settings(
        [model, *jwks, "--auth-jwt-tenant-claim", "org", "--auth-jwt-role-claim", "may"], {}
    )
    assert (named.auth_jwt_tenant_claim, named.auth_jwt_role_claim) == ("org", "may")
    for arguments, message in (
        (["--auth-certificates", "c"], "--auth-certificates: must be given with --tls-client-ca"),
        (jwks[:4], "--auth-jwks: must be given with --auth-jwt-issuer: without it, the server would accept"),
        (
            [*jwks[:2], *jwks[4:]],
            "--auth-jwks: must be given with --auth-jwt-audience: without it, the server",
        ),
        ([*jwks[:2], "--auth-jwt-audience", "", *jwks[4:]], "must be given with --auth-jwt-audience"),
        (jwks[2:4], "--auth-jwt-audience: must be given with --auth-jwks, the keys that sign the JWTs"),
        (["--auth-jwt-audience", ""], "--auth-jwt-audience: must be given with --auth-jwks"),
        (["--auth-jwt-tenant-claim", "org"], "--auth-jwt-tenant-claim: must be given with --auth-jwks"),
        (["--auth-jwt-role-claim", "may"], "--auth-jwt-role-claim: must be given with --auth-jwks"),
        ([*jwks, "--auth-jwt-role-claim", ""], "must be the name of a claim; got ''"),
    ):
        assert message in refused([model, *arguments], {})


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
    assert re.search(
        r"--trust-causality: there is no model 'other'; the models are forecast",
        refused([model, "--trust-causality", "other"], {}),
    )
    assert re.search(
        r"--probe-steps: there is no model 'other'", refused([model, "--probe-steps", "other=5"], {})
    )


def test_a_model_may_have_several_versions(model: str, tmp_path: Path) -> None:
    path = model.partition("=")[2]
    settings = read_settings([model, f"forecast@2={path}", f"words@7={path}"], {})
    assert settings.versions == {"forecast": {1: Path(path), 2: Path(path)}, "words": {7: Path(path)}}
    assert read_settings([f"words@7={path}", "--probe-steps", "words=600"], {}).probe_steps == {"words": 600}
    assert refused([model, f"forecast@1={path}"], {}) == (
        f"models: each version must be given once; forecast@1 is given as {model} and as forecast@1={path}"
    )


def test_a_path_in_a_folder_of_models_says_its_version(tmp_path: Path) -> None:
    files = ("a/3.keras", "b/5/model.keras", "c/2024.keras", "d/03.keras")
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    names = ("a", "b", "other", "d")
    given = [f"{name}={tmp_path / file}" for name, file in zip(names, files, strict=True)]
    versions = {name: list(found) for name, found in read_settings(given, {}).versions.items()}
    assert versions == {"a": [3], "b": [5], "other": [1], "d": [1]}
    # what is said wins
    assert list(read_settings([f"a@1={tmp_path / 'a/3.keras'}"], {}).versions["a"]) == [1]


def test_a_folder_of_models(model: str, tmp_path: Path) -> None:
    options = ["--models", str(tmp_path), "--watch-models", "--sessions", "migrate", "--no-wait-for-models"]
    policies = ["--version-policy", "latest 2", "--version-policy", "words=3,5"]
    settings = read_settings([*options, *policies, "--migration", "widen=a.b:c"], {})
    assert (settings.models, settings.models_dir, settings.watch_models) == ({}, tmp_path, True)
    assert (settings.sessions, settings.migrations) == ("migrate", {"widen": "a.b:c"})
    assert not settings.wait_for_models
    assert [str(settings.policy_of(name)) for name in ("forecast", "words")] == ["latest 2", "3,5"]
    environment = {
        "STEPWELL_MODELS_DIR": str(tmp_path),
        "STEPWELL_WATCH_MODELS": "1",
        "STEPWELL_WAIT_FOR_MODELS": "no",
        "STEPWELL_VERSION_POLICY": "all, words=3, 5 ,more=latest 3",
        "STEPWELL_SESSIONS": "carry",
    }
    settings = read_settings([], environment)
    assert (settings.models_dir, settings.watch_models, settings.wait_for_models) == (tmp_path, True, False)
    assert settings.version_policy == {
        "": VersionPolicy(),
        "words": VersionPolicy(versions=frozenset({3, 5})),
        "more": VersionPolicy(latest=3),
    }
    assert settings.sessions == "carry"
    plain = read_settings([model], {})
    assert (plain.watch_models, plain.wait_for_models, plain.sessions) == (False, True, "keep")
    assert str(plain.policy_of("forecast")) == "latest 1"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["--watch-models"],
            "--watch-models: must be given with --models-dir, the folder that it applies to",
        ),
        (["--version-policy", "all"], "--version-policy: must be given with --models-dir, the folder that"),
        (["--sessions", "migrate"], "--sessions: migrate needs a function, given by --migration"),
        (["--models", "/nowhere"], "--models: must be a folder; /nowhere does not exist"),
        (["--models", __file__], f"--models: must be a folder; {__file__} is a file"),
        (
            ["--models", ".", "--version-policy", "all", "--version-policy", "latest"],
            "must be given once for each name; got two values for all models",
        ),
        (
            ["--models", ".", "--version-policy", "a=all", "--version-policy", "a=1"],
            "must be given once for each name; got two values for 'a'",
        ),
    ],
)
def test_what_is_said_of_a_folder_of_models_goes_together(
    model: str, arguments: list[str], says: str
) -> None:
    assert says in refused([model, *arguments], {})


def test_resident_rows_are_of_each_model_or_of_the_one_that_is_named(model: str) -> None:
    assert read_settings([model], {}).resident_rows == {}
    assert read_settings([model, "--resident-rows", "7"], {}).resident_rows == {"": 7}
    both = {"": 7, "forecast": 9}
    arguments = ["--resident-rows", "7", "--resident-rows", "forecast=9"]
    assert read_settings([model, *arguments], {}).resident_rows == both
    assert read_settings([model], {"STEPWELL_RESIDENT_ROWS": "7, forecast=9"}).resident_rows == both
    assert refused([model, "--resident-rows", "other=7"], {}) == (
        "--resident-rows: there is no model 'other'; the models are forecast"
    )
    assert refused([model, "--resident-rows", "7", "--resident-rows", "8"], {}).endswith(
        "must be given once for each name; got two values for all models"
    )
    assert refused([model, "--resident-rows=forecast=7", "--resident-rows=forecast=8"], {}).endswith(
        "must be given once for each name; got two values for 'forecast'"
    )


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("probe-steps", "forecast", "must be NAME=N; got"),
        ("probe-steps", "forecast=0", "must be NAME=N with a whole number from 1 to 100000; got"),
        ("probe-steps", "forecast=1e3", "must be NAME=N with a whole number from 1 to 100000; got"),
        ("trust-causality", "a/b", "the name of a model"),
        ("check-with", "forecast=gone.npy", "an .npy or .npz file that exists"),
        ("check-with", "forecast", "must be NAME=FILE.npy; got"),
        ("version-policy", "newest", "must be POLICY or NAME=POLICY with 'latest N' (the N highest"),
        ("version-policy", "forecast=latest 0", "must be POLICY or NAME=POLICY with 'latest N'"),
        ("version-policy", "a/b=all", "must be POLICY or NAME=POLICY with a name of 1 to 128"),
        ("sessions", "drop", "must be one of keep, carry, migrate, reset; got"),
        ("migration", "widen", "must be NAME=MODULE:FUNCTION; got"),
        ("migration", "widen=a.b", "with a module and a function as MODULE:FUNCTION; got"),
        ("migration", "widen=a-b:c", "with a module and a function as MODULE:FUNCTION; got"),
        ("migration", "a/b=c:d", "must be NAME=MODULE:FUNCTION with a name of 1 to 128"),
        ("listen", "50051", "HOST:PORT"),
        ("listen", "localhost:70000", "0 to 65535"),
        ("listen", "::1:5", "[HOST]:PORT"),
        ("listen", ":5", "HOST:PORT"),
        ("listen", "nowhere", "port from 0 to 65535, or unix:PATH"),
        ("listen", "unix:", "unix:PATH or unix:///PATH"),
        ("listen", "unix://host/path", "unix:PATH or unix:///PATH"),
        ("listen", "unix:/" + 107 * "x", "of at most 107 bytes"),
        ("metrics-listen", "localhost:http", "HOST:PORT"),
        ("metrics-listen", "unix:/path", "65535, or off"),
        ("max-batch-rows", "0", "must be a whole number from 1 to 1000000000000000000; got"),
        ("max-batch-rows", "ten", "must be a whole number from 1 to"),
        ("max-batch-rows", "9" * 30, "must be a whole number from 1 to"),
        ("resident-rows", "-1", "must be N or NAME=N with a whole number from 1 to"),
        ("resident-rows", "forecast=0", "with a whole number from 1 to"),
        ("resident-rows", "a/b=1", "must be N or NAME=N with a name of 1 to 128 letters"),
        ("resident-rows", "forecast=", "with a whole number from 1 to"),
        ("max-session-idle-s", "nan", "a number of seconds"),
        ("max-session-idle-s", "inf", "a time such as 500ms, 90s or 1h30m"),
        ("max-session-idle-s", "1h 30m", "a time such as 500ms, 90s or 1h30m"),
        ("max-session-idle-s", "30m1h", "a time such as 500ms, 90s or 1h30m"),
        ("drain-timeout-s", "-0.5", "a number of seconds"),
        ("max-model-bytes", "0", "a whole number of bytes, 1 or more"),
        ("max-compile-memory-bytes", "1Gb", "a size such as 512MiB or 2GB"),
        ("max-model-bytes", "1.5", "a whole number of bytes"),
        ("max-model-bytes", "9" * 400 + "TiB", "a whole number of bytes"),
        ("compile-timeout-s", "-1", "a number of seconds"),
        ("compute-threads", "1.5", "must be a whole number from 1 to 4096; got"),
        (
            "store",
            "redis",
            "must be disk, memory, or the URL of a Valkey such as valkey://HOST/0; got 'redis'",
        ),
        ("durability", "none", "must be one of sync, async; got"),
        ("log-level", "loud", "must be one of debug, info"),
        ("log-format", "xml", "must be one of text, json; got"),
        ("import", "not a module", "the name of a module"),
        ("max-message-bytes", "5", "1024 to 2147483647"),
        ("max-message-bytes", "2GiB", "a whole number of bytes, 1024 to 2147483647"),
        ("max-calls-per-connection", "4294967296", "must be a whole number from 1 to 2147483647; got"),
        ("max-connections", "0", "must be a whole number from 1 to"),
        ("max-calls-per-connection", "none", "must be a whole number from 1 to"),
        ("max-held-bytes", "1000", "1024 or more"),
        ("trace-sample", "nan", "a number from 0 to 1"),
        ("trace-sample", "1.01", "a number from 0 to 1"),
        ("trace-sample", "few", "a number from 0 to 1"),
        ("trace-sample", "1e", "a number from 0 to 1"),
    ],
)
def test_a_value_that_cannot_be_read_is_named_with_its_origin(
    model: str, option: str, value: str, rule: str
) -> None:
    variable = "STEPWELL_" + option.replace("-", "_").upper()
    for origin, arguments, environment in (
        (f"'--{option}'", [model, f"--{option}={value}"], {}),
        (variable, [model], {variable: value}),
    ):
        message = refused(arguments, environment)
        assert message.startswith(f"Invalid value for {origin}: ")
        assert rule in message
        assert value in message


def test_a_variable_of_a_flag_is_true_or_false(model: str) -> None:
    for text, expected in (("1", True), ("YES", True), ("off", False), ("", True)):
        environment = {"STEPWELL_WAIT_FOR_MODELS": text}
        assert read_settings([model], environment).wait_for_models is expected
        assert not read_settings([model, "--no-wait-for-models"], environment).wait_for_models
    assert refused([model], {"STEPWELL_INSECURE_LISTEN": "maybe"}) == (
        "Invalid value for STEPWELL_INSECURE_LISTEN: must be true or false; got 'maybe'"
    )


@dataclasses.dataclass(frozen=True)
class MoreSettings(Settings):
    retry_limit_s: Annotated[float, SECONDS, "Time for retries."] = 90.0
    blocked: Annotated[Sequence[str], Several(MODEL_NAME), "Model that is refused."] = ()


def test_a_new_field_is_a_setting_everywhere(tmp_path: Path) -> None:
    settings = settings_of(MoreSettings)

    @click.command
    @setting_options(settings)
    @config_option
    @click.pass_context
    def command(ctx: click.Context, /, **_values: Any) -> None:
        found = given(ctx, settings)
        more = MoreSettings(**{name: each.value for name, each in found.items()})
        click.echo(sources.show(more, found))

    def shown(*arguments: str, **environment: str) -> list[str]:
        result = CliRunner().invoke(command, ["--store", "memory", *arguments], env=environment)
        assert result.exit_code == 0, result.output
        return [line for line in result.output.splitlines() if line.startswith(("retry-limit-s", "blocked"))]

    file = tmp_path / "stepwell.toml"
    file.write_text("retry-limit-s = '2m'\nblocked = ['a']\n")
    assert shown() == ["retry-limit-s = 90  # default", "blocked = []  # default"]
    assert shown("--config", str(file)) == [f"retry-limit-s = 120  # {file}", f'blocked = ["a"]  # {file}']
    variables = {"STEPWELL_RETRY_LIMIT_S": "1.5", "STEPWELL_BLOCKED": "b, c"}
    assert shown("--config", str(file), **variables) == [
        "retry-limit-s = 1.5  # STEPWELL_RETRY_LIMIT_S",
        'blocked = ["b", "c"]  # STEPWELL_BLOCKED',
    ]
    assert shown("--retry-limit-s", "1h", "--blocked=d", "--blocked=e", **variables) == [
        "retry-limit-s = 3600  # command line",
        'blocked = ["d", "e"]  # command line',
    ]
    text = re.sub(r"\s+", " ", CliRunner().invoke(command, ["--help"]).output)
    assert "--retry-limit-s TIME Time for retries. Default: 90. [env var: STEPWELL_RETRY_LIMIT_S]" in text
    assert "--blocked NAME Model that is refused. May be given again. [env var: STEPWELL_BLOCKED]" in text


def test_a_password_in_what_should_be_the_url_of_a_store_is_not_shown(model: str) -> None:
    for text in ("valkey//u:s3cret@h/0", "valkey://u:s3cret/x@h/0", "valkey://u:s3cret?x=1@h/0"):
        assert "s3c" not in refused([model, f"--store={text}"], {})


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        ([], r"give at least one as NAME=PATH, such as forecast=model.keras, or in STEPWELL_MODELS"),
        (["forecast"], r"for NAME=PATH...: must be NAME=PATH; got 'forecast'"),
        (["=x.keras"], r"a name of 1 to 128 letters"),
        (["a@0=x.keras"], r"must be NAME=PATH with a name .*, or NAME@VERSION with a whole number from 1 to"),
        (["a:b=x.keras"], r"or NAME@VERSION with a whole number from 1 to 9223372036854775807"),
        (["a@2=x.keras", "a@2=y.keras"], r"must be given once for each name; got two values for 'a@2'"),
        (["a b=x.keras"], r"a name of 1 to 128 letters.*got 'a b=x.keras'"),
        (["a" * 129 + "=x.keras"], r"a name of 1 to 128 letters"),
        (["a=x.keras", "a=y.keras"], r"must be given once for each name; got two values for 'a'"),
        (
            ["a=/nowhere/x.keras"],
            r"model a: PATH must be a .keras or .stepwell file; /nowhere/x.keras does not exist",
        ),
        (["a=/"], r"model a: PATH must be a .keras or .stepwell file; / is a folder"),
    ],
)
def test_models_that_cannot_be_served(models: list[str], expected: str) -> None:
    assert re.search(expected, refused(models, {}))


def test_a_saved_model_folder_is_told_from_another(tmp_path: Path) -> None:
    (tmp_path / "saved_model.pb").touch()
    assert re.search(
        r"is a SavedModel folder, which holds a graph and no Keras model: ", refused([f"a={tmp_path}"], {})
    )
    (tmp_path / "keras_metadata.pb").touch()
    with pytest.raises(StartError, match=r"is a SavedModel folder of Keras 2: .*tf_keras") as caught:
        read_settings([f"a={tmp_path}"], {})
    assert f"load_model('{tmp_path.name}').save_weights('name.weights.h5')" in str(caught.value)


def test_a_data_dir_and_the_memory_store_exclude_each_other(model: str) -> None:
    rule = ", which keeps nothing on disk; give only one of the two"
    assert re.search(
        f"^'--data-dir': cannot be used with '--store' memory{rule}$",
        refused([model, "--store", "memory", "--data-dir", "/x"], {}),
    )
    environment = {"STEPWELL_STORE": "memory", "STEPWELL_DATA_DIR": "/x"}
    assert re.search(
        f"^STEPWELL_DATA_DIR: cannot be used with STEPWELL_STORE memory{rule}$", refused([model], environment)
    )


def test_a_store_that_is_shared(model: str) -> None:
    settings = read_settings([model, "--store", "rediss://u:hidden@h:1/2?prefix=p:"], {})
    assert settings.shared_store == dataclasses.replace(
        StoreUrl(addresses=(("h", 1),), database=2, prefix="p:", tls=Tls()), login=Login("u", "hidden")
    )
    assert (settings.store_kind, settings.data_dir) == ("valkey", None)
    assert read_settings([model], {}).shared_store is None
    refusal = refused([model, "--store", "valkey://h?color=red"], {})
    assert "'--store': color is not a known option; the options are prefix, partitions" in refusal
    refusal = refused([model, "--store", "valkey://u:hidden@h", "--data-dir", "/x"], {})
    assert (
        "'--data-dir': cannot be used with '--store' valkey://u@h:6379/0, which keeps nothing on disk"
        in refusal
    )
    assert read_settings([model, "--store", "valkey://h"], {"STEPWELL_DATA_DIR": "/x"}).data_dir is None
    with pytest.raises(StartError, match="--data-dir: must be left out with --store URL"):
        Settings(store=StoreUrl(addresses=(("h", 1),)), data_dir=Path("/x"))


def test_the_command_line_wins_over_a_variable_that_contradicts_it(model: str) -> None:
    assert read_settings([model, "--store", "memory"], {"STEPWELL_DATA_DIR": "/x"}).store == "memory"
    settings = read_settings([model, "--data-dir", "/y"], {"STEPWELL_STORE": "memory"})
    assert (settings.store, settings.data_dir) == ("disk", Path("/y"))
    both = {"STEPWELL_STORE": "disk", "STEPWELL_DATA_DIR": "/x"}
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
    assert re.search(
        f"^Invalid value for {variable}: .*'{value}'", refused([model, *arguments], {variable: value})
    )


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
    assert re.search(
        r"^--data-dir: give a folder; there is no default because neither HOME nor",
        refused([model, "--cache-dir", "/c"], {}),
    )
    assert re.search(
        r"^--cache-dir: give a folder; there is no default because neither HOME nor",
        refused([model, "--data-dir", "/d"], {}),
    )
    assert read_settings([model, "--store", "memory", "--cache-dir", "/c"], {}).store == "memory"
    assert re.search(
        r"'--data-dir': must be a path that exists: ~ has no home folder on this machine; got '~/x'",
        refused([model, "--data-dir", "~/x", "--cache-dir", "/c"], {}),
    )
    assert re.search(
        r"with a path that exists: ~nobody_here has no home folder on this machine; got 'm=~nobody_here/m.keras'",
        refused(["m=~nobody_here/m.keras"], {}),
    )


def test_the_data_dir_has_a_default_in_the_users_data_folder(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", "/somewhere")
    assert read_settings([model], {}).data_dir == Path("/somewhere/stepwell")
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert read_settings([model], {}).data_dir == Path("/home/me/.local/share/stepwell")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--lissten", "x"], "No such option '--lissten'. .*--listen"),
        (["--listen"], "Option '--listen' requires an argument"),
        (["--max-batch", "3"], "No such option '--max-batch'"),
    ],
)
def test_unknown_and_incomplete_options_are_one_line(model: str, arguments: list[str], says: str) -> None:
    assert re.match(says, refused([model, *arguments], {}))


def test_help_explains_every_option_and_names_its_variable() -> None:
    text = re.sub(r"\s+", " ", CliRunner().invoke(main, ["serve", "--help"]).output)
    assert text.startswith("Usage: main serve [OPTIONS] NAME=PATH...")
    assert "that of the models is STEPWELL_MODELS" in text
    for setting in SETTINGS:
        if not setting.names.is_argument:
            about = rf"{setting.option}[, ].*[.)] \[env var: {setting.variable}\]"
            assert re.search(about, text), setting.field
    assert "or reply. Default: 64MiB. [env var: STEPWELL_MAX_MESSAGE_BYTES]" in text
    assert "when the server stops. Default: 30. [env var: STEPWELL_DRAIN_TIMEOUT_S]" in text


def test_documents_have_the_defaults_that_hold() -> None:
    """Where a value stands before an option, as in "64 MiB (`--max-message-bytes`)"."""
    defaults = {setting.option: setting.default_text for setting in SETTINGS if setting.default_text}
    found = {}
    for page in (Path(__file__).parents[2] / "docs").rglob("*.md"):
        for text, option in re.findall(r"(\d[\d,.]*(?: [KMG]iB)?) \(`(--[a-z-]+)`\)", page.read_text()):
            if option in defaults:
                found[option] = re.sub("[, ]", "", text)
                assert found[option] == defaults[option], f"{page.name}: {text} ({option})"
    assert found.keys() >= {"--max-message-bytes", "--max-calls-per-connection"}


def test_times_and_sizes_have_units(model: str) -> None:
    def times(text: str) -> float:
        return read_settings([model, "--drain-timeout-s", text], {}).drain_timeout_s

    def sizes(text: str) -> int:
        return read_settings([model, "--max-model-bytes", text], {}).max_model_bytes

    assert [times(text) for text in ("90s", "1h30m", "500ms", "1.5", "1d2h", "0", "1e3")] == [
        90,
        5400,
        0.5,
        1.5,
        93600,
        0,
        1000,
    ]
    assert [sizes(text) for text in ("512MiB", "2GB", "1.5KiB", "7", "3 kB", "1TiB")] == [
        2**29,
        2 * 10**9,
        1536,
        7,
        3000,
        2**40,
    ]
    environment = {"STEPWELL_MAX_MESSAGE_BYTES": "1MiB", "STEPWELL_MAX_SESSION_IDLE_S": "1h"}
    settings = read_settings([model], environment)
    assert (settings.max_message_bytes, settings.max_session_idle_s) == (2**20, 3600.0)


def test_cache_dir_follows_xdg(monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert read_settings([model], {}).cache_dir == Path("/somewhere/stepwell")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert read_settings([model], {}).cache_dir == Path.home() / ".cache" / "stepwell"


def test_a_message_must_fit_into_what_may_be_held(model: str) -> None:
    assert re.search(
        r"--max-held-bytes must be at least .* 2048; got 1024",
        refused([model, "--max-held-bytes", "1024", "--max-message-bytes", "2048"], {}),
    )
