"""What a rollout counts: the one list that logs, summaries, reports and tables are made from.

A new counter is a new field of `RolloutStats`. The engine that knows its value sets it; it then is
in metrics.jsonl, in summary.json, in the statistics of the rollout command and in docs/metrics.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, Self


def _count(label: str, note: str = "") -> Any:
    return field(default=0, metadata={"label": label, "note": note})


def _sum(label: str, note: str = "") -> Any:
    return field(default=0.0, metadata={"label": label, "note": note})


def _seconds(label: str, note: str = "") -> Any:
    return field(default=0.0, metadata={"label": label, "note": note})


@dataclass(slots=True)
class RolloutStats:
    """Counts and seconds of one rollout call; everything it cost is in here.

    Plain sums, so calls add up. Labels and notes are in each field's metadata (`describe`).
    """

    num_rollouts: int = _count("rollouts")
    num_drafts: int = _count("rollouts with a draft", "Rows that came with a non-empty draft.")
    num_draft_tokens: int = _count("draft tokens")
    num_reused_tokens: int = _count("reused tokens", "Draft tokens kept.")
    num_fully_reused: int = _count(
        "fully reused rollouts", "A whole finished draft was kept: nothing was generated."
    )
    num_response_tokens: int = _count("response tokens", "Reused and generated ones.")
    num_generated_tokens: int = _count(
        "generated tokens", "Response tokens sampled rather than reused."
    )
    num_verified_tokens: int = _count(
        "verified tokens", "Draft tokens that the model computed, wasted ones included."
    )
    num_computed_tokens: int = _count(
        "computed tokens",
        "All tokens that the model computed: prompts, drafts, continuations; no padding.",
    )
    num_padding_tokens: int = _count(
        "padding tokens", "Computed only because a batch is rectangular."
    )
    num_engine_steps: int = _count("engine steps", "Forward passes of the model.")
    num_decode_steps: int = _count("decoding steps", "Of the engine steps.")
    num_tail_steps: int = _count(
        "tail steps", "Decoding steps with fewer than a tenth of the requests running."
    )
    num_proposed_tokens: int = _count(
        "proposed tokens", "By history drafting; the model computed them all."
    )
    num_accepted_proposals: int = _count("accepted proposals", "Proposed tokens kept.")
    max_row_steps: int = _count(
        "steps of the longest rollout", "Decoding steps; of several calls, the sum."
    )
    num_cache_misses: int = _count("cache misses", "Rows without a cached rollout.")
    num_groups: int = _count("prompts", "Rows of the same prompt count once.")
    num_distinct_responses: int = _count(
        "different responses", "Equal ones of a prompt count once."
    )
    num_new_responses: int = _count(
        "new responses",
        "Different ones that were not in the prompt's cached rollouts. Summed over a run and "
        "divided by the prompts of the data: how many responses of a prompt training has seen.",
    )
    sum_ages: int = _count(
        "sum of ages", "Epochs since each response token was drawn, summed over the tokens."
    )
    sum_kl_reused: float = _sum(
        "divergence of reused tokens",
        "Of the policies that first drew them to the current one: k3 estimates, nats, summed; 0 "
        "where the cache does not keep what they were drawn with.",
    )
    rollout_seconds: float = _seconds(
        "rollout seconds", "Wall time of everything below and between."
    )
    lookup_seconds: float = _seconds("lookup seconds", "Of drafts in the cache.")
    verification_seconds: float = _seconds(
        "verification seconds", "Prefill of prompts with drafts, verification, splicing."
    )
    decode_seconds: float = _seconds("decoding seconds", "Prefill without drafts, decoding.")
    tail_seconds: float = _seconds(
        "tail seconds", "Of decoding, with fewer than a tenth of the requests running."
    )
    assembly_seconds: float = _seconds("assembly seconds", "Packing the result.")
    store_seconds: float = _seconds("store seconds", "Storing the rollouts in the cache.")

    def __add__(self, other: RolloutStats) -> RolloutStats:
        return RolloutStats(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in COUNTERS}
        )

    @property
    def tokens_per_step(self) -> float:
        """Sampled tokens per row and decoding step: 1 without proposals."""
        rows = self.num_generated_tokens - self.num_accepted_proposals
        return self.num_generated_tokens / max(1, rows)

    @property
    def reused_fraction(self) -> float:
        """Share of response tokens that came from drafts."""
        return self.num_reused_tokens / max(1, self.num_response_tokens)

    @property
    def fully_reused_fraction(self) -> float:
        """Share of rollouts that are a whole finished draft."""
        return self.num_fully_reused / max(1, self.num_rollouts)

    @property
    def mean_accepted_len(self) -> float:
        """Mean accepted prefix over the rows that had a draft."""
        return self.num_reused_tokens / max(1, self.num_drafts)

    @property
    def kl_reused(self) -> float:
        """Nats per reused token: how far the policy has moved from those that drew them."""
        return self.sum_kl_reused / max(1, self.num_reused_tokens)

    @property
    def mean_age(self) -> float:
        """Epochs since a response token was drawn, on average; fresh ones count 0."""
        return self.sum_ages / max(1, self.num_response_tokens)

    @property
    def distinct_per_prompt(self) -> float:
        """Different responses per prompt."""
        return self.num_distinct_responses / max(1, self.num_groups)

    @property
    def new_per_prompt(self) -> float:
        """Responses per prompt that are new: unlike each other and unlike the cached ones."""
        return self.num_new_responses / max(1, self.num_groups)

    def ratios(self) -> dict[str, float]:
        """What follows from the counts, by name (`RATIOS`)."""
        return {name: getattr(self, name) for name in RATIOS}

    def as_row(self) -> dict[str, float]:
        """Counts, seconds and ratios by name, for a log."""
        return {**{f.name: getattr(self, f.name) for f in COUNTERS}, **self.ratios()}

    @classmethod
    def from_counts(cls, *sources: Any, **counts: float) -> Self:
        """The counters that `sources` have attributes for, and those given by name.

        An engine that keeps counters under the same names hands itself over.
        """
        names = [f.name for f in COUNTERS]
        found = {n: getattr(s, n) for s in sources for n in names if hasattr(s, n)}
        return cls(**{**found, **counts})


COUNTERS: tuple[Field[Any], ...] = fields(RolloutStats)
# Ratios of counters, with their labels. What they mean is said by the property of that name.
RATIOS: Mapping[str, str] = {
    "reused_fraction": "share of tokens reused",
    "fully_reused_fraction": "share of rollouts fully reused",
    "mean_accepted_len": "mean accepted length",
    "tokens_per_step": "tokens per decoding step",
    "kl_reused": "divergence per reused token",
    "mean_age": "mean age of tokens",
    "distinct_per_prompt": "different responses per prompt",
    "new_per_prompt": "new responses per prompt",
}
_BY_NAME = {f.name: f for f in COUNTERS}


def label(name: str) -> str:
    """A few words for a table's head, in lower case."""
    return RATIOS[name] if name in RATIOS else str(_BY_NAME[name].metadata["label"])


def note(name: str) -> str:
    """What the number says, in a sentence; may be empty where the label says it."""
    if name in RATIOS:
        text = getattr(RolloutStats, name).__doc__
        return " ".join(text.split()) if text else ""
    return str(_BY_NAME[name].metadata["note"])


def markdown() -> str:
    """Every counter and ratio as a table, for docs/metrics.md."""
    lines = ["| key | what it counts | |", "| :-- | :-- | :-- |"]
    lines += [f"| `{name}` | {label(name)} | {note(name)} |" for name in (*_BY_NAME, *RATIOS)]
    return "\n".join(lines)
