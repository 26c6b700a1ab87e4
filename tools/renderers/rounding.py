"""The table of benchmarks/bench_rounding.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from renderers.text import markdown_table, seconds


def rounding_table(content: Mapping[str, Any]) -> str:
    """Each engine's rounding, then what every rule and tolerance makes of it."""
    measured, reuse = [], []
    for row in content["rows"]:
        rounding = row["rounding"]
        quantiles = dict(map(tuple, rounding["quantiles"]))
        who = [row["op"], row["dtype"]]
        measured.append(
            [
                *who,
                *(_nats(value) for value in (rounding["mean"], quantiles[0.99])),
                _nats(rounding["largest"]),
                seconds(row["seconds"]["p50"]),
            ]
        )
        for rule in row["rules"]:
            tolerance = rule["tolerance"]
            shown = f"auto: {_nats(rule['nats'])}" if tolerance == "auto" else f"{tolerance:g}"
            reuse.append(
                [
                    *who,
                    f"`{rule['rule']}`",
                    shown,
                    f"{rule['rejections_per_token']:.2%}",
                    f"{rule['reused']:.1%}",
                    f"{rule['same_texts']:.0%}",
                    f"{rule['reused_after_update']:.1%}",
                ]
            )
    first = ["engine", "dtype", "mean, nats", "99 %", "largest", "plain rollout"]
    second = ["engine", "dtype", "rule", "tolerance", "rejected per token", "reused", "same texts"]
    return (
        f"{markdown_table(first, measured)}\n\n"
        f"{markdown_table([*second, 'reused after the update'], reuse)}"
    )


def _nats(value: float) -> str:
    return f"{value:.2g}"
