"""The batch that the packed ops are measured on: one training step of the published size.

8,192 rollouts (1,024 prompts of 8 samples) of up to 4,096 tokens, 1,400 on average with a long
tail; 45 % of the draft tokens are accepted and 78 % of the rows must be generated on. How far the
policy has moved differs from row to row: a row's log-ratios are normal with a scale of its own. The
parameters of that are chosen so that `accept_prefix` gives those two figures, which every benchmark
reports as it found them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spec_rollout.packed import cu_lens_from

PROMPT_WIDTH = 512
PADDED_LEN = 4096
MEAN_LEN = 1400


@dataclass(frozen=True)
class Workload:
    """One batch, packed. Shapes as in `spec_rollout.ops`."""

    prompt_ids: torch.Tensor
    cu_prompt_lens: torch.Tensor
    draft_ids: torch.Tensor
    draft_logprobs: torch.Tensor
    target_logprobs: torch.Tensor
    cu_draft_lens: torch.Tensor
    draft_lens: torch.Tensor
    keys: torch.Tensor
    generator: torch.Generator

    @property
    def batch(self) -> int:
        return self.keys.shape[0]


def long_tailed_lens(
    batch: int, mean: float, longest: int, generator: torch.Generator
) -> torch.Tensor:
    """Log-normal lengths (sigma 0.9), cut at `longest`, with the given mean after the cut."""
    normal = torch.randn(batch, generator=generator, dtype=torch.float64) * 0.9
    low, high = 0.0, 20.0
    for _ in range(60):  # bisection on the scale
        scale = (low + high) / 2
        lens = (normal + scale).exp().clamp(1, longest)
        low, high = (scale, high) if lens.mean() < mean else (low, scale)
    return lens.round().long()


def make_workload(batch: int = 8192, seed: int = 0) -> Workload:
    generator = torch.Generator().manual_seed(seed)
    draft_lens = long_tailed_lens(batch, MEAN_LEN, PADDED_LEN, generator)
    prompt_lens = long_tailed_lens(batch, 150, PROMPT_WIDTH, generator)
    num_tokens = int(draft_lens.sum())
    drift = torch.exp(torch.randn(batch, generator=generator) * 0.3) * _DRIFT
    drift *= (MEAN_LEN / draft_lens.float()) ** _DRIFT_POWER
    # Most tokens are nearly certain: -log p is exponential with a mean of 0.3 nats.
    target = torch.empty(num_tokens).exponential_(1 / 0.3, generator=generator).neg_()
    noise = torch.randn(num_tokens, generator=generator)
    draft = (target - noise * drift.repeat_interleave(draft_lens)).clamp_(max=0.0)
    return Workload(
        prompt_ids=torch.randint(
            0, 150_000, (int(prompt_lens.sum()),), generator=generator, dtype=torch.int32
        ),
        cu_prompt_lens=cu_lens_from(prompt_lens),
        draft_ids=torch.randint(0, 150_000, (num_tokens,), generator=generator, dtype=torch.int32),
        draft_logprobs=draft,
        target_logprobs=target,
        cu_draft_lens=cu_lens_from(draft_lens),
        draft_lens=draft_lens,
        keys=torch.randint(-(2**63), 2**63 - 1, (batch,), generator=generator),
        generator=generator,
    )


_DRIFT = 0.0032
_DRIFT_POWER = 0.7


def pad(values: torch.Tensor, lens: torch.Tensor, width: int, fill: float = 0) -> torch.Tensor:
    """Packed to right-padded [batch, width]."""
    out = torch.full((lens.shape[0], width), fill, dtype=values.dtype)
    out[torch.arange(width)[None, :] < lens[:, None]] = values
    return out
