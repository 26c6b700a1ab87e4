"""The kernels at every instruction-set level that the processor has: `SPEC_ROLLOUT_ISA` forces one.

A level is chosen once per process, so each of these tests starts others.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spec_rollout import ops

TESTS = Path(__file__).resolve().parents[1]
# What runs kernels that are compiled per level: the ops, and the embedded engine's own. Laws are
# left out: noise, acceptance and tokens are the same at every level.
KERNEL_TESTS = [
    "ops",
    "engines/test_transformers.py",
    "engines/test_transformers_layer_parts.py",
    "engines/test_transformers_model.py",
]


def _run(level: str, *argv: str) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, at a level."""
    # Options of this run of pytest are not for the one that it starts.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, *argv],
        env={**environment, "SPEC_ROLLOUT_ISA": level},
        capture_output=True,
        text=True,
    )


_RESULTS = """
import sys, torch
from spec_rollout import ops
from spec_rollout._native import _C
from spec_rollout.acceptance import Lenient
assert ops.build_info()["isa_in_use"] == sys.argv[1]
g = torch.Generator().manual_seed(5)
keys = torch.randint(-2**63, 2**63 - 1, (300,), generator=g)
noise = torch.empty(300, 517)
_C.gumbel_noise(keys, keys.abs() >> 20, noise, 2)
lens = torch.randint(0, 400, (300,), generator=g)
target = -torch.rand(300, 400, generator=g)
draft = target + 0.02 * torch.randn(300, 400, generator=g)
accepted = ops.accept_prefix(draft, target, rule=Lenient(0.0), keys=keys, draft_lens=lens)
drawn = []
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for spread in (0.5, 8.0):
        logits = (torch.randn(30, 2050, generator=g) * spread).to(dtype)
        for filters in ({}, {"top_k": 40}, {"top_p": 0.8}):
            sample = ops.sample_tokens(logits, keys=keys[:30], positions=lens[:30], **filters)
            drawn.append((sample.token_ids, sample.logprobs))
torch.save({"noise": noise, "accepted": accepted, "drawn": drawn}, sys.argv[2])
"""


@pytest.mark.slow
def test_levels_agree(tmp_path: Path) -> None:
    """Noise, acceptance and tokens to the bit; log-probs to rounding."""
    results = {}
    for level in ops.build_info()["isa_available"]:
        path = tmp_path / f"{level}.pt"
        ran = _run(level, "-c", _RESULTS, level, str(path))
        assert ran.returncode == 0, ran.stderr
        results[level] = torch.load(path)
    expected = results["generic"]
    for result in results.values():
        assert torch.equal(result["noise"], expected["noise"])
        assert torch.equal(result["accepted"], expected["accepted"])
        for (tokens, logprobs), (expected_tokens, expected_logprobs) in zip(
            result["drawn"], expected["drawn"], strict=True
        ):
            assert torch.equal(tokens, expected_tokens)
            torch.testing.assert_close(logprobs, expected_logprobs, atol=2e-6, rtol=0)


@pytest.mark.slow
def test_a_level_that_is_not_there_is_refused() -> None:
    info = ops.build_info()
    available = ", ".join(info["isa_available"])
    for level in {"sse9", *info["isa_levels"]} - {*info["isa_available"]}:
        message = (
            "ValueError: SPEC_ROLLOUT_ISA: expected a level that this processor has "
            f"({available}), got {level}"
        )
        ran = _run(level, "-c", "from spec_rollout import _C; _C.build_info()")
        assert ran.stderr.splitlines()[-1] == message
    call = "ops.token_logprobs(torch.zeros(1, 2), torch.tensor([0]))"
    ran = _run("sse9", "-c", f"import torch; from spec_rollout import ops; {call}")
    assert "ValueError: SPEC_ROLLOUT_ISA: " in ran.stderr


def test_nothing_is_forced_by_an_empty_variable() -> None:
    ran = _run("", "-c", "from spec_rollout import _C; print(_C.build_info()['isa_in_use'])")
    assert ran.stdout.strip() == ops.build_info()["isa_available"][0]


@pytest.mark.slow
@pytest.mark.parametrize("level", ["generic", "avx2", "avx512"])
def test_kernels_pass_their_tests_at(level: str) -> None:
    """The tests that this run does at the level in use."""
    info = ops.build_info()
    if level not in info["isa_available"]:
        pytest.skip(f"this processor, or this build, has no {level}")
    if level == info["isa_in_use"]:
        pytest.skip(f"{level} is the level of this run")
    ran = _run(
        level,
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow and not gpu"),
        *("-k", f"not triton and not law and not {Path(__file__).stem}"),
        *(str(TESTS / name) for name in KERNEL_TESTS),
    )
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-2000:]
