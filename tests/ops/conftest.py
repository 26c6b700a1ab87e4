"""Fixtures of the op tests."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest

from spec_rollout import ops


@pytest.fixture
def raises_value_error(device: str) -> Callable[[str], AbstractContextManager[None]]:
    """Expects a ValueError. On CUDA an error in values is reported by `check_status`, which knows the arguments
    concerned but not the values: of the pattern only the part before the first colon must match, as far as it names
    arguments."""

    @contextlib.contextmanager
    def expect(match: str) -> Iterator[None]:
        pattern = match if device == "cpu" else match.partition(":")[0]
        with pytest.raises(ValueError, match=pattern):  # noqa: PT012
            yield
            ops.check_status()

    return expect
