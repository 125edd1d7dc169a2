"""Fixtures of the congruence tests: one real server for all of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.served import Served, serve


@pytest.fixture(scope="session")
def served() -> Iterator[Served]:
    """One server of all models of `support.served`, for all tests."""
    with serve() as running:
        yield running
