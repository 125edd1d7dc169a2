"""What a server knows of its models when it starts, and what callers hear of those that are not there yet."""

from __future__ import annotations

from pathlib import Path

import pytest

from stepwell_server.catalog.files.sources import StoredModel
from stepwell_server.catalog.start import absence, stored_models
from stepwell_server.core.model_names import ModelRef
from stepwell_server.engine.api import SessionPolicy
from stepwell_server.engine.versions.document import DocumentError, name_of
from stepwell_server.errors import ModelLoading, ModelNotFound
from stepwell_server.process.readiness import Readiness
from stepwell_server.store.base import Batch
from stepwell_server.store.in_process import InProcessStore
from stepwell_server.store.memory import MemoryStore
from support.clock import ManualClock
from support.engine.fake_executor import PLAIN, RICH
from support.engine.harness import running


async def test_what_the_store_knows_of_versions(tmp_path: Path) -> None:
    """Those of other folders come back by themselves, those of `--models` as their policy says."""
    store = MemoryStore()
    async with running({"plain": PLAIN}, store=store) as at:
        assert await stored_models(InProcessStore(store, ManualClock()), None) == {}
        await at.engine.load_version("plain", 2, PLAIN, source=str(tmp_path / "models/plain/2.keras"))
        await at.engine.load_version("plain", 3, PLAIN, source=str(tmp_path / "3.keras"))
        await at.engine.load_version("plain", 5, RICH)
        await at.engine.set_default("plain", 2, SessionPolicy.KEEP)
        await at.engine.unload_version("plain", 5)
        root = tmp_path / "models"
        for folder, from_elsewhere in ((root, [3]), (None, [2, 3])):
            kept = await stored_models(InProcessStore(store, ManualClock()), folder)
            assert kept == {"plain": StoredModel([1, 2, 3], 2, from_elsewhere)}
    store.commit(Batch(documents=[(name_of("plain"), b"{}")]))
    with pytest.raises(DocumentError, match="versions of model 'plain' cannot be read"):
        await stored_models(InProcessStore(store, ManualClock()), None)


@pytest.mark.parametrize("shows_reason", [True, False])
def test_why_a_model_is_not_there(shows_reason: bool) -> None:
    readiness = Readiness()
    absent = absence(readiness, shows_reason=shows_reason)
    assert absent(ModelRef("forecast")) is None
    readiness.version("forecast", 1, "failed: /secret/place: no model")
    readiness.version("forecast", 2, "waiting")
    loading, failed = absent(ModelRef("forecast")), absent(ModelRef("forecast", version=1))
    assert isinstance(loading, ModelLoading)
    assert (loading.message, loading.retry_after_s) == ("model 'forecast' is being loaded (waiting)", 1.0)
    assert isinstance(failed, ModelNotFound)
    why = "/secret/place: no model" if shows_reason else "the server's log says why"
    assert failed.message == f"model 'forecast@1' is not served: it could not be loaded: {why}"
    readiness.version("forecast", 2, "loading: trace")
    assert "'forecast@2' is being loaded (loading: trace)" in str(absent(ModelRef("forecast", version=2)))
    readiness.version("forecast", 2, "loaded")
    assert absent(ModelRef("forecast", version=2)) is None
    assert absent(ModelRef("forecast", version=3)) is None
