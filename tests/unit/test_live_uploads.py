"""Files that are sent: taken, bounded, loaded, deleted."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from stepwell_server.catalog.files.program_store import NOT_KEPT, ProgramStore
from stepwell_server.catalog.files.uploads import Uploads
from stepwell_server.compile.errors import ModelError
from stepwell_server.errors import (
    InvalidInput,
    ModelLoadFailed,
    ServerError,
    Unavailable,
    UploadOff,
    VersionExists,
)
from support.clock import ManualClock
from support.engine.catalog_on_fakes import CatalogHarness


@pytest.fixture
def at(tmp_path: Path) -> CatalogHarness:
    return CatalogHarness(tmp_path)


def _uploading(tmp_path: Path, max_bytes: int = 100) -> CatalogHarness:
    clock = ManualClock()
    at = CatalogHarness(
        tmp_path,
        uploads=Uploads(tmp_path / "uploads", max_bytes, clock),
        kept=ProgramStore(tmp_path / "kept"),
    )
    at.clock = clock
    return at


async def _sent(at: CatalogHarness) -> str:
    """Send a file. Returns its token."""
    upload = await at.live.begin_upload("m.keras", "")
    await upload.write(b"x")
    return (await upload.finish()).token


async def test_nothing_is_accepted_unless_uploads_are_allowed(at: CatalogHarness) -> None:
    for wrong in (at.live.begin_upload("m.keras", ""), at.load(path="", upload="u-1")):
        with pytest.raises(UploadOff, match="--allow-model-upload"):
            await wrong


async def test_an_upload_is_loaded_deleted_and_its_program_kept_until_it_is_unloaded(tmp_path: Path) -> None:
    at = _uploading(tmp_path)
    upload = await at.live.begin_upload("../../etc/my model.keras", "acme")
    for piece in (b"a ", b"model"):
        await upload.write(piece)
    sent = await upload.finish()
    assert sent.sha256 == hashlib.sha256(b"a model").hexdigest()
    (folder,) = (tmp_path / "uploads").iterdir()
    assert [file.name for file in folder.iterdir()] == ["my_model.keras"]
    assert (folder.stat().st_mode & 0o777, (folder / "my_model.keras").stat().st_mode & 0o777) == (
        0o700,
        0o600,
    )
    for token, tenant in (("u-1", "acme"), (sent.token, "zeta")):
        with pytest.raises(InvalidInput, match="upload must be a token that UploadModel returned"):
            await at.load(path="", upload=token, tenant=tenant)
    await at.load(path="", upload=sent.token, tenant="acme")
    assert at.compiler.done == ["my_model.keras"]
    assert list((tmp_path / "uploads").iterdir()) == []
    kept = tmp_path / "kept" / "m@1.stepwell"
    assert at.engine.told[0] == ("load", "m", 1, str(kept), "acme")
    assert kept.is_file()
    with pytest.raises(InvalidInput, match="that no load has used"):
        await at.load(path="", upload=sent.token, tenant="acme")
    await at.live.unload("m", 0, force=False)
    assert not kept.exists()


async def test_a_sender_of_an_unused_file_is_notified(tmp_path: Path) -> None:
    """As where servers share a store, which has no place for it."""
    at = CatalogHarness(tmp_path, uploads=Uploads(tmp_path / "uploads", 100, ManualClock()))
    await at.load(path="", upload=await _sent(at))
    await at.load(version=2, keep_default=True)
    sent, found = at.live.status("m")
    assert sent.reason == NOT_KEPT
    assert found.reason == "", "of a file on the disk"
    await at.live.unload("m", 0, force=False)
    await at.load(version=1)
    (again,) = at.live.status("m")
    assert (again.version, again.reason) == (1, ""), "it is another load"


async def test_an_upload_whose_load_is_refused_can_be_loaded_with_other_options(tmp_path: Path) -> None:
    at = _uploading(tmp_path)
    await at.load()
    token = await _sent(at)
    with pytest.raises(VersionExists):
        await at.load(version=1, path="", upload=token)
    assert (await at.load(path="", upload=token)).version == 2


async def test_an_upload_that_fails_to_load_is_deleted(tmp_path: Path) -> None:
    at = _uploading(tmp_path)
    at.compiler.error = ModelError("no")
    token = await _sent(at)
    with pytest.raises(ModelLoadFailed):
        await at.load(path="", upload=token)
    assert list((tmp_path / "uploads").iterdir()) == []
    assert not (tmp_path / "kept").exists()


async def test_uploads_are_bounded_in_size_number_and_time(tmp_path: Path) -> None:
    at = _uploading(tmp_path, max_bytes=10)
    for name in ("m.h5", ".keras", "", "m.keras/"):
        with pytest.raises(InvalidInput, match="filename must be that of a model, ending in"):
            await at.live.begin_upload(name, "")
    upload = await at.live.begin_upload("m.keras", "")
    with pytest.raises(InvalidInput, match="content must be the bytes of a file; got none"):
        await upload.finish()
    await upload.write(b"0123456789")
    with pytest.raises(ServerError, match=r"content must be at most 10 bytes in all \(--max-model-bytes\)"):
        await upload.write(b"x")
    await upload.abort()
    assert list((tmp_path / "uploads").iterdir()) == []
    uploads = [await at.live.begin_upload("m.keras", "") for _ in range(8)]
    with pytest.raises(ServerError, match="uploads that are not loaded must be at most 8; there are 8"):
        await at.live.begin_upload("m.keras", "")
    await uploads[0].write(b"x")
    sent = await uploads[0].finish()
    at.clock.advance(3601)
    late = await at.live.begin_upload("m.keras", "")
    assert len(list((tmp_path / "uploads").iterdir())) == 1
    for gone in (at.load(path="", upload=sent.token), uploads[1].write(b"x")):
        with pytest.raises(ServerError, match="an hour"):
            await gone
    await late.write(b"x")
    await at.live.close()
    assert list((tmp_path / "uploads").iterdir()) == []


async def test_what_an_earlier_server_took_is_deleted_at_the_start(tmp_path: Path) -> None:
    at = _uploading(tmp_path)
    await at.live.begin_upload("m.keras", "")
    assert len(list((tmp_path / "uploads").iterdir())) == 1
    Uploads(tmp_path / "uploads", 10, ManualClock())
    assert list((tmp_path / "uploads").iterdir()) == []


async def test_a_disk_that_is_full_refuses_an_upload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = _uploading(tmp_path)
    upload = await at.live.begin_upload("m.keras", "")

    def full(descriptor: int, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(Unavailable, match="No space left on device"):
            await upload.write(b"x")
    await upload.abort()
    assert list((tmp_path / "uploads").iterdir()) == []
