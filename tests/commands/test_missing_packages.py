"""An install without the extra: one error names all that is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

_WITHOUT = """
import importlib.abc, sys

class Without(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

MISSING = set(sys.argv[1].split(","))
sys.meta_path.insert(0, Without())
from spec_rollout import cli
sys.exit(cli.main(sys.argv[2:]))
"""


def error_without(missing: str, *argv: str) -> str:
    command = [sys.executable, "-c", _WITHOUT, missing, *argv]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    return done.stderr


@pytest.mark.parametrize(
    ("missing", "named", "command"),
    [
        ("matplotlib", "matplotlib is", "'matplotlib>=3.8'"),
        (
            "tqdm,matplotlib,tomli_w",
            "matplotlib, tomli_w, tqdm are",
            "'matplotlib>=3.8' 'tomli-w>=1.0' 'tqdm>=4.66'",
        ),
        (
            "transformers,tqdm,matplotlib,safetensors,tomli_w",
            "matplotlib, safetensors, tomli_w, tqdm, transformers are",
            "'matplotlib>=3.8' 'safetensors>=0.4.3' 'tomli-w>=1.0' 'tqdm>=4.66' 'transformers>=5.0'",
        ),
    ],
)
def test_all_missing_packages_are_named_at_once(
    tmp_path: Path, missing: str, named: str, command: str
) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "reward": 1.0}))
    expected = f"error: {named} not installed: pip install {command}\n"
    assert error_without(missing, "report", str(tmp_path)) == expected
