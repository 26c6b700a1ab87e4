"""Whose noise a drafter is to foresee."""

from __future__ import annotations

from enum import IntEnum


class NoiseLaw(IntEnum):
    """What the keys are of that `Drafter.propose` is given; csrc/drafting/noise.h has them as well.

    `VLLM` is the Gumbel noise of vLLM's Model Runner V2 (a request's seed, the position of the
    row's input in the sequence, the token), `VLLM64` the same drawn in float64.
    """

    PHILOX = 0
    VLLM = 1
    VLLM64 = 2
