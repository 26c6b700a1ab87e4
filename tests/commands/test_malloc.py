"""Freed memory stays with the process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import resource, sys
import numpy as np
from spec_rollout.commands.malloc import keep_freed_memory

kept = keep_freed_memory() if sys.argv[1] == "keep" else False
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(100):
    blocks = [np.ones(1 << 20, np.uint8) for _ in range(8)]
    del blocks
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(what: str, **env: str) -> tuple[bool, int]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    out = subprocess.run(
        [sys.executable, "-c", CODE, what],
        capture_output=True,
        text=True,
        check=True,
        env={**clean, **env},
    ).stdout.split()
    return out[0] == "1", int(out[1])


def test_freed_blocks_are_not_cleared_again() -> None:
    kept, faults = page_faults("keep")
    if not kept:
        pytest.skip("another C library than glibc")
    # The first 8 MiB fault, once per page of 4 KiB at most.
    assert faults < 4_000
    assert page_faults("leave")[1] > 40_000  # or the test shows nothing


def test_an_environment_that_tunes_malloc_is_left_alone() -> None:
    kept, _ = page_faults("keep", MALLOC_TRIM_THRESHOLD_="131072", MALLOC_MMAP_THRESHOLD_="65536")
    assert not kept
