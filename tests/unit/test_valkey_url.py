"""URLs of shared stores: what they say, and what is refused."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from stepwell_server.store.valkey.connection.url import Login, StoreUrl, Tls, UrlError, parse


def test_all_that_a_url_may_say() -> None:
    url = parse(
        "valkeys://me:p%40ss@a:1,[::1]:2,b/3?prefix=x:&partitions=8&replicas=2&sentinel=main&timeout_ms=500"
        "&tombstone_s=60&ca=/ca.pem&cert=/c.pem&key=/k.pem&server_name=db",
        {"STEPWELL_VALKEY_SENTINEL_USER": "su", "STEPWELL_VALKEY_SENTINEL_PASSWORD": "sp"},
    )
    assert url == StoreUrl(
        addresses=(("a", 1), ("::1", 2), ("b", 26379)),
        kind="sentinel",
        sentinel="main",
        database=3,
        login=Login("me", "p@ss"),
        sentinel_login=Login("su", "sp"),
        tls=Tls(Path("/ca.pem"), Path("/c.pem"), Path("/k.pem"), "db"),
        prefix="x:",
        partitions=8,
        replicas=2,
        timeout_s=0.5,
        tombstone_s=60,
    )


@pytest.mark.parametrize(
    ("text", "addresses", "kind"),
    [
        ("valkey://h", (("h", 6379),), "server"),
        ("redis://h/", (("h", 6379),), "server"),
        ("rediss://h/0", (("h", 6379),), "server"),
        ("valkey://[::1]", (("::1", 6379),), "server"),
        ("valkey://a,b:7?cluster=true", (("a", 6379), ("b", 7)), "cluster"),
        ("valkey://a?cluster=false", (("a", 6379),), "server"),
    ],
)
def test_what_is_left_out(text: str, addresses: object, kind: str) -> None:
    url = parse(text, {})
    assert (url.addresses, url.kind, url.prefix, url.partitions) == (addresses, kind, "stepwell:", None)
    assert (url.login, url.replicas, url.timeout_s, url.tls is not None) == (
        Login(),
        0,
        2.0,
        text.startswith("rediss"),
    )


def test_user_and_password_from_elsewhere(tmp_path: Path) -> None:
    environ = {"STEPWELL_VALKEY_USER": "eu", "STEPWELL_VALKEY_PASSWORD": "ep"}
    assert parse("valkey://h", environ).login == Login("eu", "ep")
    assert parse("valkey://u:p@h", environ).login == Login("u", "p")
    assert parse("valkey://u@h", environ).login == Login("u", "ep")
    file = tmp_path / "password"
    file.write_text("fp\n")
    file.chmod(0o600)
    assert parse(f"valkey://u@h?password_file={file}", environ).login == Login("u", "fp")


def test_a_url_as_it_is_shown_has_no_password_and_says_the_same() -> None:
    text = (
        "valkeys://me@h:1,[::1]:2/2?sentinel=main&prefix=x:&partitions=8&replicas=2&timeout_ms=500&tombstone_s=60"
        "&ca=/ca.pem&cert=/c.pem&key=/k.pem&server_name=db"
    )
    url = parse(text, {})
    secret = parse(text.replace("me@", "me:hidden@"), {"STEPWELL_VALKEY_SENTINEL_PASSWORD": "hidden"})
    assert str(url) == str(secret) == text
    assert "hidden" not in repr(secret)
    assert parse(str(url), {}) == url
    assert str(parse("redis://[::1]?cluster=true", {})) == "valkey://[::1]:6379/0?cluster=true"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("http://h", "it must begin with valkey://, valkeys://, redis:// or rediss://; got 'http'"),
        ("valkey://[::1", "it must be a URL"),
        ("valkey://", "an address must be HOST or HOST:PORT.*; got ''"),
        ("valkey://a,,b", "an address must be .*; got ''"),
        ("valkey://h:", "an address must be .*; got 'h:'"),
        ("valkey://h:0", "an address must be .*; got 'h:0'"),
        ("valkey://h:65536", "an address must be .* with a port from 1 to 65535, .*; got 'h:65536'"),
        ("valkey://h:x", "an address must be .*; got 'h:x'"),
        ("valkey://::1", "an address must be .*IPv6 address in brackets; got '::1'"),
        ("valkey://h/x", "after the addresses there must be a database number, as in /0; got 'x'"),
        ("valkey://h/0/1", "database number.*; got '0/1'"),
        ("valkey://h/-1", "database number.*; got '-1'"),
        ("valkey://h/1?cluster=true", "the database of a Cluster must be 0; got 1"),
        ("valkey://h?cluster=true&sentinel=x", "sentinel and cluster must not be given together"),
        ("valkey://h?cluster=1", "cluster must be true or false; got '1'"),
        ("valkey://h?sentinel=", "sentinel must not be empty"),
        ("valkey://h?replicas=1&replicas=2", "replicas must be given once"),
        ("valkey://h?replicas=-1", "replicas must be a number from 0 to 16; got '-1'"),
        ("valkey://h?replicas=17", "replicas must be a number from 0 to 16; got '17'"),
        ("valkey://h?partitions=0", "partitions must be a number from 1 to 4096; got '0'"),
        ("valkey://h?timeout_ms=49", "timeout_ms must be a number from 50 to 60000; got '49'"),
        ("valkey://h?timeout_ms=٣٣٣", "timeout_ms must be a number"),
        (
            "valkey://h?prefix=a{b}",
            "prefix must have at most 64 bytes, all printable, and no braces; got 'a{b}'",
        ),
        ("valkey://h?prefix=%00", "prefix must have at most 64 bytes"),
        (f"valkey://h?prefix={65 * 'x'}", "prefix must have at most 64 bytes"),
        ("valkey://h?ca=/x", "ca must be given with valkeys:// or rediss://"),
        ("valkeys://h?cert=/x", "cert and key must be given together"),
        ("valkey://h?color=red", "color is not a known option; the options are prefix, partitions"),
        ("valkey://h?x", "after '\\?' there must be NAME=VALUE"),
        ("valkey://h#x", "it must not contain '#'"),
        # of a password that is not written as in a URL nothing is shown
        ("valkey://u:s3c/ret@h/0", "^in a name or password '/' must be written %2F"),
        ("valkey://u:33/ret@h/0", "^in a name or password '/' must be written %2F"),
        ("valkey://u:s3c?r=t@h/0", "^in a name or password '/' must be written %2F"),
        ("valkey://h:x?prefix=a", "an address must be HOST or HOST:PORT .*; got 'h:x'"),
        ("valkey://u:p@h?password_file=/x", "password_file must not be given with a password in the URL"),
        ("valkey://h?password_file=/no/such/file", "password_file: .*/no/such/file"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(UrlError, match=message):
        parse(text, {})


@pytest.mark.parametrize(
    ("content", "mode", "message"),
    [
        *((content, 0o600, "must have one line, the password; it has") for content in ("", "a\nb\n", "\n")),
        ("p\n", 0o622, "password_file: "),
        ("p\n", 0o644, "password_file: .* must be readable by its owner only; .*: chmod 600"),
        ("p\n", 0o440, ""),
    ],
)
def test_a_password_file_has_one_line_and_is_not_for_all(
    tmp_path: Path, content: str, mode: int, message: str
) -> None:
    file = tmp_path / "password"
    file.write_text(content)
    file.chmod(mode)
    with pytest.raises(UrlError, match=message) if message else contextlib.nullcontext():
        assert parse(f"valkey://h?password_file={file}", {}).login.password == "p"
