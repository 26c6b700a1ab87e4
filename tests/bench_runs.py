"""Benchmarks as processes of their own, on the demo's model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def tiny_run(name: str, folder: Path, *arguments: str) -> dict[str, Any]:
    """What `benchmarks/bench_NAME.py --tiny` wrote into NAME.json; what it makes is in `folder`."""
    command = [sys.executable, f"benchmarks/bench_{name}.py", "--tiny", "--folder", str(folder)]
    done = subprocess.run(
        [*command, "--out", str(folder / "out"), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    content: dict[str, Any] = json.loads((folder / "out" / f"{name}.json").read_text())
    return content
