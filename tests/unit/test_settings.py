"""Settings from options and variables, and the message for each that cannot be used."""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
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


JWKS = ["--auth-jwks", "j", "--auth-jwt-audience", "a", "--auth-jwt-issuer", "i"]
FOLDER = ["--models", "{folder}", "--watch-models", "--sessions", "migrate", "--no-wait-for-models"]
FOLDER += ["--version-policy", "latest 2", "--version-policy", "words=3,5", "--migration", "widen=a.b:c"]
FOLDER_BY_VARIABLES = {
    "STEPWELL_MODELS_DIR": "{folder}",
    "STEPWELL_WATCH_MODELS": "1",
    "STEPWELL_WAIT_FOR_MODELS": "no",
    "STEPWELL_VERSION_POLICY": "all, words=3, 5 ,more=latest 3",
    "STEPWELL_SESSIONS": "carry",
}
POLICIES = {"words": VersionPolicy(versions=frozenset({3, 5})), "more": VersionPolicy(latest=3)}
HOME = {"HOME": "{folder}", "XDG_DATA_HOME": "", "STEPWELL_CACHE_DIR": "~/cache"}
SHARED = StoreUrl(addresses=(("h", 1),), database=2, prefix="p:", tls=Tls())
BOTH_STORES = {"STEPWELL_STORE": "disk", "STEPWELL_DATA_DIR": "/x"}


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        # options win over variables, variables over defaults
        (
            ["{model}", "--listen", "[::1]:0"],
            {"STEPWELL_LISTEN": "0.0.0.0:1", "STEPWELL_MAX_BATCH_ROWS": "7", "STEPWELL_STORE": ""},
            {"listen": Address("::1", 0), "max_batch_rows": 7, "store": "disk"},
        ),
        (["{model}", "--store", "memory"], {"STEPWELL_DATA_DIR": "/x"}, {"store": "memory"}),
        (["{model}", "--store=memory"], BOTH_STORES, {"store": "memory"}),
        (
            ["{model}", "--data-dir", "/y"],
            {"STEPWELL_STORE": "memory"},
            {"store": "disk", "data_dir": Path("/y")},
        ),
        # addresses; without one for metrics, the server sees whether the default port is free
        (["{model}", "--listen", "unix:/a/b"], {}, {"listen": UnixAddress("/a/b")}),
        (["{model}", "--listen", "unix:///a/b"], {}, {"listen": UnixAddress("/a/b")}),
        (["{model}"], {}, {"metrics_listen": None, "shared_store": None, "resident_rows": {}}),
        (["{model}"], {"STEPWELL_METRICS_LISTEN": "off"}, {"metrics_listen": "off"}),
        (["{model}", "--metrics-listen", "[::1]:0"], {}, {"metrics_listen": Address("::1", 0)}),
        # TLS and callers
        (
            ["{model}", "--tls-cert", "c"],
            {"STEPWELL_TLS_KEY": "k"},
            {"tls_cert": Path("c"), "tls_key": Path("k"), "tls_client_ca": None},
        ),
        (
            ["{model}", *JWKS],
            {"STEPWELL_AUTH_TOKENS": "t"},
            {"auth_tokens": Path("t"), "auth_jwt_tenant_claim": "tenant", "asks_callers": True},
        ),
        (
            ["{model}", *JWKS, "--auth-jwt-tenant-claim", "org", "--auth-jwt-role-claim", "may"],
            {},
            {"auth_jwt_tenant_claim": "org", "auth_jwt_role_claim": "may"},
        ),
        # several values, between options and with commas
        (
            ["{model}", "--store", "memory", "v1.2_other-name={path}", "--import", "a.b", "--import", "c"],
            {},
            {"models": {"forecast": "{path}", "v1.2_other-name": "{path}"}, "imports": ("a.b", "c")},
        ),
        (
            [],
            {"STEPWELL_MODELS": "a={folder}/x, b={folder}/y", "STEPWELL_IMPORT": "m, n.o"},
            {"models": {"a": "{folder}/x", "b": "{folder}/y"}, "imports": ("m", "n.o")},
        ),
        # of single models and versions
        (
            ["{model}", "--probe-steps=forecast=2000", "--trust-causality=forecast"],
            {},
            {"probe_steps": {"forecast": 2000}, "trust_causality": ("forecast",)},
        ),
        (
            ["{model}", "--check-with", "forecast={folder}/x.npy"],
            {},
            {"check_with": {"forecast": "{folder}/x.npy"}},
        ),
        (
            ["{model}", "forecast@2={path}", "words@7={path}"],
            {},
            {"versions": {"forecast": {1: "{path}", 2: "{path}"}, "words": {7: "{path}"}}},
        ),
        (["words@7={path}", "--probe-steps", "words=600"], {}, {"probe_steps": {"words": 600}}),
        (["{model}", "--resident-rows", "7"], {}, {"resident_rows": {"": 7}}),
        (
            ["{model}", "--resident-rows", "7", "--resident-rows", "forecast=9"],
            {},
            {"resident_rows": {"": 7, "forecast": 9}},
        ),
        (
            ["{model}"],
            {"STEPWELL_RESIDENT_ROWS": "7, forecast=9"},
            {"resident_rows": {"": 7, "forecast": 9}},
        ),
        # a folder of models
        (
            FOLDER,
            {},
            {"models": {}, "models_dir": "{folder}", "watch_models": True, "wait_for_models": False}
            | {"sessions": "migrate", "migrations": {"widen": "a.b:c"}}
            | {"version_policy": {"": VersionPolicy(latest=2), "words": POLICIES["words"]}},
        ),
        (
            [],
            FOLDER_BY_VARIABLES,
            {"models_dir": "{folder}", "watch_models": True, "wait_for_models": False}
            | {"sessions": "carry", "version_policy": {"": VersionPolicy(), **POLICIES}},
        ),
        (["{model}"], {}, {"watch_models": False, "wait_for_models": True, "sessions": "keep"}),
        # stores
        (
            ["{model}", "--store", "rediss://u:hidden@h:1/2?prefix=p:"],
            {},
            {"shared_store": dataclasses.replace(SHARED, login=Login("u", "hidden"))}
            | {"store_kind": "valkey", "data_dir": None},
        ),
        (["{model}", "--store", "valkey://h"], {"STEPWELL_DATA_DIR": "/x"}, {"data_dir": None}),
        # homes and default folders
        (
            ["m=~/x", "--data-dir=~/data"],
            HOME,
            {"models": {"m": "{folder}/x"}, "data_dir": "{folder}/data", "cache_dir": "{folder}/cache"},
        ),
        (["{model}"], {"XDG_DATA_HOME": "/somewhere"}, {"data_dir": Path("/somewhere/stepwell")}),
        (
            ["{model}"],
            {"XDG_DATA_HOME": "", "HOME": "/home/me"},
            {"data_dir": Path("/home/me/.local/share/stepwell")},
        ),
        (
            ["{model}", "--store", "memory", "--cache-dir", "/c"],
            {"HOME": "", "XDG_DATA_HOME": "", "XDG_CACHE_HOME": ""},
            {"store": "memory"},
        ),
    ],
)
def test_settings_are_read(
    model: str, tmp_path: Path, arguments: list[str], environment: dict[str, str], expected: dict[str, Any]
) -> None:
    for name in ("x", "y", "x.npy"):
        (tmp_path / name).touch()
    fill = filler(model, tmp_path)
    settings = read_settings(fill(arguments), fill(environment))
    assert {name: getattr(settings, name) for name in expected} == fill(expected, Path)


