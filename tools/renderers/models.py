"""The table of model families."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from renderers.text import markdown_table


def families_table(content: Mapping[str, Any]) -> str:
    """One row per family, then why families were refused, in the engines' own words."""
    reasons: dict[str, str] = {}
    rows = []
    for row in content["rows"]:
        if "not_built" in row:
            rows.append([row["family"], "", *["not built"] * 3])
            reasons[row["family"]] = row["not_built"]
            continue
        cells = []
        for place in ("embedded", "vllm", "trainer"):
            outcome = row.get(place)
            if outcome is None:
                cells.append("not tried")
            elif outcome["refused"] is None:
                cells.append(f"{outcome['gap']:.1e}")
            else:
                cells.append("refused")
                reasons.setdefault(f"{row['family']} ({place})", outcome["refused"])
        rows.append([row["family"], f"`{row['architecture']}`", *cells])
    header = ["family", "architecture", "embedded engine", "vLLM", "trainer"]
    notes = "\n".join(f"- {name}: {_escaped(text)}" for name, text in reasons.items())
    return f"{markdown_table(header, rows)}\n\nWhy not, in the words of the error:\n\n{notes}"


def _escaped(text: str) -> str:
    return text.replace("<", "&lt;").replace("|", "\\|")
