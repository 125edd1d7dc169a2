"""Reloads the versions that calls had loaded before a restart, before the server accepts calls."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from stepwell_server.catalog.catalog import Catalog
from stepwell_server.catalog.control import LoadRequest
from stepwell_server.catalog.files.folder import SUFFIXES
from stepwell_server.catalog.interfaces import Engine
from stepwell_server.engine.versions.registry import KnownVersion
from stepwell_server.errors import ServerError


async def restore(engine: Engine, catalog: Catalog, root: Path | None) -> dict[str, str]:
    """Reload the versions that calls had loaded before the server stopped, one at a time, the defaults first.

    A version that cannot be loaded is remembered as failed, and its sessions stay in the store.

    Args:
        engine: has the stored versions.
        catalog: loads them.
        root: `--models`; the policy selects which of its files are loaded.

    Returns:
        By name, why the former default is missing or differs.
    """
    real_root = None if root is None else await asyncio.to_thread(root.resolve)
    bad: dict[str, str] = {}
    sources: set[str] = set()
    for name, own in sorted(engine.catalogue().items()):
        default = own.chosen
        for version, known in sorted(own.known.items(), key=lambda item: (item[0] != default, item[0])):
            sources.add(known.source)
            if version in own.loaded:
                if known.tenant:
                    catalog.owned_before(name, version, known.tenant)
                continue
            if not (known.is_wanted and known.source):
                continue
            if await asyncio.to_thread(is_of_folder, name, known, real_root):
                continue
            request = LoadRequest(
                name=name,
                version=version,
                path=known.source,
                keep_default=True,
                tenant=known.tenant,
                is_charged=False,
                fingerprint=known.fingerprint,
            )
            try:
                await catalog.load(request)
            except ServerError as error:
                if version == default:
                    bad[name] = error.message
    await catalog.files.drop_others(sources)
    return bad


def is_of_folder(name: str, known: KnownVersion, root: Path | None) -> bool:
    """Whether a version is managed by the policy of `--models`, given as a resolved path.

    Other files in the folder, which a call named, are not. Blocking.
    """
    if root is None:
        return False
    source, folder = Path(known.source), root / name
    places = [folder / f"{known.version}{suffix}" for suffix in SUFFIXES]
    own = folder / str(known.version)
    if source in places or source.parent == own:
        return True
    if own.is_dir():
        places += own.iterdir()
    return any(os.path.realpath(place) == known.source for place in places)
