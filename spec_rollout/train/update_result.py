"""What an update did, and the sums over its micro-batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """What an update did; means are over the tokens it trained on, NaN if there are none.

    Attributes:
        loss: Mean over the minibatches.
        means: `entropy` of the policy after temperature and before top-k and top-p, nats per token,
            and the algorithm's own sums (`Algorithm.sum_names`) per token.
        grad_norm: Of the policy before clipping, mean over the minibatches.
        lr: Learning rate.
        logprob_gap: Mean absolute difference of the engine's and the trainer's log-probs before the
            first optimizer step: rounding, unless something is wrong. NaN where sampling is
            filtered, as the engine's are then of another distribution, and if no token was
            compared (those that had no probability are not).
        num_tokens: Tokens trained on.
        num_skipped_updates: Minibatches left out because their gradient was not finite.
    """

    loss: float
    means: Mapping[str, float]
    grad_norm: float
    lr: float
    logprob_gap: float
    num_tokens: int
    num_skipped_updates: int

    def as_row(self) -> dict[str, float]:
        """For metrics.jsonl: the fields, and the means under their own names."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "means"}
        return {**own, **self.means}


class TokenSums:
    """Sums over micro-batches.

    Kept on the device: reading them once at the end synchronises once.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self._names = names
        self._sums = torch.zeros(len(names), dtype=torch.float64, device=device)
        self._gap = torch.zeros((), dtype=torch.float64, device=device)
        self._num_tokens = 0
        self._num_gap_tokens = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, sums: Mapping[str, torch.Tensor], num_tokens: int) -> None:
        self._sums += torch.stack([sums[name].double() for name in self._names])
        self._num_tokens += num_tokens

    def add_gap(self, engine: torch.Tensor, trainer: torch.Tensor) -> None:
        known = ~engine.isneginf()
        self._gap += torch.where(known, engine - trainer, 0.0).abs().sum().double()
        self._num_gap_tokens += known.sum()

    def result(
        self, losses: list[float], norms: list[float], lr: float, skipped: int
    ) -> UpdateResult:
        means = (self._sums / (self._num_tokens or math.nan)).tolist()
        return UpdateResult(
            loss=sum(losses) / max(1, len(losses)),
            means=dict(zip(self._names, means, strict=True)),
            grad_norm=sum(norms) / max(1, len(norms)),
            lr=lr,
            logprob_gap=float(self._gap) / (int(self._num_gap_tokens) or math.nan),
            num_tokens=self._num_tokens,
            num_skipped_updates=skipped,
        )
