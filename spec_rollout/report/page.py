"""The page: one self-contained file, no script, nothing loaded; every text is escaped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from spec_rollout import counters
from spec_rollout.report.accuracy import (
    COSTS,
    NOTE,
    accuracy_svg,
    curves_of,
    plain_run,
)
from spec_rollout.report.differences import difference_rows
from spec_rollout.report.plots import (
    PART_COLOURS,
    Panel,
    colour,
    panel_svg,
    running_svg,
    seconds_svg,
)
from spec_rollout.report.quantities import summary_rows
from spec_rollout.report.style import CSS
from spec_rollout.report.texts import cut, fact_text, plain, visible
from spec_rollout.report.tokens import LEGEND, samples_html
from spec_rollout.runs.load import Run
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


def _figures(runs: Sequence[Run], draw: _Draw, panels: Sequence[Panel]) -> str:
    cards = []
    for index, panel in enumerate(panels):
        svg = draw(panel.title, partial(panel_svg, panel, runs, salt=f"p{index}"))
        if svg:
            caption = f"<h3>{escape(panel.title)}</h3><p>{escape(panel.note)}</p>"
            cards.append(f"<figure><figcaption>{caption}</figcaption>{svg}</figure>")
    parts = []
    costs = []
    for cost, what in COSTS.items():
        svg = draw(what, partial(accuracy_svg, runs, cost, salt=cost))
        if svg:
            costs.append(f"<figure>{svg}</figure>")
    if costs:
        split = {"heldout": "held-out", "train": "training"}[curves_of(runs)[0]]
        line = "" if plain_run(runs) is None else " The grey line is the plain run's last one."
        parts.append(
            f"<section><h2>Fresh accuracy on {split} prompts, against what it cost</h2>"
            f'{_legend(runs)}<p class="soft">{NOTE}{line}</p>'
            f'<div class="grid two">{"".join(costs)}</div></section>'
        )
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
    seen = ("<mark", 'class="kept"')
    unfolded = next((name for name, html in shown if any(part in html for part in seen)), None)
    parts = [
        f"<details{' open' if name == unfolded else ''}><summary>{escape(name)}</summary>"
        f'<div class="samples">{html}</div></details>'
        for name, html in shown
    ]
    if not parts:
        return ""
    body = "".join(parts)
    return f'<section><h2>Sample rollouts</h2><p class="soft">{LEGEND}</p>{body}</section>'


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


def render_page(
    runs: Sequence[Run],
    title: str = "spec_rollout report",
    *,
    lead: Callable[[], str] | None = None,
    panels: Sequence[Panel] = (),
) -> str:
    """The whole page as HTML. What a run holds that cannot be shown is named at the top; the rest
    is there.

    Args:
        lead: Makes HTML that stands in the place of the summary and of what differs.
        panels: Figures beside the usual ones.

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

    if lead is None:
        parts = [
            draw("summary", lambda: _table("Summary", runs, summary_rows(runs))),
            draw("what differs", lambda: _differences(runs, problems)),
        ]
    else:
        parts = [draw("tables", lead)]
    parts += [
        _figures(runs, draw, (*PANELS, *panels)),
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
