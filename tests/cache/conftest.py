"""The stores that pass the same tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cache_samples import STORE_KINDS, open_store

from spec_rollout.cache import Store


@pytest.fixture(params=STORE_KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """An empty store of each kind."""
    with open_store(request.param, tmp_path) as opened:
        yield opened
