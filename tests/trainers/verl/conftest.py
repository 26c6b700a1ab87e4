"""verl, on the CPU: runs of the trainer in processes of their own, on one tiny model."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def verl_installed() -> None:
    # This folder has its name, too: a namespace without an origin.
    spec = importlib.util.find_spec("verl")
    if spec is None or spec.origin is None:
        pytest.skip("verl is not installed")


@pytest.fixture(scope="session")
def folder(verl_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With `model` and `train.parquet`."""
    from verl_runs import make_data, make_model

    folder = tmp_path_factory.mktemp("verl")
    make_model(folder / "model")
    make_data(folder / "train.parquet")
    return folder
