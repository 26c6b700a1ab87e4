"""What a grid came to: every run's facts, and each variant's means over the seeds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from spec_rollout.ablate.published import published_run
from spec_rollout.ablate.study import Study
from spec_rollout.ablate.table import run_facts
from spec_rollout.ablate.workers import OVERLAP
from spec_rollout.config.sections import RunConfig
from spec_rollout.runs.efficiency import Point, accuracy_curve, cost_of, mean_curve
from spec_rollout.runs.load import Run, load_run, number
from spec_rollout.runs.summary import RunSummary, summarize

OVERLAP_KEY = "epoch_overlap"
# Means over the steps of each epoch, and over those from the second epoch on: of the rollouts, and
# of the update.
EPOCH_KEYS = (
    *("reused_fraction", "fully_reused_fraction", "mean_accepted_len", "kl_reused", "mean_age"),
    *("distinct_per_prompt", "new_per_prompt", "reward", "response_len"),
    *("entropy", "approx_kl", "kl", "clip_fraction", "log_lenience", OVERLAP_KEY),
)
COSTS = ("rollout_seconds", "step_seconds", "generated_tokens")
Curves = Mapping[tuple[int, str], list[Point]]


def load_runs(study: Study) -> dict[tuple[int, str], Run]:
    """All runs, finished ones; the overlap of an epoch with the one before is in its last row."""
    runs = {}
    for seed, variant in study.runs():
        folder = study.folder(seed, variant)
        run = load_run(folder, variant)
        overlaps = json.loads((folder / OVERLAP).read_text(encoding="utf-8"))
        last = {row["epoch"]: row for row in run.metrics if row["step"] > 0}
        for epoch, value in overlaps.items():
            last[int(epoch)][OVERLAP_KEY] = value
        runs[seed, variant] = run
    return runs


def summary_of(run: Run, config: RunConfig, before: Mapping[str, float] | None) -> RunSummary:
    """From the rows of a run; `before` is what all of a seed were judged at."""
    rows = [row for row in run.metrics if row["step"] > 0]
    start = {"step": 0, "epoch": 0, **{f"accuracy_{k}": v for k, v in (before or {}).items()}}
    return summarize(
        [start, *rows],
        run_dir="",
        rule=config.rollout.rule,
        reuse=config.rollout.reuse,
        drafting=config.rollout.drafting,
        seed=config.train.seed,
        num_prompts=int(number(run.summary.get("num_prompts")) or 0),
        num_dropped_prompts=0,
        environment={},
    )


def results(study: Study, runs: Mapping[tuple[int, str], Run]) -> dict[str, Any]:
    """Content of ablation.json without what says where it comes from.

    Args:
        runs: From `load_runs`.
    """
    plain = next(iter(study.variants))
    found: dict[str, Any] = {"split": _split(runs.values()), "variants": {}}
    before = {seed: _before(runs[seed, plain]) for seed in study.seeds}
    curves = {
        (seed, name): accuracy_curve(run.metrics, found["split"], before[seed].get(found["split"]))
        for (seed, name), run in runs.items()
    }
    means = {
        name: mean_curve([curves[seed, name] for seed in study.seeds]) for name in study.variants
    }
    target = means[plain][-1].accuracy if means[plain] else None
    found["plain_accuracy"] = target
    for name, changes in study.variants.items():
        each = [
            _facts(study, runs, seed, name, plain, before[seed], curves, found["split"])
            for seed in study.seeds
        ]
        known = published_run(changes)
        found["variants"][name] = {
            "changes": {k: v if _finite(v) else str(v) for k, v in _own(study, name).items()},
            "published": None
            if known is None
            else {
                "speedup": known.speedup,
                "tokens_m": known.tokens_m,
                "accuracy": known.accuracy,
            },
            "mean": _over_seeds(each, statistics.fmean),
            "sd": _over_seeds(each, statistics.stdev) if len(each) > 1 else {},
            "until_plain_accuracy": {
                cost: None if target is None else cost_of(means[name], target, cost)
                for cost in COSTS
            },
            "curve": [[_short(v) for v in _point(point)] for point in means[name]],
            "by_epoch": _by_epoch([runs[seed, name] for seed in study.seeds]),
            "runs": each,
        }
    return found


def _finite(value: Any) -> bool:
    return not (isinstance(value, float) and not math.isfinite(value))


def _own(study: Study, name: str) -> dict[str, Any]:
    """The keys in which a variant differs from the first one."""
    first = study.variants[next(iter(study.variants))]
    changes = study.variants[name]
    return {k: v for k, v in changes.items() if changes is first or first.get(k) != v}


def _point(point: Point) -> list[float]:
    return [point.step, *(getattr(point, cost) for cost in COSTS), point.accuracy]


def _short(value: float) -> float:
    """To six digits."""
    return float(f"{value:.6g}")


def _before(run: Run) -> dict[str, float]:
    first = next((row for row in run.metrics if row["step"] == 0), {})
    values = {split: number(first.get(f"accuracy_{split}")) for split in ("train", "heldout")}
    return {split: value for split, value in values.items() if value is not None}


def _split(runs: Any) -> str:
    held_out = any("accuracy_heldout" in row for run in runs for row in run.metrics)
    return "heldout" if held_out else "train"


def _facts(
    study: Study,
    runs: Mapping[tuple[int, str], Run],
    seed: int,
    name: str,
    plain: str,
    before: Mapping[str, float],
    curves: Curves,
    split: str,
) -> dict[str, Any]:
    """Of one run."""
    own = summary_of(runs[seed, name], study.config(seed, name), before)
    base = summary_of(runs[seed, plain], study.config(seed, plain), before)
    facts = run_facts(own, base, study.base.eval.num_samples)
    for key in ("rule", "reuse", "drafting", "num_eval_samples"):
        facts.pop(key)
    facts["token_share"] = own.totals.num_generated_tokens / base.totals.num_generated_tokens
    facts["seen_per_prompt"] = own.totals.num_new_responses / max(1, own.num_prompts)
    rows = [row for row in runs[seed, name].metrics if row["step"] > 0 and row["epoch"] > 0]
    facts.update({f"later_{key}": _mean_of(rows, key) for key in EPOCH_KEYS})
    curve = curves[seed, name]
    key = f"accuracy_{split}"
    last_evaluated = max((r["step"] for r in runs[seed, name].metrics if key in r), default=0)
    facts["accuracy"] = curve[-1].accuracy if curve else None
    if curve and curve[-1].step < last_evaluated:
        facts["accuracy"] = None  # no response was judged the last time
    return {k: _short(v) if isinstance(v, float) else v for k, v in facts.items()}


def _mean_of(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [value for row in rows if (value := number(row.get(key))) is not None]
    return statistics.fmean(values) if values else None


def _over_seeds(each: Sequence[Mapping[str, Any]], mean: Any) -> dict[str, float]:
    """A mean, or a deviation, of every number that all runs of a variant have."""
    found = {}
    for key in each[0]:
        values = [number(facts[key]) for facts in each]
        if key != "seed" and None not in values:
            found[key] = _short(mean(values))
    return found


def _by_epoch(runs: Sequence[Run]) -> dict[str, list[float | None]]:
    epochs = sorted({row["epoch"] for run in runs for row in run.metrics if row["step"] > 0})
    found: dict[str, list[float | None]] = {}
    for key in EPOCH_KEYS:
        means = [
            _mean_of([r for run in runs for r in run.metrics if r["epoch"] == e and r["step"]], key)
            for e in epochs
        ]
        if any(value is not None for value in means):
            found[key] = [None if value is None else _short(value) for value in means]
    return found


def mean_runs(study: Study, runs: Mapping[tuple[int, str], Run]) -> list[Run]:
    """A run per variant whose rows are the means over the seeds, step by step; samples are those of
    the first seed."""
    plain = next(iter(study.variants))
    starts = [_before(runs[seed, plain]) for seed in study.seeds]
    before = {
        split: statistics.fmean(start[split] for start in starts)
        for split in starts[0]
        if all(split in start for start in starts)
    }
    found = []
    for name in study.variants:
        same = [runs[seed, name] for seed in study.seeds]
        config = study.config(study.seeds[0], name)
        by_step = [{row["step"]: row for row in run.metrics if row["step"] > 0} for run in same]
        rows = []
        for step in sorted(set.intersection(*(set(steps) for steps in by_step))):
            at = [steps[step] for steps in by_step]
            values = {key: [number(row.get(key)) for row in at] for key in at[0]}
            known = {key: [value for value in v if value is not None] for key, v in values.items()}
            rows.append({key: statistics.fmean(v) for key, v in known.items() if len(v) == len(at)})
        summary = {
            "reuse": config.rollout.reuse,
            "drafting": config.rollout.drafting,
            "accuracy_before": before,
        }
        found.append(
            Run(
                name,
                metrics=rows,
                summary=summary,
                samples=same[0].samples,
                environment=same[0].environment,
            )
        )
    return found
