"""Shared fixtures. Tests that need a GPU are parametrised over `device` and skipped where there is
none."""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from tiny_runs import make_config, model_dir, write_rows

__all__ = ["make_config", "model_dir", "write_rows"]  # fixtures of several folders

# Triton's kernels are tested on CPU in its interpreter. Whether they are interpreted is settled
# when triton is imported, which is later than this.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# How long an example takes depends on what else the machine does.
if importlib.util.find_spec("hypothesis"):
    from hypothesis import settings

    settings.register_profile("spec_rollout", deadline=None)
    settings.load_profile("spec_rollout")

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20250923)


@pytest.fixture(params=[torch.float64, torch.bfloat16], ids=str)
def other_dtype(request: pytest.FixtureRequest) -> Callable[[], AbstractContextManager[None]]:
    """Within `with other_dtype():` torch's default dtype is another."""

    @contextmanager
    def default() -> Iterator[None]:
        torch.set_default_dtype(request.param)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)

    return default


@pytest.fixture
def even_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step of every embedded engine takes as long, with proposals and without.

    What engines propose depends on what steps take; with this it does not depend on the machine.
    """
    from spec_rollout.engines import TransformersEngine

    readings = itertools.count(0.0, 2.0**-10)
    monkeypatch.setattr(TransformersEngine, "clock", staticmethod(lambda: next(readings)))


def random_keys(batch: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (batch,), generator=generator)
