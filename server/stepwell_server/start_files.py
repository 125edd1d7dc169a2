"""Reads the files that the settings name, before a server starts anything, and for `stepwell doctor`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stepwell_server.auth.quota_file import COUNTED_BY_TENANT, QuotaFile
from stepwell_server.auth.setup import open_callers
from stepwell_server.catalog.files.migrations import load_migrations
from stepwell_server.clock import Clock
from stepwell_server.metrics.token import MetricsToken
from stepwell_server.rpc.fronts.certificates import CertificateFiles
from stepwell_server.settings import Settings


def readers(settings: Settings, clock: Clock) -> dict[str, Callable[[], Any]]:
    """Return functions that read the files, by their content. Each returns None if the settings name no such file.

    `certificates` is a `CertificateFiles`, `quotas` a `QuotaFile`, `migrations` functions by name (modules are imported),
    `callers` a `Callers`, `metrics_token` a `MetricsToken`. Each raises a `StartError`, whose message is one line and
    names the option, if its file cannot be used.
    """
    cert, key, quotas, token = (
        settings.tls_cert,
        settings.tls_key,
        settings.quotas,
        settings.metrics_token_file,
    )
    only_tenants = COUNTED_BY_TENANT if settings.store_kind == "valkey" else ()
    return {
        "certificates": lambda: (
            None if cert is None or key is None else CertificateFiles(cert, key, settings.tls_client_ca)
        ),
        "quotas": lambda: None if quotas is None else QuotaFile(quotas, only_tenants=only_tenants),
        "migrations": lambda: load_migrations(settings.migrations),
        "callers": lambda: open_callers(settings, clock),
        "metrics_token": lambda: None if token is None else MetricsToken.of(token),
    }
