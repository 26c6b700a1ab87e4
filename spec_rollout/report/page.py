"""The page: one self-contained file, no script, nothing loaded; every text is escaped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from spec_rollout import counters
from spec_rollout.report.differences import difference_rows
from spec_rollout.report.plots import (
    PART_COLOURS,
    Panel,
    colour,
    panel_svg,
    running_svg,
    seconds_svg,
)
from spec_rollout.report.style import CSS
from spec_rollout.report.texts import cut, fact_text, plain, visible
from spec_rollout.report.tokens import samples_html
from spec_rollout.runs.load import Run, number
from spec_rollout.runs.outputs import write_text

_FRESH = "Plain sampling of the current weights with fresh noise, no reuse."


def _counted(key: str, *, percent: bool = False) -> Panel:
    """A panel of one of the rollout's counters."""
    title = counters.label(key)
    return Panel(key, title[0].upper() + title[1:], counters.note(key), percent=percent)


PANELS = (
    Panel("reward", "Reward", "Mean over the step's rollouts, reused ones included.", smooth=True),
    Panel("accuracy_train", "Fresh accuracy, training prompts", _FRESH, percent=True, points=True),
    Panel(
        "accuracy_heldout", "Fresh accuracy, held-out prompts", _FRESH, percent=True, points=True
    ),
    _counted("rollout_seconds"),
    _counted("num_generated_tokens"),
    _counted("reused_fraction", percent=True),
    _counted("fully_reused_fraction", percent=True),
    _counted("mean_accepted_len"),
    _counted("kl_reused"),
    _counted("mean_age"),
    _counted("distinct_per_prompt"),
    _counted("new_per_prompt"),
    Panel("log_lenience", "Lenience", "log_lenience of the step's acceptance rule."),
    Panel("lenience_estimate", "Budget of lenience", "Estimate of what the controller holds."),
    Panel("entropy", "Entropy", "Of the policy per token, in nats.", smooth=True),
    Panel(
        "approx_kl",
        "KL within a step",
        "Of the policy that sampled to the one being updated, nats per token.",
        smooth=True,
    ),
    Panel("kl", "KL to the reference", "Per token, in nats.", smooth=True),
    Panel(
        "clip_fraction",
        "Clip fraction",
        "Share of tokens whose ratio was clipped.",
        percent=True,
        smooth=True,
    ),
)


# Calls what makes a part of the page; where that fails, the page has no such part but says so.
_Draw = Callable[[str, Callable[[], str | None]], str]


def _swatch(background: str, text: str) -> str:
    return f'<li><i style="background:{background}"></i>{escape(text)}</li>'


def _legend(runs: Sequence[Run]) -> str:
    items = "".join(_swatch(colour(i), run.name) for i, run in enumerate(runs))
    return f'<ul class="legend">{items}</ul>'


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
    return [row for row in rows if any(cell != _NONE for cell in row[1:])]


def _table(title: str, runs: Sequence[Run], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in ["", *(run.name for run in runs)])
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f'<section><h2>{title}</h2><div class="card scroll"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></section>"
    )


def _differences(runs: Sequence[Run], problems: list[str]) -> str:
    """A table of the keys whose values differ; nothing for one run, or where no two have one."""
    if sum(run.config is not None for run in runs) < 2:
        return ""
    rows = difference_rows(runs, problems)
    if rows:
        return _table("What differs", runs, rows)
    note = "Nothing in the configurations but the folders."
    return f'<section><h2>What differs</h2><p class="soft">{note}</p></section>'


def _figures(runs: Sequence[Run], draw: _Draw) -> str:
    cards = []
    for index, panel in enumerate(PANELS):
        svg = draw(panel.title, partial(panel_svg, panel, runs, salt=f"p{index}"))
        if svg:
            caption = f"<h3>{escape(panel.title)}</h3><p>{escape(panel.note)}</p>"
            cards.append(f"<figure><figcaption>{caption}</figcaption>{svg}</figure>")
    parts = []
    if cards:
        note = "Thick: running mean; thin: each step. Dotted: a new epoch begins."
        parts.append(
            f'<section><h2>Against the training step</h2>{_legend(runs)}<p class="soft">{note}</p>'
            f'<div class="grid">{"".join(cards)}</div></section>'
        )
    seconds = draw("rollout seconds", lambda: seconds_svg(runs, salt="seconds"))
    if seconds:
        legend = "".join(_swatch(shade, name) for name, shade in PART_COLOURS.items())
        parts.append(
            "<section><h2>Where the rollout seconds go</h2><figure><figcaption><p>Seconds per step "
            "(stacked); other is lookup, assembly, storing and all between.</p></figcaption>"
            f'<ul class="legend">{legend}</ul>{seconds}</figure></section>'
        )
    running = draw("requests running", lambda: running_svg(runs, salt="running"))
    if running:
        parts.append(
            "<section><h2>Requests running within a step</h2><figure><figcaption><p>In "
            "verification or decoding, during "
            "the rollouts of the last step. A long flat end is a step that waits for its longest "
            "rollouts.</p>"
            f"</figcaption>{_legend(runs)}{running}</figure></section>"
        )
    return "".join(parts)


