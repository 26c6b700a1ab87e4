"""Tables of the store on disk: faults, and many epochs under a bound."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from renderers.text import markdown_table, seconds, size


def torture_table(content: Mapping[str, Any]) -> str:
    """tests/torture/torture.py: a line per fault."""
    lines = [
        [row["fault"], *(f"{row[name]:,}" for name in ("tried", "survived", "lost"))]
        for row in content["rows"]
    ]
    return markdown_table(["fault", "tried", "survived", "lost"], lines)


def store_soak_table(content: Mapping[str, Any]) -> str:
    """soak.py: the first, some middle and the last part of the steps."""
    rows = [row for row in content["rows"] if row["op"].startswith("after step ")]
    picked = [rows[len(rows) * part // 4] for part in range(4)] + rows[-1:]
    lines = [
        [
            row["op"].removeprefix("after step "),
            seconds(row["seconds"]["p50"]),
            *(size(row[name]) for name in ("anonymous_bytes", "held_bytes", "file_bytes")),
            f"{row['found_share']:.0%}",
            f"{row['evictions']:,}",
        ]
        for row in picked
    ]
    header = ["steps", "lookup", "process", "held", "file", "drafts found", "evicted so far"]
    (wrong,) = [row["steps"] for row in content["rows"] if row["op"] == "wrong drafts"]
    return f"{markdown_table(header, lines)}\n\nSteps with a wrong draft: {wrong}."
