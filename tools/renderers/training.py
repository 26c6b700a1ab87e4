"""Tables of training with and without reuse: the summaries that the demo writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from renderers.text import markdown_table


def _change(run: Mapping[str, Any], split: str) -> str:
    before, after = run["accuracy_before"].get(split), run["accuracy_after"].get(split)
    return "" if before is None or after is None else f"{before:.1%} → {after:.1%}"


def _until(run: Mapping[str, Any]) -> list[str]:
    """What it took to reach the plain run's last accuracy; nothing of a run that was not judged."""
    costs = run.get("until_plain_accuracy")
    if costs is None:
        return [""]
    seconds, tokens = costs["rollout_seconds"], costs["generated_tokens"]
    return ["not reached" if seconds is None else f"{seconds:.1f} s, {tokens:,.0f} tokens"]


def _demo_header(runs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    before, after = _DEMO_HEADER[:3], _DEMO_HEADER[3:]
    step = ["of the whole step"] if _has(runs, "step_speedup") else []
    until = ["until vanilla's last accuracy"] if _has(runs, "until_plain_accuracy") else []
    return [*before, *step, *after, *until]


def _has(runs: Mapping[str, Mapping[str, Any]], key: str) -> bool:
    """Whether the file is of a version that knew this."""
    return any(key in run for run in runs.values())


def _demo_cells(run: Mapping[str, Any], runs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [
        f"{run['rollout_seconds']:.1f} s",
        f"{run['verification_seconds']:.1f} s",
        f"**{run['effective_speedup']:.2f}x**",
        *([f"**{run['step_speedup']:.2f}x**"] if _has(runs, "step_speedup") else []),
        f"{run['generated_tokens']:,} of {run['response_tokens']:,}",
        f"{run['reused_fraction']:.1%}",
        f"{run['fully_reused_fraction']:.1%}",
        _change(run, "train"),
        _change(run, "heldout"),
        *(_until(run) if _has(runs, "until_plain_accuracy") else []),
    ]


_DEMO_HEADER = [
    "rollouts",
    "of it verification",
    "effective speed-up",
    "generated tokens",
    "reused tokens",
    "fully reused",
    "accuracy, training prompts",
    "accuracy, held-out prompts",
]


def demo_table(content: Mapping[str, Any]) -> str:
    """`summary.json` of the demo."""
    rows = [[name, *_demo_cells(run, content["runs"])] for name, run in content["runs"].items()]
    table = markdown_table(["run", *_demo_header(content["runs"])], rows)
    notes = [
        f"`{name}` against the same run with the cache off: {same['identical']:,} of "
        f"{same['total']:,} rollouts are the same, token for token."
        for name in ("coupled", "both")
        if (same := content.get(f"{name}_equals_off")) is not None
    ]
    return "\n\n".join([table, *notes])


def demo_seeds_table(content: Mapping[str, Any]) -> str:
    """The demo over several seeds: a line per run and seed."""
    rows = [
        [name, str(summary["seed"]), *_demo_cells(run, summary["runs"])]
        for name in content["summaries"][0]["runs"]
        for summary in content["summaries"]
        for run in [summary["runs"][name]]
    ]
    header = _demo_header(content["summaries"][0]["runs"])
    return markdown_table(["run", "seed", *header], rows)