def _samples(runs: Sequence[Run], draw: _Draw) -> str:
    shown = []
    for run in runs:
        html = draw(f"samples of {run.name}", partial(samples_html, run))
        if html:
            shown.append((run.name, html))
    # The first run with something to see is unfolded.
    unfolded = next((name for name, html in shown if "<mark" in html), None)
    parts = [
        f"<details{' open' if name == unfolded else ''}><summary>{escape(name)}</summary>"
        f'<div class="samples">{html}</div></details>'
        for name, html in shown
    ]
    if not parts:
        return ""
    note = 'What came from the cache is <mark class="reused">marked</mark>; the rest was generated.'
    return f'<section><h2>Sample rollouts</h2><p class="soft">{note}</p>{"".join(parts)}</section>'


def _rows_of(facts: Mapping[Any, Any]) -> list[tuple[str, str]]:
    return [(cut(plain(key), 200), fact_text(value)) for key, value in facts.items()]


def _environments(runs: Sequence[Run]) -> str:
    """One table per distinct environment, naming the runs it belongs to."""
    groups: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for run in runs:
        if run.environment is not None:
            facts = {key: value for key, value in run.environment.items() if key != "date"}
            groups.setdefault(repr(_rows_of(facts)), (facts, []))[1].append(run.name)
    tables = []
    for facts, names in groups.values():
        rows = "".join(
            f"<tr><td>{escape(key)}</td><td>{escape(value)}</td></tr>"
            for key, value in _rows_of(facts)
        )
        tables.append(
            f'<p class="soft">{escape(", ".join(names))}</p>'
            f'<div class="card"><table class="facts">{rows}</table></div>'
        )
    if not tables:
        tables.append('<p class="soft">Not recorded by these runs.</p>')
    return f"<section><h2>Hardware and versions</h2>{''.join(tables)}</section>"


def _configs(runs: Sequence[Run]) -> str:
    parts = [
        f"<details><summary>{escape(run.name)}</summary>"
        f'<div class="card"><pre>{escape(cut(run.config))}</pre></div></details>'
        for run in runs
        if run.config is not None
    ]
    return f"<section><h2>Resolved configuration</h2>{''.join(parts)}</section>" if parts else ""


def _problems(problems: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(cut(text, 500))}</li>" for text in problems)
    return f'<div class="problems">Incomplete:<ul>{items}</ul></div>' if items else ""


def render_page(runs: Sequence[Run], title: str = "spec_rollout report") -> str:
    """The whole page as HTML. What a run holds that cannot be shown is named at the top; the rest
    is there.

    Raises:
        ValueError: if `runs` is empty.
    """
    if not runs:
        raise ValueError("runs: expected at least one, got none")
    intro = (
        "Speculative reuse of the previous epoch's rollouts in on-policy reinforcement learning."
    )
    problems = [f"{run.name}: {text}" for run in runs for text in run.problems]

    def draw(what: str, make: Callable[[], str | None]) -> str:
        try:
            return make() or ""
        except Exception as error:
            problems.append(f"{what}: not shown ({type(error).__name__}: {error})")
            return ""

    parts = [
        draw("summary", lambda: _table("Summary", runs, summary_rows(runs))),
        draw("what differs", lambda: _differences(runs, problems)),
        _figures(runs, draw),
        _samples(runs, draw),
        draw("hardware and versions", lambda: _environments(runs)),
        draw("configuration", lambda: _configs(runs)),
    ]
    heading = f'<h1>{escape(title)}</h1><p class="soft">{intro}</p>'
    body = heading + _problems(problems) + "".join(parts)
    return visible(
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def write_report(runs: Sequence[Run], path: Path, title: str = "spec_rollout report") -> Path:
    """Writes the page to `path`; an older report stays until the new one is complete."""
    text = render_page(runs, title)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return path
