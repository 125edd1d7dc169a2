"""The files that say who callers are: what they may hold, how they are changed, and when a change is believed."""

from __future__ import annotations

import datetime as dt
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import jwt
import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from stepwell.cli import main
from stepwell_server.auth import certificate_map, token_file, tokens, web_tokens
from stepwell_server.auth.callers import Callers
from stepwell_server.auth.tokens import Token, caller_of, digest_of
from stepwell_server.core.callers import Caller, Role
from stepwell_server.errors import StartError, Unauthenticated
from stepwell_server.files.watched import WatchedFile
from support.clock import ManualClock
from support.rpc.fake_call import FakeCall

HASH = "sha256:" + "0123456789abcdef" * 4
OTHER = HASH.replace("0", "1")
ANN = Caller("ann", "acme", Role.USER)


def test_a_file_of_tokens_is_read() -> None:
    known = tokens.parse(
        f"# a comment\n\n ann acme user {HASH} created=2026-11-26T12:00:00Z expires=2026-11-27T12:00:00+00:00 # laptop\n"
        f"ann\tacme\tuser\t{OTHER}\r\nops - admin {HASH.replace('0', '2')}"
    )
    first, second, third = known.values()
    assert (first.caller, second.caller, third.caller) == (ANN, ANN, Caller("ops", "", Role.ADMIN))
    assert first.expires == dt.datetime(2026, 11, 27, 12, tzinfo=dt.UTC)
    assert tokens.parse(f"{first.line}\n") == {first.digest: first}
    assert tokens.parse("") == {}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("ann acme user", "must be NAME TENANT ROLE sha256:HASH"),
        (f"a/b acme user {HASH}", "NAME must be 1 to 64 letters"),
        (f"ann * user {HASH}", "TENANT must be 1 to 64 letters"),
        (f"ann a\x1fb user {HASH}", "HASH must be sha256:"),
        (f"ann acme root {HASH}", "ROLE must be one of viewer, user, admin; got 'root'"),
        ("ann acme user sha256:0123", "got 11 characters"),
        (f"ann acme user {HASH.upper()}", "HASH must be sha256:"),
        ("ann acme user stw_secretsecret", "a token itself, which must be revoked now"),
        (f"ann acme user {HASH} for-ever", "got 'for-ever'"),
        (f"ann acme user {HASH} expires=2026-11-26", "expires must be a time such as"),
        (f"ann acme user {HASH} expires=soon", "expires must be a time such as"),
        (f"ann acme admin {OTHER}\nann acme user {HASH}", "must be that in line 3, admin; got user"),
        (f"ann acme user {HASH}\nbob acme user {HASH}", "must have a different hash"),
    ],
)
def test_a_broken_line_is_named(line: str, words: str) -> None:
    with pytest.raises(ValueError, match=r"^line \d: ") as raised:
        tokens.parse(f"# callers\n\n{line}\n")
    number = 3 + line.count("\n")
    said = str(raised.value)
    assert said.startswith(f"line {number}: "), said
    assert words in said
    assert "secret" not in said


def test_new_tokens_are_alike_in_nothing_but_their_beginning() -> None:
    made = {tokens.new_token() for _ in range(100)}
    assert len(made) == 100
    assert all(len(one) == 47 and one.startswith("stw_") and one[4:].isalnum() for one in made)


def test_changes_of_a_file_are_whole_and_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "callers.tokens"
    for number, name in enumerate(("ann", "ann", "bob")):
        token_file.add(path, Token(caller_of(name, "acme", "user"), digest_of(str(number))))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text("# by hand\n" + path.read_text().rstrip("\n"))
    link = tmp_path / "link"
    link.symlink_to(path)
    token_file.add(link, Token(caller_of("eve", "beta", "viewer"), digest_of("3")))
    removed = token_file.remove(link, lambda token: token.caller == ANN)
    assert [token.digest for token in removed] == [digest_of("0"), digest_of("1")]
    assert [token.caller.name for token in token_file.read(path)] == ["bob", "eve"]
    assert path.read_text().startswith("# by hand\n# Callers of")
    assert link.is_symlink()
    before = path.read_text()
    with pytest.raises(ValueError, match="the role of 'acme/bob' must be that in line"):
        token_file.add(path, Token(caller_of("bob", "acme", "admin"), digest_of("4")))
    with pytest.raises(FileNotFoundError):
        token_file.remove(tmp_path / "none", lambda _: True)
    assert path.read_text() == before
    assert sorted(one.name for one in tmp_path.iterdir()) == ["callers.tokens", "link"]


def test_writers_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "callers.tokens"
    code = (
        "import sys; from pathlib import Path; from stepwell_server.auth import token_file as f, tokens as t\n"
        "for n in range(20):\n"
        "    f.add(Path(sys.argv[1]), t.Token(t.caller_of('ann', 'acme', 'user'), t.digest_of(sys.argv[2] + str(n))))"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), name]) for name in "ab"]
    assert [one.wait(100) for one in writers] == [0, 0]
    assert len(token_file.read(path)) == 40


