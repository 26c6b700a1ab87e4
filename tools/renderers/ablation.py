"""Tables of a grid of variants and seeds: ablation.json of `spec-rollout ablate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from renderers.text import markdown_table, origin, speedup

Variant = Mapping[str, Any]


def _mean(variant: Variant, key: str, form: str) -> str:
    value = variant["mean"].get(key)
    return "" if value is None else format(value, form)


def _accuracy(variant: Variant) -> str:
    value, deviation = variant["mean"].get("accuracy"), variant["sd"].get("accuracy")
    if value is None:
        return ""
    return f"{value:.1%}" + ("" if deviation is None else f" ± {100 * deviation:.1f}")


def _until(variant: Variant, cost: str, form: str) -> str:
    value = variant["until_plain_accuracy"].get(cost)
    return "not reached" if value is None else format(value, form)


def _published(variant: Variant, plain: Variant) -> list[str]:
    known, base = variant["published"], plain["published"]
    if known is None or base is None:
        return ["", ""]
    return [
        f"{known['speedup']:.2f}x, {known['tokens_m'] / base['tokens_m']:.0%}",
        f"{known['accuracy'] - base['accuracy']:+.1f}",
    ]


def ablation_table(content: Mapping[str, Any]) -> str:
    """Two tables with a line per variant: what is saved, and what training sees."""
    variants = content["variants"]
    plain = next(iter(variants.values()))
    saved = [
        [
            f"`{name}`",
            _mean(variant, "token_share", ".0%"),
            speedup(variant["mean"].get("effective_speedup", 1.0)),
            speedup(variant["mean"].get("step_speedup", 1.0)),
            _accuracy(variant),
            _until(variant, "rollout_seconds", ".1f"),
            _until(variant, "generated_tokens", ",.0f"),
            *_published(variant, plain),
        ]
        for name, variant in variants.items()
    ]
    header = [
        *("variant", "tokens generated", "rollouts", "whole step", "accuracy"),
        *("rollout seconds until", "tokens until"),
        *("published: rollouts, tokens", "accuracy, points"),
    ]
    seen = [
        [
            f"`{name}`",
            _mean(variant, "later_reused_fraction", ".1%"),
            _mean(variant, "later_mean_accepted_len", ".1f"),
            _mean(variant, "later_fully_reused_fraction", ".1%"),
            _mean(variant, "later_epoch_overlap", ".1%"),
            _mean(variant, "later_distinct_per_prompt", ".2f"),
            _mean(variant, "seen_per_prompt", ".1f"),
            _mean(variant, "later_kl_reused", ".4f"),
            _mean(variant, "later_entropy", ".3f"),
        ]
        for name, variant in variants.items()
    ]
    seen_header = [
        *("variant", "reused tokens", "accepted length", "fully reused", "overlap"),
        *("distinct per group", "seen per prompt", "divergence of reused", "entropy"),
    ]
    return "\n\n".join([markdown_table(header, saved), markdown_table(seen_header, seen)])


# What the README shows of a grid, where it is there.
_SHOWN = ("plain", "lenient_0", "lenient_0.5", "fresh_half", "both")


def ablation_summary_table(content: Mapping[str, Any]) -> str:
    """A few variants in few columns."""
    variants = content["variants"]
    shown: Sequence[str] = [name for name in _SHOWN if name in variants]
    rows = [
        [
            f"`{name}`",
            _mean(variants[name], "token_share", ".0%"),
            speedup(variants[name]["mean"].get("effective_speedup", 1.0)),
            speedup(variants[name]["mean"].get("step_speedup", 1.0)),
            _accuracy(variants[name]),
            _until(variants[name], "rollout_seconds", ".0f"),
        ]
        for name in shown
    ]
    header = ["variant", "tokens generated", "rollouts", "whole step", "accuracy"]
    header += ["rollout seconds until"]
    return f"{markdown_table(header, rows)}\n\n<sub>{origin([content])}</sub>"
