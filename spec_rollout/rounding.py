"""How far rounding moves an engine's log-probs: its own tokens, verified under unchanged weights.

Decoding computes a few tokens of each row at a time, verification many. Where an engine's matrix
products or attention add up in another order for another shape, the same token gets another
log-probability. In float32 that is 1e-6 nats, in 16 bits some hundredths. A rule's test then
rejects tokens that the very same policy drew.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from spec_rollout.acceptance import Lenient, NoReuse
from spec_rollout.types import Drafts, FinishReason, RolloutRequests, SamplingParams

if TYPE_CHECKING:
    from spec_rollout.engines.base import RolloutEngine

# The quantile of the measured differences that `tolerance="auto"` stands for.
AUTO_QUANTILE = 0.99
_QUANTILES = (0.5, 0.9, AUTO_QUANTILE, 0.999)


@dataclass(frozen=True, slots=True)
class Rounding:
    """Differences of log-probs between decoding and verification of the same tokens, in nats.

    Attributes:
        num_tokens: Tokens compared; with 0 all differences are 0.
        mean, largest: Of the absolute differences.
        quantiles: (share of tokens, difference that they stay below) pairs, ascending.
    """

    num_tokens: int
    mean: float
    largest: float
    quantiles: tuple[tuple[float, float], ...]

    @property
    def tolerance(self) -> float:
        """What `tolerance="auto"` is: the quantile `AUTO_QUANTILE`."""
        return dict(self.quantiles)[AUTO_QUANTILE]

    def state(self) -> dict[str, Any]:
        """What `of_state` makes it of again, of JSON's kinds."""
        return {**asdict(self), "quantiles": [list(pair) for pair in self.quantiles]}

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Rounding:
        """What `state` gave.

        Raises:
            ValueError: if it did not give that.
        """
        try:
            quantiles = tuple((float(share), float(nats)) for share, nats in state["quantiles"])
            mean, largest = float(state["mean"]), float(state["largest"])
            numbers = [mean, largest, *(number for pair in quantiles for number in pair)]
            count = state["num_tokens"]
            ok = type(count) is int and count >= 0 and AUTO_QUANTILE in dict(quantiles)
            if state.keys() != {"num_tokens", "mean", "largest", "quantiles"} or not ok:
                raise ValueError
            if not all(math.isfinite(number) and number >= 0 for number in numbers):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                "expected num_tokens, mean, largest and quantiles of a measured rounding, got "
                f"{state!r:.200}"
            ) from None
        return cls(count, mean, largest, quantiles)

    def __str__(self) -> str:
        shares = ", ".join(f"{share:.1%} below {value:.2g}" for share, value in self.quantiles)
        return (
            f"log-probs of {self.num_tokens} tokens, decoded and verified, differ by "
            f"{self.mean:.2g} nats on average, {self.largest:.2g} at most ({shares})"
        )


def measure_rounding(
    engine: RolloutEngine,
    requests: RolloutRequests,
    sampling: SamplingParams,
    *,
    num_rows: int = 16,
    max_tokens: int = 64,
) -> Rounding:
    """Generates a few responses from scratch and verifies them, under the weights as they are.

    It costs a rollout of that many rows and tokens, and one verification. Tokens at the edge of
    top-k or top-p, which are outside when they are verified, are not compared.

    Args:
        engine: Any engine.
        requests: Prompts and noise keys; the first rows are taken. Drafts are not read.
        sampling: Of the responses; its `max_tokens` is a bound, too.
        num_rows, max_tokens: Most responses, and most tokens of each.
    """
    count = min(num_rows, requests.batch)
    sampling = replace(sampling, max_tokens=min(max_tokens, sampling.max_tokens))
    plain = RolloutRequests(
        prompt_ids=requests.prompt_ids[: int(requests.cu_prompt_lens[count])],
        cu_prompt_lens=requests.cu_prompt_lens[: count + 1],
        keys=requests.keys[:count],
        drafts=Drafts.none(count),
    )
    drawn = engine.rollout(plain, sampling, NoReuse())
    drafts = Drafts(
        token_ids=drawn.response_ids,
        cu_lens=drawn.cu_response_lens,
        logprobs=drawn.logprobs,
        finished=drawn.finish_reasons == FinishReason.STOP,
    )
    again = engine.rollout(replace(plain, drafts=drafts), sampling, Lenient(float("inf")))
    pairs = zip(
        drawn.logprobs.split(drawn.response_lens.tolist()),
        again.logprobs.split(again.response_lens.tolist()),
        again.accepted_lens.tolist(),
        strict=True,
    )
    differences = torch.cat([(new[:n] - old[:n]).abs() for old, new, n in pairs]).double()
    # No tolerance admits a token that the filter leaves out.
    differences = differences[~differences.isinf()]
    num_tokens = differences.numel()
    if num_tokens == 0:
        differences = differences.new_zeros(1)
    shares = torch.tensor(_QUANTILES, dtype=torch.float64)
    values = torch.quantile(differences, shares, interpolation="higher")
    return Rounding(
        num_tokens=num_tokens,
        mean=float(differences.mean()),
        largest=float(differences.max()),
        quantiles=tuple(zip(_QUANTILES, values.tolist(), strict=True)),
    )
