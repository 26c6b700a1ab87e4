"""What the summary of a page says about each run, a line per quantity."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from spec_rollout import counters
from spec_rollout.report.accuracy import reach_rows
from spec_rollout.runs.load import Run, number


def _total(run: Run, key: str) -> float | None:
    _, values = run.series(key)
    return sum(values) if values else None


def _share(run: Run, part: str, whole: str) -> float | None:
    """Sum of `part` over sum of `whole`, over the steps that have both."""
    pairs = [(number(row.get(part)), number(row.get(whole))) for row in run.metrics]
    both = [(a, b) for a, b in pairs if a is not None and b is not None]
    below = sum(b for _, b in both)
    return sum(a for a, _ in both) / below if below > 0 else None


def _last(run: Run, key: str) -> float | None:
    _, values = run.series(key)
    return values[-1] if values else None


def _reported(run: Run, key: str, group: str | None = None) -> float | None:
    """A number of `summary.json`, possibly one level down."""
    value = run.summary.get(key)
    return number(value.get(group) if group and isinstance(value, dict) else value)


def _seen_per_prompt(run: Run) -> float | None:
    """New responses of all steps per prompt of the data."""
    new, num_prompts = _total(run, "num_new_responses"), _reported(run, "num_prompts")
    return new / num_prompts if new is not None and num_prompts else None


_NONE = "\N{EN DASH}"
_REUSED = "num_reused_tokens"


def _text(value: float | None, form: str) -> str:
    return _NONE if value is None else format(value, form)


def _num_steps(run: Run) -> float:
    """Rows of training steps: a row may also be an evaluation before the first one."""
    return float(len(run.series("rollout_seconds")[0]))


_Quantity = tuple[str, str, Callable[[Run], float | None]]


def _sum_of(key: str, form: str, name: str | None = None) -> _Quantity:
    """A counter's sum over all steps."""
    return name or counters.label(key), form, lambda run: _total(run, key)


def _accuracy(split: str, name: str, when: str) -> _Quantity:
    return (
        f"accuracy, {name} prompts, {when}",
        ".1%",
        lambda r: _reported(r, f"accuracy_{when}", split),
    )


_QUANTITIES: tuple[_Quantity, ...] = (
    ("training steps", ",.0f", _num_steps),
    _sum_of("rollout_seconds", ",.1f", "rollout seconds, everything counted"),
    _sum_of("verification_seconds", ",.1f", "of these verification"),
    (
        "effective speed-up from the second epoch on",
        ".2f",
        lambda run: _reported(run, "effective_speedup"),
    ),
    ("of the whole step", ".2f", lambda run: _reported(run, "step_speedup")),
    _sum_of("num_response_tokens", ",.0f"),
    _sum_of("num_generated_tokens", ",.0f"),
    ("reused tokens", ".1%", lambda run: _share(run, _REUSED, "num_response_tokens")),
    ("fully reused rollouts", ".1%", lambda run: _share(run, "num_fully_reused", "num_rollouts")),
    ("divergence per reused token", ".4f", lambda r: _share(r, "sum_kl_reused", _REUSED)),
    ("mean age of tokens", ".2f", lambda run: _share(run, "sum_ages", "num_response_tokens")),
    ("responses of a prompt that training saw", ".1f", _seen_per_prompt),
    ("reward at the last step", ".3f", lambda run: _last(run, "reward")),
    _accuracy("train", "training", "before"),
    _accuracy("train", "training", "after"),
    _accuracy("heldout", "held-out", "before"),
    _accuracy("heldout", "held-out", "after"),
)


def summary_rows(runs: Sequence[Run]) -> list[list[str]]:
    """One row per quantity that at least one run has: its name, then its value per run."""
    rows = [[name, *(_text(value(run), form) for run in runs)] for name, form, value in _QUANTITIES]
    rows = [row for row in rows if any(cell != _NONE for cell in row[1:])]
    return [*rows, *(reach_rows(runs) if len(runs) > 1 else [])]