def test_commands(tmp_path: Path) -> None:
    path = str(tmp_path / "callers.tokens")

    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(main, ["tokens", *arguments], env={"STEPWELL_AUTH_TOKENS": path})
        return result.exit_code, result.output

    code, out = run("add", "ann", "--tenant", "acme", "--expires-in", "90d", "--json")
    made = json.loads(out)
    assert (code, made["token"][:4], made["tenant"], made["role"]) == (0, "stw_", "acme", "user")
    assert digest_of(made["token"]).hex().startswith(made["id"])
    left = dt.datetime.fromisoformat(made["expires"]) - dt.datetime.fromisoformat(made["created"])
    assert left == dt.timedelta(days=90)
    code, out = run("add", "ann", "--tenant", "beta")
    assert (code, out.count("\n"), out.split()[-1][:4]) == (0, 1, "stw_")
    assert made["token"] not in Path(path).read_text()
    listed = json.loads(run("list", "--json")[1])["tokens"]
    assert [(one["name"], one["tenant"], one["expired"]) for one in listed] == [
        ("ann", "acme", False),
        ("ann", "beta", False),
    ]
    assert "ann" in run("list")[1]
    assert run("revoke", "ann") == (
        2,
        "stepwell: error: --tenant: must be given, as 'ann' is a caller of acme, beta\n",
    )
    assert run("revoke", "bob")[0] == run("revoke", "ann", "--id", "000")[0] == 2
    assert run("revoke", "ann", "--tenant", "beta")[0] == run("revoke", "ann", "--id", made["id"])[0] == 0
    assert json.loads(run("list", "--json")[1]) == {"tokens": []}
    assert "ROLE" not in run("add", "a b", "--tenant", "acme")[1]
    assert "a number of seconds, 1 to 3153600000; got '0'" in run("add", "ann", "--expires-in", "0")[1]
    Path(path).write_text("broken\n")
    for command in (("add", "ann", "--tenant", "acme"), ("list",), ("revoke", "ann")):
        code, out = run(*command)
        assert (code, "line 1: must be NAME" in out) == (2, True), out


def test_certificates_are_found_by_their_names() -> None:
    known = certificate_map.parse(
        '[[caller]]\nsan = "spiffe://acme/a"\nname = "a"\ntenant = "acme"\nrole = "user"\n'
        '[[caller]]\nsan = "*.workers.Example"\nname = "w"\nrole = "viewer"\n'
    )
    of = known.callers_of
    assert of(["x", "spiffe://acme/a"]) == {Caller("a", "acme", Role.USER)}
    assert of(["w7.workers.example"]) == of(["W7.WORKERS.EXAMPLE"]) == {Caller("w", "", Role.VIEWER)}
    assert len(of(["spiffe://acme/a", "w7.workers.example"])) == 2
    for name in (
        *("spiffe://acme/A", "spiffe://acme/a/b", "workers.example", ".workers.example", "*.workers.example"),
        *(
            "a.b.workers.example",
            "me@x.workers.example",
            "spiffe://x.workers.example",
            "w.workers.example.evil",
            "",
        ),
    ):
        assert not of([name]), name
    assert not certificate_map.parse("").callers_of(["a"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("callers", "must be TOML"),
        ('[x]\na = "b"', "nothing else; got x"),
        ('caller = "x"', "must be tables"),
        ('[[caller]]\nsan = "a"\nname = "a"', "[[caller]] 1: must have san, name, role"),
        ('[[caller]]\nsan = "a"\nname = "a"\nrole = 3', "must be a table of strings"),
        ('[[caller]]\nsan = "a"\nname = "a"\nrole = "user"\nmore = "x"', "got san, name, role, more"),
        ('[[caller]]\nsan = "a"\nname = "a"\ntenant = "*"\nrole = "user"', "TENANT must be 1 to 64"),
        *(
            (
                f'[[caller]]\nsan = "{san}"\nname = "a"\nrole = "user"',
                "san must be a name in the certificate",
            )
            for san in ("", "*", "*.com", "a*.b.c", "*.b.*", "**.b.c", "spiffe://acme/*")
        ),
        (
            2 * '[[caller]]\nsan = "a"\nname = "a"\nrole = "user"\n',
            "[[caller]] 2: san must belong to one caller",
        ),
    ],
)
def test_broken_files_of_certificates(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        certificate_map.parse(text)


def jwk(key: Any, **changes: Any) -> dict[str, Any]:
    of: Any = jwt.algorithms.ECAlgorithm
    if isinstance(key, rsa.RSAPublicKey):
        of = jwt.algorithms.RSAAlgorithm
    elif isinstance(key, ed25519.Ed25519PublicKey):
        of = jwt.algorithms.OKPAlgorithm
    found = json.loads(of.to_jwk(key)) | {"kid": "k"} | changes
    return {name: value for name, value in found.items() if value is not None and name != "key_ops"}


EC = ec.generate_private_key(ec.SECP256R1()).public_key()


def test_keys_are_read() -> None:
    others = [
        rsa.generate_private_key(65537, 2048).public_key(),
        ed25519.Ed25519PrivateKey.generate().public_key(),
    ]
    keys = [jwk(EC, kid="1"), *(jwk(key, kid=str(n)) for n, key in enumerate(others, 2)), jwk(EC, use="enc")]
    found = web_tokens.parse(json.dumps({"keys": [*keys, jwk(others[0], kid="4", alg="PS256")]}))
    assert [found[kid].algorithms for kid in "134"] == [("ES256",), ("EdDSA",), ("PS256",)]
    assert all("HS" not in name and name != "none" for key in found.values() for name in key.algorithms)
    assert len({key.thumbprint for key in found.values()}) == 4
    assert [*web_tokens.parse(json.dumps({"keys": [jwk(EC, kid=None)]}))] == [""]
    unknown = [jwk(EC, kid="x", crv="secp256k1"), jwk(EC, kid="y", alg="HS256"), {"kty": "AKP", "kid": "z"}]
    assert [*web_tokens.parse(json.dumps({"keys": [*unknown, jwk(EC)]}))] == ["k"]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("no json", 'must be a JWKS, {"keys": [...]} in JSON: Expecting value'),
        ([], "must have a key that verifies signatures"),
        (["x"], "key 1: must be an object"),
        ([jwk(EC), jwk(EC)], "key 2: its kid must be unique"),
        ([jwk(EC, kid=None), jwk(EC)], "key 1: must have a kid"),
        ([{"kty": "oct", "k": "c2VjcmV0", "kid": "k"}], "must be a public key"),
        ([jwk(EC, d="AQAB")], "must be a public key"),
        ([jwk(EC, crv="secp256k1")], "must be RSA, EC"),
        ([jwk(EC, alg="HS256")], "its alg must be one of ES256; got 'HS256'"),
        ([jwk(EC, alg="none")], "its alg must be one of ES256; got 'none'"),
        ([jwk(EC, x="AQAB")], "must be a complete key"),
        (
            [jwk(rsa.generate_private_key(65537, 1024).public_key())],  # noqa: S505 - that is the point
            "must have at least 2048 bits; it has 1024",
        ),
    ],
)
def test_broken_files_of_keys(keys: Any, words: str) -> None:
    text = keys if isinstance(keys, str) else json.dumps({"keys": keys})
    with pytest.raises(ValueError, match=re.escape(words)):
        web_tokens.parse(text)


