"""The page about a grid: tables of variants beside the published figures, and curves of their
means."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import matplotlib
from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter

from spec_rollout.ablate.published import ALGORITHMS
from spec_rollout.ablate.results import OVERLAP_KEY
from spec_rollout.report.page import render_page
from spec_rollout.report.plots import STYLE, Panel, new_figures, svg_of
from spec_rollout.runs.load import Run

_NONE = "\N{EN DASH}"
_PANELS = (
    Panel(
        OVERLAP_KEY,
        "Overlap with the epoch before",
        "ROUGE-1 of a prompt's responses, sample by sample; words of the decoded text.",
        percent=True,
        points=True,
    ),
    Panel("response_len", "Response length", "Tokens, mean of the step."),
)
Variant = Mapping[str, Any]
Column = tuple[str, Callable[[Variant], str]]


def _mean(key: str, form: str, *, sd: str | None = None) -> Callable[[Variant], str]:
    """A mean over the seeds, with its standard deviation where `sd` gives a format."""

    def cell(variant: Variant) -> str:
        value, deviation = variant["mean"].get(key), variant["sd"].get(key)
        if value is None:
            return _NONE
        text = format(value, form)
        return text if sd is None or deviation is None else f"{text} ± {format(deviation, sd)}"

    return cell


def _accuracy(variant: Variant) -> str:
    value, deviation = variant["mean"].get("accuracy"), variant["sd"].get("accuracy")
    if value is None:
        return _NONE
    return f"{value:.1%}" + ("" if deviation is None else f" ± {100 * deviation:.1f}")


def _until(cost: str, form: str) -> Callable[[Variant], str]:
    def cell(variant: Variant) -> str:
        value = variant["until_plain_accuracy"].get(cost)
        return "not reached" if value is None else format(value, form)

    return cell


def _published(key: str, form: str, share_of: float | None = None) -> Callable[[Variant], str]:
    def cell(variant: Variant) -> str:
        known = variant["published"]
        if known is None:
            return _NONE
        return format(known[key] / (share_of or 1.0), form)

    return cell


def _of_grid(content: Mapping[str, Any]) -> dict[str, tuple[str, Sequence[Column]]]:
    """Headings, notes and columns of the tables."""
    split = {"heldout": "held-out", "train": "training"}[content["split"]]
    plain = next(iter(content["variants"].values()))["published"]
    tokens = None if plain is None else plain["tokens_m"]
    target = content["plain_accuracy"]
    reach = "" if target is None else f" ({target:.1%})"
    return {
        "What reuse saves, and what it costs": (
            f"Means over the seeds, ± their standard deviation. Accuracy is of fresh plain samples "
            f"on {split} prompts after the last update. Speed-ups are over the first variant, from "
            f"the second epoch on, everything counted. “Until” is what training had cost when "
            f"the mean curve first reached the first variant's last accuracy{reach}. Published: "
            "Qwen3-1.7B-Base, GRPO (SPEC-RL, tables 2 and 3); its speed-ups leave verification "
            "out.",
            (
                ("generated tokens", _mean("generated_tokens", ",.0f")),
                ("of the first", _mean("token_share", ".0%")),
                ("rollouts, speed-up", _mean("effective_speedup", ".2f", sd=".2f")),
                ("whole step", _mean("step_speedup", ".2f")),
                ("accuracy", _accuracy),
                ("rollout seconds until", _until("rollout_seconds", ",.1f")),
                ("step seconds until", _until("step_seconds", ",.1f")),
                ("tokens until", _until("generated_tokens", ",.0f")),
                ("published: speed-up", _published("speedup", ".2f")),
                ("tokens", _published("tokens_m", ".0%", tokens)),
                ("accuracy", _published("accuracy", ".1f")),
            ),
        ),
        "What is reused, and what the update sees": (
            "Means over the steps from the second epoch on; “seen” is the number of different "
            "responses of a prompt in the whole run. Overlap: ROUGE-1 with the same sample of the "
            "epoch before, words of the decoded text.",
            (
                ("reused tokens", _mean("later_reused_fraction", ".1%")),
                ("accepted length", _mean("later_mean_accepted_len", ".1f")),
                ("fully reused", _mean("later_fully_reused_fraction", ".1%")),
                ("overlap", _mean(f"later_{OVERLAP_KEY}", ".1%")),
                ("distinct per group", _mean("later_distinct_per_prompt", ".2f")),
                ("new per group", _mean("later_new_per_prompt", ".2f")),
                ("seen", _mean("seen_per_prompt", ".1f")),
                ("mean age", _mean("later_mean_age", ".2f")),
                ("divergence of reused", _mean("later_kl_reused", ".4f")),
                ("entropy", _mean("later_entropy", ".3f")),
                ("KL to the reference", _mean("later_kl", ".4f")),
                ("clip fraction", _mean("later_clip_fraction", ".2%")),
            ),
        ),
    }


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f'<div class="card scroll"><table class="dense"><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def lead_html(content: Mapping[str, Any]) -> str:
    """The tables of a grid, its figure against log_lenience, and the published algorithms."""
    parts = []
    for title, (note, columns) in _of_grid(content).items():
        rows = [
            [name, *(cell(variant) for _, cell in columns)]
            for name, variant in content["variants"].items()
        ]
        # A column that no run has a value for says nothing.
        shown = [0, *(i for i in range(1, len(columns) + 1) if any(r[i] != _NONE for r in rows))]
        head = ["", *(name for name, _ in columns)]
        table = _html_table([head[i] for i in shown], [[row[i] for i in shown] for row in rows])
        parts.append(
            f'<section><h2>{title}</h2><p class="soft">{escape(note)}</p>{table}</section>'
        )
    figure = lenience_svg(content, salt="lenience")
    if figure:
        parts.append(
            "<section><h2>Against log_lenience</h2><figure><figcaption><p>Full: this grid. Dashed: "
            "published. Both over plain sampling; the right end is full reuse.</p></figcaption>"
            f"{figure}</figure></section>"
        )
    rows = [
        [
            model,
            algorithm,
            *(f"{value:.2f}" for value in (claimed, effective, step)),
            f"{after / before:.0%}",
            f"{plain:.1f} \N{RIGHTWARDS ARROW} {reused:.1f}",
        ]
        for model, algorithm, claimed, effective, step, before, after, plain, reused in ALGORITHMS
    ]
    head = ["", "algorithm", "speed-up, as claimed", "verification counted", "whole step"]
    parts.append(
        "<details><summary>Published: models and algorithms (SPEC-RL, tables 1 and 13)</summary>"
        f"{_html_table([*head, 'tokens', 'accuracy'], rows)}</details>"
    )
    return "".join(parts)


def lenience_svg(content: Mapping[str, Any], salt: str) -> str | None:
    """Speed-up, share of tokens and change of accuracy by log_lenience, beside the published ones;
    None with fewer than two values."""
    variants = content["variants"]
    plain = next(iter(variants.values()))
    swept = [
        variant
        for name, variant in variants.items()
        if name.startswith("lenient_")
        and "log_lenience" in str(list(variant["changes"]))
        and set(variant["changes"]) <= {"rollout.rule", "rollout.reuse", "rollout.log_lenience"}
    ]
    if len(swept) < 2:
        return None
    labels = [f"{float(variant['changes']['rollout.log_lenience']):g}" for variant in swept]
    base, known = plain["mean"], plain["published"]

    def own(key: str) -> list[float | None]:
        return [variant["mean"].get(key) for variant in swept]

    def published(key: str) -> list[float | None]:
        return [(variant["published"] or {}).get(key) for variant in swept]

    def change(values: Sequence[float | None], start: float | None) -> list[float | None]:
        return [None if v is None or start is None else v - start for v in values]

    tokens = published("tokens_m")
    accuracy = change(own("accuracy"), base.get("accuracy"))
    panels = (
        ("speed-up of rollouts", own("effective_speedup"), published("speedup"), False),
        (
            "generated tokens",
            own("token_share"),
            [None if v is None or known is None else v / known["tokens_m"] for v in tokens],
            True,
        ),
        (
            "accuracy, change in points",
            [None if v is None else 100 * v for v in accuracy],
            change(published("accuracy"), None if known is None else known["accuracy"]),
            False,
        ),
    )
    with matplotlib.rc_context(STYLE):
        figure, frames = new_figures(9.6, 2.5, len(panels))
        for axes, (title, ours, theirs, percent) in zip(frames, panels, strict=True):
            for values, style in ((ours, "-"), (theirs, (0, (4, 2)))):
                shown = [(i, value) for i, value in enumerate(values) if value is not None]
                axes.plot(
                    [i for i, _ in shown],
                    [value for _, value in shown],
                    color="#0072b2" if style == "-" else "#8a8f98",
                    linestyle=style,
                    marker="o",
                    markersize=3.5,
                    linewidth=1.6,
                )
            axes.set_xticks(range(len(labels)), labels)
            axes.set_title(title, loc="left", fontsize=9, color="#3b4048")
            axes.tick_params(length=0)
            if title.startswith("speed-up"):
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(base=2))
                axes.yaxis.set_minor_locator(NullLocator())
                axes.yaxis.set_major_formatter("{x:g}x")
            if percent:
                axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        return svg_of(figure, salt)


def ablation_page(content: Mapping[str, Any], runs: Sequence[Run], title: str) -> str:
    """The page.

    Args:
        content: Of ablation.json.
        runs: A run per variant (`results.mean_runs`).
    """
    return render_page(runs, title, lead=lambda: lead_html(content), panels=_PANELS)
