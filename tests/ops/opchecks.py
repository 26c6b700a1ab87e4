"""`torch.library.opcheck` in a process of its own.

It traces the op under torch's functionalisation and fake tensors, whose state is the process's.
After two thousand other tests in the same process the tracing of `aten.clone` failed now and then
inside torch (`!isFunctionalTensor(base_)`), before it reached the op. In a fresh process it never
did.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from typing import Any

import torch

_RUN = """
import sys, torch
from spec_rollout import ops
for name, args, options in torch.load(sys.argv[1], weights_only=True):
    torch.library.opcheck(getattr(torch.ops.spec_rollout, name).default, args, **options)
print("checked")
"""


def opcheck(*checks: tuple[Any, ...]) -> None:
    """Checks ops, each given as (name, arguments) or (name, arguments, options of opcheck)."""
    plain = [(c[0], tuple(c[1]), *(c[2:] or ({},))) for c in checks]
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        torch.save(plain, file.name)
        result = subprocess.run(
            [sys.executable, "-c", _RUN, file.name],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["checked"]
