"""The server's files of TLS: what is refused, and when a change is taken over."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

import pytest

from stepwell_server.errors import StartError
from stepwell_server.rpc.fronts.certificates import CertificateFiles, Certificates, follow
from support.certificates import Authority, Pair


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def _put(source: Pair, target: Pair) -> None:
    """Replace files as tools do, by others of their name."""
    for new, old in zip(source, target, strict=True):
        fresh = old.with_suffix(".fresh")
        shutil.copyfile(new, fresh)
        fresh.replace(old)


def test_what_cannot_be_used_is_refused_with_option_rule_and_file(
    authority: Authority, tmp_path: Path
) -> None:
    good, other = authority.issue(), authority.issue()
    secret = authority.issue(password=b"secret")
    junk, gone = tmp_path / "junk", tmp_path / "gone"
    junk.write_bytes(b"-----BEGIN CERTIFICATE-----\nnonsense\n-----END CERTIFICATE-----\n")
    refusals: list[tuple[tuple[Path, Path, Path | None], str]] = [
        ((gone, good.key, None), f"--tls-cert: must be a readable file; {gone}: No such file"),
        ((good.cert, tmp_path, None), f"--tls-key: must be a readable file; {tmp_path}: Is a dir"),
        (
            (good.key, good.key, None),
            f"--tls-cert: must contain certificates in PEM; {good.key} contains none",
        ),
        (
            (junk, good.key, None),
            f"--tls-cert: must contain certificates in PEM; {junk} contains an unreadable",
        ),
        (
            (good.cert, other.key, None),
            f"--tls-key: must be the key of the first certificate in {good.cert}, which is the server's own; the key in {other.key} belongs to another",
        ),
        (
            (good.cert, good.cert, None),
            f"--tls-key: must be a private key in PEM that is not encrypted; {good.cert}",
        ),
        ((secret.cert, secret.key, None), f"{secret.key} is encrypted"),
        ((*good, good.key), f"--tls-client-ca: must contain certificates in PEM; {good.key} contains none"),
        (
            (*good, junk),
            f"--tls-client-ca: must contain certificates in PEM; {junk} contains an unreadable one",
        ),
    ]
    shared = authority.issue()
    shared.key.chmod(0o622)
    refusals.append(((*shared, None), f"--tls-key: {shared.key} must be a file that no other user can write"))
    for files, message in refusals:
        with pytest.raises(StartError) as refused:
            CertificateFiles(*files)
        assert message in str(refused.value)


def test_a_change_is_taken_over_when_it_is_whole_and_said_once(authority: Authority) -> None:
    used, new = authority.issue(), authority.issue()
    files = CertificateFiles(*used, authority.cert)
    assert files.at_start.client_ca == authority.cert.read_bytes()
    assert files.changed() is None

    _put(new, used)
    assert files.changed() is None, "it may be half written"
    found = files.changed()
    assert found is not None
    assert (found.chain, found.key) == (new.cert.read_bytes(), new.key.read_bytes())
    assert "PRIVATE" not in repr(found)
    assert files.changed() is None

    os.unlink(used.key)
    assert files.changed() is None
    with pytest.raises(StartError, match="--tls-key: must be a readable file"):
        files.changed()
    assert files.changed() is None, "it was said"

    _put(new, used)
    assert files.changed() is None
    assert files.changed() == found


async def test_who_asks_has_them_read_at_once(authority: Authority) -> None:
    used, new = authority.issue(), authority.issue()
    files = CertificateFiles(*used, None)
    given: asyncio.Queue[Certificates] = asyncio.Queue()
    following = asyncio.create_task(follow(files, given.put_nowait))
    files.asked.set()
    assert await given.get() == files.at_start, "also what has not changed, so that it is said"
    _put(new, used)
    files.asked.set()
    assert (await given.get()).chain == new.cert.read_bytes()
    assert files.changed() is None
    following.cancel()
