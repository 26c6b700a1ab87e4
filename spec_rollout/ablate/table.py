"""What several runs came to, side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from spec_rollout.runs.efficiency import Point, cost_of
from spec_rollout.runs.summary import RunSummary

Facts = Mapping[str, Any]


def run_facts(
    summary: RunSummary, baseline: RunSummary | None, num_eval_samples: int
) -> dict[str, Any]:
    """What the summary of several runs says about one of them.

    Args:
        baseline: The run that the speed-ups are over; None leaves them open.
        num_eval_samples: Fresh samples per evaluated prompt.
    """
    totals, later = summary.totals, summary.after_first_epoch
    speedup = step_speedup = None
    if baseline is not None and later.rollout_seconds > 0:
        speedup = baseline.after_first_epoch.rollout_seconds / later.rollout_seconds
    if baseline is not None and later.step_seconds > 0:
        step_speedup = baseline.after_first_epoch.step_seconds / later.step_seconds
    return {
        "seed": summary.seed,
        "rule": summary.rule,
        "reuse": summary.reuse,
        "drafting": summary.drafting,
        "steps": totals.steps,
        "epochs": summary.epochs,
        "rollout_seconds": totals.rollout_seconds,
        "verification_seconds": totals.verification_seconds,
        "decode_seconds": totals.decode_seconds,
        "train_seconds": totals.train_seconds,
        "rollout_seconds_after_first_epoch": later.rollout_seconds,
        "effective_speedup": speedup,
        "step_speedup": step_speedup,
        "generated_tokens": totals.num_generated_tokens,
        "response_tokens": totals.num_response_tokens,
        "reused_fraction": totals.reused_fraction,
        "fully_reused_fraction": totals.fully_reused_fraction,
        "reused_fraction_after_first_epoch": later.reused_fraction,
        "accepted_proposals": totals.num_accepted_proposals,
        "proposed_tokens": totals.num_proposed_tokens,
        "decode_steps_after_first_epoch": later.num_decode_steps,
        "longest_rollout_steps_after_first_epoch": later.max_row_steps,
        "tail_seconds_after_first_epoch": later.tail_seconds,
        "accuracy_before": summary.accuracy_before,
        "accuracy_after": summary.accuracy_after,
        "reward_last_step": summary.reward_last,
        "num_eval_samples": num_eval_samples,
    }


def _accuracy(run: Facts, split: str) -> str:
    before, after = run["accuracy_before"].get(split), run["accuracy_after"].get(split)
    return "-" if before is None or after is None else f"{before:.1%} -> {after:.1%}"


def _speedup(run: Facts, key: str = "effective_speedup") -> str:
    return "-" if run.get(key) is None else f"{run[key]:.2f}x"


_LINES: Sequence[tuple[str, Callable[[Facts], str]]] = (
    ("rollout seconds, everything counted", lambda r: f"{r['rollout_seconds']:.1f}"),
    ("  of these verification", lambda r: f"{r['verification_seconds']:.1f}"),
    ("effective speed-up from epoch 2 on", _speedup),
    ("  of the whole step", lambda r: _speedup(r, "step_speedup")),
    ("response tokens", lambda r: f"{r['response_tokens']:,}"),
    ("generated tokens", lambda r: f"{r['generated_tokens']:,}"),
    ("reused tokens", lambda r: f"{r['reused_fraction']:.1%}"),
    ("fully reused rollouts", lambda r: f"{r['fully_reused_fraction']:.1%}"),
    ("accepted proposals", lambda r: f"{r['accepted_proposals']:,}"),
    ("decoding steps from epoch 2 on", lambda r: f"{r['decode_steps_after_first_epoch']:,}"),
    ("accuracy, training prompts", lambda r: _accuracy(r, "train")),
    ("accuracy, held-out prompts", lambda r: _accuracy(r, "heldout")),
    ("rollout seconds until vanilla's accuracy", lambda r: _until(r, "rollout_seconds", ".1f")),
    ("generated tokens until then", lambda r: _until(r, "generated_tokens", ",.0f")),
)


def until(curves: Mapping[str, Sequence[Point]], plain: str) -> dict[str, dict[str, float | None]]:
    """What each run had cost when it first reached the last accuracy of the plain one.

    Args:
        curves: Of each run, by its name.

    Returns:
        By run and cost (fields of `Point`); None where it was not reached. Empty without
        evaluations of the plain run after its start.
    """
    if len(curves.get(plain, ())) < 2:
        return {}
    target = curves[plain][-1].accuracy
    costs = ("rollout_seconds", "step_seconds", "generated_tokens")
    return {
        name: {cost: cost_of(curve, target, cost) for cost in costs}
        for name, curve in curves.items()
    }


def _until(run: Facts, cost: str, form: str) -> str:
    costs = run.get("until_plain_accuracy")
    if costs is None:
        return "-"
    return "not reached" if costs[cost] is None else format(costs[cost], form)


def variants_table(content: Mapping[str, Any]) -> str:
    """The means of a grid as text, a line per variant; `content` is that of ablation.json."""
    head = ["", "tokens", "speed-up", "step", "accuracy", "seconds until", "reused", "seen"]
    rows = [head]
    for name, variant in content["variants"].items():
        mean, sd = variant["mean"], variant["sd"]
        spread = f" +- {100 * sd['accuracy']:.1f}" if "accuracy" in sd else ""
        rows.append(
            [
                name,
                f"{mean['token_share']:.0%}",
                _speedup(mean),
                _speedup(mean, "step_speedup"),
                f"{mean['accuracy']:.1%}{spread}" if "accuracy" in mean else "-",
                _until(variant, "rollout_seconds", ".1f"),
                f"{mean['later_reused_fraction']:.0%}" if "later_reused_fraction" in mean else "-",
                f"{mean['seen_per_prompt']:.1f}",
            ]
        )
    return _aligned(rows)


def table(runs: Mapping[str, Facts]) -> str:
    """The facts of each run as text, one column per run."""
    rows = [["", *runs], *([label, *map(cell, runs.values())] for label, cell in _LINES)]
    return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    return "\n".join(
        row[0].ljust(widths[0])
        + "".join(f"  {cell:>{w}}" for cell, w in zip(row[1:], widths[1:], strict=True))
        for row in rows
    )


def comparison_line(one: str, other: str, same: Mapping[str, Any]) -> str:
    """What `compare_responses` found, in words."""
    text = (
        f"{one} and {other}: {same['identical']:,} of {same['total']:,} rollouts identical, "
        "token for token"
    )
    if same["first_difference"] is not None:
        text += f"\nfirst difference: {same['first_difference']}"
    return text
