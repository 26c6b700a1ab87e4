"""Tables of bench_rounding.py: how far log-probs move, and what that makes of reuse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from renderers.text import markdown_table

Row = Mapping[str, Any]


def rounding_table(content: Mapping[str, Any]) -> str:
    """Each engine's rounding, then what every rule and tolerance makes of it."""
    rows = content["rows"]
    measured = [row for row in rows if "error" not in row]
    about = (
        f"Questions: {content['data']}; {content['prompts']} prompts with {content['group']} "
        f"responses of at most {content['max_tokens']} tokens, temperature "
        f"{content['temperature']}; an epoch of {content['training']['updates']} updates to the "
        "new policy. Differences in nats:"
    )
    parts = [about, _differences(measured), _reuse(measured)]
    parts += [
        f"{row['op']}, {row['dtype']} does not run here: `{row['error']}`"
        for row in rows
        if "error" in row
    ]
    return "\n\n".join(parts)


def _differences(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        rounding = row["rounding"]
        quantiles = dict(map(tuple, rounding["quantiles"]))
        values = (rounding["mean"], quantiles[0.9], quantiles[0.99], rounding["largest"])
        lines.append(
            [
                row["op"],
                row["dtype"],
                f"{rounding['num_tokens']:,}",
                *(f"{value:.2g}" for value in values),
                *(f"{row['bias']['auto'][key]:.2%}" for key in ("most", "coupled_mean")),
            ]
        )
    head = ["engine", "dtype", "tokens", "mean", "90 %", '99 % (`"auto"`)', "largest"]
    return markdown_table([*head, "bias of auto at most", "`Coupled`'s, in the mean"], lines)


def _reuse(rows: Sequence[Row]) -> str:
    """A line for each rule; in the cells, one figure for each tolerance."""
    if not rows:
        return ""
    lines = []
    for row in rows:
        for name in dict.fromkeys(found["rule"] for found in row["rules"]):
            mine = [found for found in row["rules"] if found["rule"] == name]
            columns = [
                ("unchanged", "rejections_per_token", 2),
                ("unchanged", "same_texts", 0),
                ("updated", "reused", 1),
            ]
            if name == "coupled":  # others draw with noise of their own
                columns.append(("updated", "same_texts", 0))
            cells = [
                " / ".join(
                    f"{found[phase][key]:.{digits}%}" if phase in found else "-" for found in mine
                )
                for phase, key, digits in columns
            ]
            lines.append([row["op"], row["dtype"], name, *cells, *[""] * (4 - len(cells))])
    biases = [(t, b) for t, b in rows[-1]["bias"].items() if t != "auto"]
    numbers = "".join(
        f", {t} (bias at most {b['most']:.1%}, `Coupled`'s {b['coupled_mean']:.1%} in the mean)"
        for t, b in biases
    )
    head = ["engine", "dtype", "rule", "rejected per token", "texts as they were"]
    return (
        f"For the tolerances 0, auto{numbers}, in float32 for 0 alone; under unchanged weights and "
        "then under the new ones:\n\n"
        + markdown_table([*head, "new: reused", "new: texts as with the cache off"], lines)
    )