def test_a_folder_is_no_file_whatever_its_mode(tmp_path: Path) -> None:
    folder = tmp_path / "tokens"
    folder.mkdir(0o755)
    with pytest.raises(StartError, match=r"^--x: .*tokens: must be a file that can be read; Is a directory$"):
        WatchedFile("--x", folder, str, is_private=True)


def test_a_file_is_read_again_when_it_has_changed_and_is_still(tmp_path: Path) -> None:
    path = tmp_path / "numbers"
    with pytest.raises(StartError, match=r"^--x: .*numbers: must be a file that can be read; No such file"):
        WatchedFile("--x", path, int)
    path.write_text("1")
    file = WatchedFile("--x", path, int)
    path.write_text("22")
    assert [file.changed(), file.value, file.changed(), file.value, file.changed()] == [
        False,
        1,
        True,
        22,
        False,
    ]
    path.write_text("x")
    assert not file.changed()
    with pytest.raises(StartError, match="invalid literal"):
        file.changed()
    assert (file.changed(), file.value) == (False, 22)  # said once
    path.unlink()
    assert not file.changed()
    with pytest.raises(StartError, match="No such file"):
        file.changed()
    path.write_text("333")
    assert (file.changed(at_once=True), file.value) == (True, 333)


@pytest.mark.parametrize(
    ("mode", "is_private", "words"),
    [
        (0o600, True, None),
        (0o644, True, r"^--x: .* must be readable by its owner only; its mode is 0644: chmod 600 "),
        (0o644, False, None),
        (0o646, False, r"^--x: .* must be a file that no other user can write; its mode is 0646"),
        (0o602, True, r"^--x: .* must be a file that no other user can write; its mode is 0602"),
    ],
)
def test_nobody_else_reads_secrets_or_writes(
    tmp_path: Path, mode: int, is_private: bool, words: str | None
) -> None:
    path = tmp_path / "file"
    path.write_text("1")
    os.chmod(path, mode)
    if words is None:
        assert WatchedFile("--x", path, int, is_private=is_private).value == 1
        return
    with pytest.raises(StartError, match=words):
        WatchedFile("--x", path, int, is_private=is_private)


def test_what_expires_is_refused_from_then_on(tmp_path: Path) -> None:
    clock = ManualClock()
    path = tmp_path / "callers.tokens"
    expires = dt.datetime.fromtimestamp(clock.now() + 60, dt.UTC)
    token_file.add(path, Token(ANN, digest_of("t"), None, expires))
    callers = Callers(clock, token_file=path)
    call = FakeCall()
    call.metadata = {"authorization": "bearer t "}
    known = callers.identify(call)
    assert known.caller == ANN
    assert known.until - clock.monotonic() == pytest.approx(60)
    assert callers.renewed(known) is not None
    clock.advance(61)
    assert callers.renewed(known) is None
    with pytest.raises(Unauthenticated, match="the bearer token has expired, at "):
        callers.identify(call)
