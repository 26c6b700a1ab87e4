"""What only the Triton implementation has: its choice, its absence, its arithmetic bit by bit, and
that it compiles."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spec_rollout import _C, ops
from spec_rollout.acceptance import Coupled
from spec_rollout.ops.reference import noise

ROOT = Path(__file__).resolve().parents[2]


def test_an_unknown_implementation_is_an_error_that_names_those_there_are() -> None:
    logits, ids = torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64)
    for impl in ("cutlass", None, ["triton"]):
        with pytest.raises(ValueError, match=r"impl: expected one of native, triton, got "):
            ops.token_logprobs(logits, ids, impl=impl)
    with pytest.raises(ValueError, match=r"impl: expected one of native, triton, got 'x'"):
        ops.verify_prefix(logits, ids[:0], torch.zeros(2), rule=Coupled(), keys=ids, impl="x")


_WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch
from spec_rollout import ops
logits, ids = torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64)
assert ops.token_logprobs(logits, ids, impl="native").shape == (1,)
try:
    ops.token_logprobs(logits, ids, impl="triton")
except ImportError as error:
    print(error)
"""

_COMPILED_ON_CPU = """
import torch
from spec_rollout import ops
try:
    ops.token_logprobs(torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64), impl="triton")
except RuntimeError as error:
    print(error)
"""


def _run(code: str, **environment: str) -> str:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_without_triton_the_error_says_what_to_install() -> None:
    out = _run(_WITHOUT_TRITON)
    assert out.startswith('impl: "triton" needs the triton package')
    assert "pip install triton" in out


@pytest.mark.slow
def test_nothing_imports_triton_before_it_is_asked_for() -> None:
    assert _run("import sys, spec_rollout.ops; print('triton' in sys.modules)") == "False\n"


def test_cpu_tensors_without_the_interpreter_are_an_error() -> None:
    pytest.importorskip("triton")
    assert _run(_COMPILED_ON_CPU).startswith("impl: triton was compiled for a GPU, got tensors on")


def _reference_bits(
    keys: torch.Tensor, positions: torch.Tensor, stream: int, count: int
) -> torch.Tensor:
    """The first words of a stream, [rows, count]."""
    calls = torch.arange(count // 4).expand(len(keys), -1)
    low, high = (positions & 0xFFFFFFFF)[:, None], (positions >> 32)[:, None]
    counter = [low + 0 * calls, calls, high + 0 * calls, 0 * calls + stream]
    key = [(keys & 0xFFFFFFFF)[:, None], ((keys >> 32) & 0xFFFFFFFF)[:, None]]
    return torch.stack(noise.philox(counter, key), dim=-1).flatten(1)


@pytest.mark.parametrize("impl", ["triton"], indirect=True)
@pytest.mark.parametrize("vec", [8, 4])
def test_noise_has_the_bits_of_the_native_kernels(impl, vec, device, generator) -> None:
    from triton_noise import noise_kernel

    rows = 3
    keys = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator)
    positions = torch.randint(0, 2**40, (rows,), generator=generator)
    expected = torch.empty(rows, 1024)
    _C.gumbel_noise(keys, positions, expected, 1)
    expected_words = _reference_bits(keys, positions, noise.STREAM_GUMBEL, 1024)
    groups = _reference_bits(keys, positions, noise.STREAM_GROUP, 1024 // noise.NOISE_GROUP)
    expected_bounds = torch.tensor([[_C.group_bound(w) for w in row] for row in groups.tolist()])

    group_words, words = torch.zeros(2, rows, 1024, dtype=torch.int64, device=device)
    values, bounds, picks = torch.zeros(3, rows, 1024, device=device)
    uniforms = torch.empty(rows, device=device)
    noise_kernel[(rows,)](
        keys.to(device), positions.to(device), group_words, words, values, bounds, picks, uniforms,
        VEC=vec, enable_fp_fusion=False,
    )  # fmt: skip
    assert torch.equal(group_words.cpu(), groups.repeat_interleave(noise.NOISE_GROUP, dim=1))
    assert torch.equal(words.cpu(), expected_words)
    assert torch.equal(values.cpu(), expected)
    assert torch.equal(picks.cpu()[:, ::37], expected[:, ::37])
    assert torch.equal(bounds.cpu(), expected_bounds.repeat_interleave(noise.NOISE_GROUP, dim=1))
    assert bool((bounds.cpu() >= expected).all())
    torch.testing.assert_close(
        uniforms.cpu().double(), noise.accept_uniforms(keys, positions).log(), atol=1e-6, rtol=1e-6
    )


@pytest.mark.slow
def test_kernels_compile_for_hopper_with_wide_loads() -> None:
    """The interpreter takes what the compiler would refuse. Needs no GPU: Triton brings its own
    assembler."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "tools/sass_report.py", "--triton-only", "--arch", "90"],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"^token_logprobs_kernel", done.stdout, re.MULTILINE)) == 3
    assert len(re.findall(r"^test_drafts_kernel", done.stdout, re.MULTILINE)) >= 6
