"""Fixtures of the op tests."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest

from spec_rollout import ops


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what takes Triton's interpreter a minute altogether."""
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if item.path.name == "test_verify_prefix.py" and parameters.get("impl") == "triton":
            item.add_marker(pytest.mark.slow)


def why_not_triton(device: str) -> str | None:
    """Why `impl="triton"` cannot be tested on the device; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if device == "cpu" and not interpreted:
        return "triton compiles for the GPU here; its interpreter is tested where there is none"
    if device == "cuda" and interpreted:
        return "TRITON_INTERPRET is set: triton does not compile"
    return None


@pytest.fixture(params=["native", "triton"])
def impl(request: pytest.FixtureRequest, device: str) -> str:
    """An implementation of `token_logprobs` and `verify_prefix`."""
    if request.param == "triton" and (reason := why_not_triton(device)) is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture
def interpreted(impl: str, device: str) -> bool:
    """Whether kernels run in Triton's interpreter, a thousand times slower: tests then take fewer
    rows."""
    return impl == "triton" and device == "cpu"


@pytest.fixture
def token_logprobs(impl: str) -> Callable[..., Any]:
    return functools.partial(ops.token_logprobs, impl=impl)


@pytest.fixture
def verify_prefix(impl: str) -> Callable[..., Any]:
    return functools.partial(ops.verify_prefix, impl=impl)


@pytest.fixture
def raises_value_error(
    device: str, request: pytest.FixtureRequest
) -> Callable[[str], AbstractContextManager[None]]:
    """Expects a ValueError. On CUDA, and from Triton, an error in values is reported by the status
    word, which knows the arguments concerned but not the values: of the pattern only the part
    before the first colon must match, as far as it names arguments."""

    direct = device == "cpu" and (
        "impl" not in request.fixturenames or request.getfixturevalue("impl") == "native"
    )

    @contextlib.contextmanager
    def expect(match: str) -> Iterator[None]:
        pattern = match if direct else match.partition(":")[0]
        with pytest.raises(ValueError, match=pattern):  # noqa: PT012
            yield
            ops.check_status()

    return expect