def filler(model: str, folder: Path) -> Callable[..., Any]:
    """Put a model and a folder into the texts of a row. Texts of expected values that name one become paths."""
    names = {"model": model, "path": model.partition("=")[2], "folder": folder}

    def fill(value: Any, kind: Callable[[str], Any] = str) -> Any:
        if isinstance(value, dict):
            return {key: fill(each, kind) for key, each in value.items()}
        if isinstance(value, list):
            return [fill(each, kind) for each in value]
        return kind(value.format(**names)) if isinstance(value, str) and "{" in value else value

    return fill


def test_each_model_has_its_version_policy(model: str, tmp_path: Path) -> None:
    settings = read_settings(filler(model, tmp_path)(FOLDER), {})
    assert [str(settings.policy_of(name)) for name in ("forecast", "words")] == ["latest 2", "3,5"]
    assert str(read_settings([model], {}).policy_of("forecast")) == "latest 1"


def test_unix_sockets_have_absolute_paths(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert str(read_settings([model, "--listen", "unix:b"], {}).listen) == f"unix:{tmp_path}/b"


NO_HOME = {"HOME": "", "XDG_DATA_HOME": "", "XDG_CACHE_HOME": ""}
ONE_OF_TWO = ", which keeps nothing on disk; give only one of the two"
TWICE = "must be given once for each name; got two values for"
PATH_RULE = "PATH must be a .keras, .onnx or .stepwell file"


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        # settings that need another one
        (["{model}", "--tls-cert", "c"], {}, "^--tls-cert: must be given with --tls-key$"),
        (["{model}", "--tls-key", "k"], {}, "^--tls-key: must be given with --tls-cert$"),
        (["{model}", "--tls-client-ca", "a"], {}, "^--tls-client-ca: must be given with --tls-cert$"),
        (
            ["{model}", "--auth-certificates", "c"],
            {},
            "--auth-certificates: must be given with --tls-client-ca",
        ),
        (
            ["{model}", *JWKS[:4]],
            {},
            "--auth-jwks: must be given with --auth-jwt-issuer: without it, the server would accept",
        ),
        (
            ["{model}", *JWKS[:2], *JWKS[4:]],
            {},
            "--auth-jwks: must be given with --auth-jwt-audience: without it, the server",
        ),
        (
            ["{model}", *JWKS[:2], "--auth-jwt-audience", "", *JWKS[4:]],
            {},
            "must be given with --auth-jwt-audience",
        ),
        (
            ["{model}", *JWKS[2:4]],
            {},
            "--auth-jwt-audience: must be given with --auth-jwks, the keys that sign the JWTs",
        ),
        (
            ["{model}", "--auth-jwt-audience", ""],
            {},
            "--auth-jwt-audience: must be given with --auth-jwks",
        ),
        (
            ["{model}", "--auth-jwt-tenant-claim", "org"],
            {},
            "--auth-jwt-tenant-claim: must be given with --auth-jwks",
        ),
        (
            ["{model}", "--auth-jwt-role-claim", "may"],
            {},
            "--auth-jwt-role-claim: must be given with --auth-jwks",
        ),
        (["{model}", *JWKS, "--auth-jwt-role-claim", ""], {}, "must be the name of a claim; got ''"),
        (
            ["{model}", "--watch-models"],
            {},
            "--watch-models: must be given with --models-dir, the folder that it applies to",
        ),
        (
            ["{model}", "--version-policy", "all"],
            {},
            "--version-policy: must be given with --models-dir, the folder that",
        ),
        (
            ["{model}", "--sessions", "migrate"],
            {},
            "--sessions: migrate needs a function, given by --migration",
        ),
        # folders of models
        (["{model}", "--models", "/nowhere"], {}, "--models: must be a folder; /nowhere does not exist"),
        (["{model}", "--models", __file__], {}, f"--models: must be a folder; {__file__} is a file"),
        (
            ["{model}", "--models", ".", "--version-policy", "all", "--version-policy", "latest"],
            {},
            f"{TWICE} all models",
        ),
        (
            ["{model}", "--models", ".", "--version-policy", "a=all", "--version-policy", "a=1"],
            {},
            f"{TWICE} 'a'",
        ),
        # settings of single models
        (
            ["{model}", "--resident-rows", "other=7"],
            {},
            "^--resident-rows: there is no model 'other'; the models are forecast$",
        ),
        (
            ["{model}", "--trust-causality", "other"],
            {},
            "--trust-causality: there is no model 'other'; the models are forecast",
        ),
        (["{model}", "--probe-steps", "other=5"], {}, "--probe-steps: there is no model 'other'"),
        (["{model}", "--resident-rows", "7", "--resident-rows", "8"], {}, f"{TWICE} all models$"),
        (
            ["{model}", "--resident-rows=forecast=7", "--resident-rows=forecast=8"],
            {},
            f"{TWICE} 'forecast'$",
        ),
        (
            ["{model}", "forecast@1={path}"],
            {},
            "^models: each version must be given once; forecast@1 is given as .* and as forecast@1=",
        ),
        # stores
        (
            ["{model}", "--store", "memory", "--data-dir", "/x"],
            {},
            f"^'--data-dir': cannot be used with '--store' memory{ONE_OF_TWO}$",
        ),
        (
            ["{model}"],
            {"STEPWELL_STORE": "memory", "STEPWELL_DATA_DIR": "/x"},
            f"^STEPWELL_DATA_DIR: cannot be used with STEPWELL_STORE memory{ONE_OF_TWO}$",
        ),
        (
            ["{model}", "--store", "valkey://h?color=red"],
            {},
            "'--store': color is not a known option; the options are prefix, partitions",
        ),
        (
            ["{model}", "--store", "valkey://u:hidden@h", "--data-dir", "/x"],
            {},
            "'--data-dir': cannot be used with '--store' valkey://u@h:6379/0, which keeps nothing on disk",
        ),
        # a password in a mistyped URL is not shown
        (["{model}", "--store=valkey//u:s3cret@h/0"], {}, "^((?!s3c).)*$"),
        (["{model}", "--store=valkey://u:s3cret/x@h/0"], {}, "^((?!s3c).)*$"),
        (["{model}", "--store=valkey://u:s3cret?x=1@h/0"], {}, "^((?!s3c).)*$"),
        # the C library takes it for loopback
        (["{model}", "--listen", "*:50051"], {}, r"0\.0\.0\.0 and \[::\] are all interfaces; got '\*:50051'"),
        # a variable that cannot be read stops the start although the option is given
        (
            ["{model}", "--listen", "127.0.0.1:0"],
            {"STEPWELL_LISTEN": "nowhere"},
            "^Invalid value for STEPWELL_LISTEN: .*'nowhere'",
        ),
        (
            ["{model}", "--resident-rows", "7"],
            {"STEPWELL_RESIDENT_ROWS": "many"},
            "^Invalid value for STEPWELL_RESIDENT_ROWS: .*'many'",
        ),
        (
            ["{model}", "--import", "m"],
            {"STEPWELL_IMPORT": "not a module"},
            "^Invalid value for STEPWELL_IMPORT: .*'not a module'",
        ),
        (
            ["{model}"],
            {"STEPWELL_MODELS": "forecast"},
            "^Invalid value for STEPWELL_MODELS: .*'forecast'",
        ),
        (
            ["{model}"],
            {"STEPWELL_INSECURE_LISTEN": "maybe"},
            "^Invalid value for STEPWELL_INSECURE_LISTEN: must be true or false; got 'maybe'$",
        ),
        # homes that do not exist
        (
            ["{model}", "--cache-dir", "/c"],
            NO_HOME,
            "^--data-dir: give a folder; there is no default because neither HOME nor",
        ),
        (
            ["{model}", "--data-dir", "/d"],
            NO_HOME,
            "^--cache-dir: give a folder; there is no default because neither HOME nor",
        ),
        (
            ["{model}", "--data-dir", "~/x", "--cache-dir", "/c"],
            NO_HOME,
            "'--data-dir': must be a path that exists: ~ has no home folder on this machine; got '~/x'",
        ),
        (
            ["m=~nobody_here/m.keras"],
            NO_HOME,
            "with a path that exists: ~nobody_here has no home folder on this machine; got 'm=~nobody_here/m.keras'",
        ),
        # unknown and incomplete options
        (["{model}", "--lissten", "x"], {}, "^No such option '--lissten'. .*--listen"),
        (["{model}", "--listen"], {}, "^Option '--listen' requires an argument"),
        (["{model}", "--max-batch", "3"], {}, "^No such option '--max-batch'"),
        # models
        ([], {}, "give at least one as NAME=PATH, such as forecast=model.keras, or in STEPWELL_MODELS"),
        (["forecast"], {}, "for NAME=PATH...: must be NAME=PATH; got 'forecast'"),
        (["=x.keras"], {}, "a name of 1 to 128 letters"),
        (
            ["a@0=x.keras"],
            {},
            "must be NAME=PATH with a name .*, or NAME@VERSION with a whole number from 1 to",
        ),
        (["a:b=x.keras"], {}, "or NAME@VERSION with a whole number from 1 to 9223372036854775807"),
        (["a@2=x.keras", "a@2=y.keras"], {}, f"{TWICE} 'a@2'"),
        (["a b=x.keras"], {}, "a name of 1 to 128 letters.*got 'a b=x.keras'"),
        (["a" * 129 + "=x.keras"], {}, "a name of 1 to 128 letters"),
        (["a=x.keras", "a=y.keras"], {}, f"{TWICE} 'a'"),
        (["a=/nowhere/x.keras"], {}, f"model a: {PATH_RULE}; /nowhere/x.keras does not exist"),
        (["a=/"], {}, f"model a: {PATH_RULE}; / is a folder"),
    ],
)
def test_settings_are_refused(
    model: str, tmp_path: Path, arguments: list[str], environment: dict[str, str], message: str
) -> None:
    fill = filler(model, tmp_path)
    assert re.search(message, refused(fill(arguments), environment))


def test_a_store_url_and_a_data_dir_exclude_each_other() -> None:
    with pytest.raises(StartError, match="--data-dir: must be left out with --store URL"):
        Settings(store=StoreUrl(addresses=(("h", 1),)), data_dir=Path("/x"))


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


def test_a_saved_model_folder_is_told_from_another(tmp_path: Path) -> None:
    (tmp_path / "saved_model.pb").touch()
    assert re.search(
        r"is a SavedModel folder, which holds a graph and no Keras model: ", refused([f"a={tmp_path}"], {})
    )
    (tmp_path / "keras_metadata.pb").touch()
    with pytest.raises(StartError, match=r"is a SavedModel folder of Keras 2: .*tf_keras") as caught:
        read_settings([f"a={tmp_path}"], {})
    assert f"load_model('{tmp_path.name}').save_weights('name.weights.h5')" in str(caught.value)


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
