"""The table of bench_trainers.py: steps of the trainers people run, with and without this
package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from renderers.text import markdown_table, seconds, speedup

_SETUPS = {
    "trl_vllm": "TRL {trl}, its colocated vLLM",
    "trl_model": "TRL {trl}, its own model",
    "verl": "verl {verl}",
}
_CONTENDERS = {
    "stock": "as it is",
    "drafting": "`SPEC_ROLLOUT=drafting`",
    "coupled": "`SPEC_ROLLOUT=coupled`, `ReuseManager`",
    "adapter": "`SpecRollout()`",
}


def trainers_table(content: Mapping[str, Any]) -> str:
    """Median seconds of a step's rollouts and of the step, and what they are of stock's."""
    rows = {(r["setup"], r["contender"], r["which"]): r for r in content["rows"]}
    lines = []
    for setup, contender in dict.fromkeys((setup, contender) for setup, contender, _ in rows):
        first, later = (rows[setup, contender, which] for which in ("first", "later"))

        def cell(value: float, gain: float, is_stock: bool = contender == "stock") -> str:
            return seconds(value) if is_stock else f"{seconds(value)}, {speedup(gain)}"

        steps = later["engine_steps"]
        lines.append(
            [
                _SETUPS[setup].format_map(later["versions"]),
                _CONTENDERS[contender],
                cell(first["seconds"]["p50"], first["rollout_speedup"]),
                cell(later["seconds"]["p50"], later["rollout_speedup"]),
                cell(first["step_seconds"]["p50"], first["step_speedup"]),
                cell(later["step_seconds"]["p50"], later["step_speedup"]),
                "" if steps is None else f"{steps:.0f}",
            ]
        )
    header = ["trainer", "with", "rollouts, first epoch", "rollouts, later"]
    header += ["step, first epoch", "step, later", "engine steps, later"]
    return markdown_table(header, lines)
