from __future__ import annotations

import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from spec_rollout.report import Run, find_runs, load_run, render_page, write_report
from spec_rollout.report.page import PANELS
from spec_rollout.report.plots import (
    Panel,
    panel_svg,
    running_curve,
    running_mean,
    seconds_parts,
)
from spec_rollout.report.quantities import summary_rows
from spec_rollout.report.tokens import (
    followed,
    laid_over_draft,
    pick_samples,
    response_html,
    samples_html,
)

EVIL = "<script>alert('x')</script>\"&$x$"
_VOID = {"meta", "br", "img"}


class _Structure(HTMLParser):
    """Records elements and their text; fails on tags that do not nest."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.ids: Counter[str] = Counter()
        self.links: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        for name, value in attrs:
            if name == "id":
                self.ids[value or ""] += 1
            if name in ("src", "href", "xlink:href", "srcset", "data"):
                self.links.append(value or "")
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1:] == [tag], f"</{tag}> closes something else"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parse(page: str) -> _Structure:
    structure = _Structure()
    structure.feed(page)
    structure.close()
    assert structure.open == []
    return structure


def metrics(num_steps: int, reused: int) -> list[dict[str, float]]:
    """Rows as a run writes them: 100 response tokens a step, `reused` of them reused."""
    return [
        {
            "step": step,
            "epoch": step // 4,
            "reward": 0.1 * step,
            "num_rollouts": 10,
            "num_fully_reused": reused // 20,
            "num_response_tokens": 100,
            "num_reused_tokens": reused,
            "num_generated_tokens": 100 - reused,
            "rollout_seconds": 2.0,
            "verification_seconds": 0.25,
            "decode_seconds": 1.5,
            "reused_fraction": reused / 100,
            "fully_reused_fraction": (reused // 20) / 10,
            "mean_accepted_len": reused / 10,
            "kl_reused": 0.01,
            "log_lenience": 0.5,
            "lenience_estimate": 0.01,
            "mean_age": reused / 50,
            "distinct_per_prompt": 8.0,
            "new_per_prompt": 8 - reused / 10,
            "entropy": 0.3,
            "approx_kl": 0.001,
            "kl": 0.01,
            "clip_fraction": 0.02,
            "accuracy_train": 0.5,
            "accuracy_heldout": 0.4,
        }
        for step in range(num_steps)
    ]


def write_run(directory: Path, rows: list[dict[str, float]]) -> Path:
    directory.mkdir(parents=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


@pytest.mark.slow
def test_page_of_two_runs_holds_every_figure_and_loads_nothing(tmp_path: Path) -> None:
    write_run(tmp_path / "vanilla", metrics(8, 0))
    write_run(tmp_path / "lenient", metrics(8, 60))
    runs = [load_run(path) for path in find_runs(tmp_path)]
    page = write_report(runs, tmp_path / "report.html").read_text()
    structure = parse(page)
    # and accuracy against seconds and tokens, and the stacked seconds
    assert structure.tags["svg"] == len(PANELS) + 3
    assert structure.tags["script"] == structure.tags["link"] == structure.tags["img"] == 0
    assert all(link.startswith("#") for link in structure.links)
    assert not re.search(r"url\(http|@import", page)
    # ids are unique over all figures and every reference resolves
    assert max(structure.ids.values()) == 1
    used = set(re.findall(r"url\(#([^)]+)\)", page)) | {link[1:] for link in structure.links}
    assert used
    assert used <= set(structure.ids)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lenient", "report.html", "vanilla"]


def test_summary_counts_are_sums_over_the_steps() -> None:
    run = Run("lenient", metrics=metrics(8, 60))
    table = dict(summary_rows([run]))
    assert table["training steps"] == "8"
    assert table["rollout seconds, everything counted"] == "16.0"
    assert table["of these verification"] == "2.0"
    assert table["generated tokens"] == "320"
    assert table["reused tokens"] == "60.0%"
    assert table["fully reused rollouts"] == "30.0%"
    assert "effective speed-up from the second epoch on" not in table  # nobody reported it
    run.summary = {
        "effective_speedup": 1.994,
        "step_speedup": 1.5,
        "accuracy_after": {"heldout": 0.625},
    }
    table = dict(summary_rows([run]))
    assert table["effective speed-up from the second epoch on"] == "1.99"
    assert table["of the whole step"] == "1.50"
    assert table["accuracy, held-out prompts, after"] == "62.5%"


@pytest.mark.slow
def test_every_text_of_a_run_is_escaped(tmp_path: Path) -> None:
    run = Run(EVIL, metrics=metrics(3, 50), config=f"# {EVIL}", environment={EVIL: {EVIL: [EVIL]}})
    run.problems = [EVIL]
    run.samples = [
        {"step": 1, "prompt": EVIL, "response": EVIL, "accepted_chars": 9, "reward": 1.0},
        {"step": 2, "prompt": EVIL, "tokens": list(EVIL), "accepted_tokens": 9, "logprobs": [-1]},
    ]
    structure = parse(render_page([run], title=EVIL))
    assert structure.tags["script"] == 0
    # each of them is there, as text: title and heading, twice in legends, frame title, ...
    assert "".join(structure.text).count(EVIL) >= 10


def test_runs_without_steps_or_with_odd_fields_still_make_a_page() -> None:
    empty = Run("empty", problems=["metrics.jsonl: no step recorded"])
    odd = Run("odd", metrics=[{"step": "x", "reward": "high"}, {"rollout_seconds": 1.0}])
    odd.samples = [{}, {"tokens": "abc", "accepted_chars": -4, "step": None, "logprobs": 3}]
    odd.summary = {"accuracy_after": [1], "effective_speedup": "fast"}
    structure = parse(render_page([empty, odd]))
    text = "".join(structure.text)
    assert "empty: metrics.jsonl: no step recorded" in text
    assert structure.tags["svg"] == 2  # seconds as a curve and stacked
    with pytest.raises(ValueError, match="runs: expected at least one"):
        render_page([])


def test_reused_prefix_is_marked_exactly() -> None:
    by_char = {"response": "a<b>cd", "accepted_chars": 3}
    assert response_html(by_char) == '<mark class="reused">a&lt;b</mark>&gt;cd'
    by_token = {"tokens": ["1", "<", "3"], "accepted_tokens": 2, "logprobs": [-0.5, None]}
    assert response_html(by_token) == (
        '<mark class="reused"><b data-i="0" data-l="-0.500">1</b>'
        '<b data-i="1">&lt;</b></mark><b data-i="2">3</b>'
    )
    assert "<mark" not in response_html({"response": "abc"})
    assert response_html({"response": "abc", "accepted_chars": 99}).endswith("abc</mark>")


def sample(row: int, epoch: int, kept: int, draft: str | None) -> dict[str, object]:
    tokens = list("abcd")
    found = None
    if draft is not None:
        found = {
            "tokens": list(draft),
            "old_logprobs": [-0.25] * len(draft),
            "new_logprobs": [-0.5] * kept + [None] * (len(draft) - kept),
            "thresholds": None,
            "draws": [0.125] * len(draft),
        }
    return {
        "step": 2 * epoch + 1, "epoch": epoch, "row": row, "prompt": f"p{row}", "tokens": tokens,
        "logprobs": [-1.0] * 4, "accepted_tokens": kept, "draft": found, "log_lenience": 0.5,
    }  # fmt: skip


def test_a_response_is_laid_over_its_draft() -> None:
    kept = '<b data-i="0" data-q="-0.250" data-p="-0.500" data-u="0.125">a</b>'
    assert laid_over_draft(sample(0, 1, 1, "axy")) == (
        f'<pre class="kept">{kept}</pre><div class="fork"><div><h4>the draft went on</h4>'
        '<pre class="gone"><b class="cut" data-i="1" data-q="-0.250" data-u="0.125">x</b>'
        '<b data-i="2" data-q="-0.250" data-u="0.125">y</b></pre></div>'
        '<div><h4>generated instead</h4><pre class="new"><b data-i="1" data-l="-1.000">b</b>'
        '<b data-i="2" data-l="-1.000">c</b><b data-i="3" data-l="-1.000">d</b></pre></div></div>'
    )
    whole = laid_over_draft(sample(0, 1, 4, "abcd"))
    assert whole.count("<b ") == 4
    assert "fork" not in whole
    assert laid_over_draft(sample(0, 0, 0, None)).startswith('<pre class="new"><b data-i="0"')
    # a draft that was cut, kept whole, and gone on with
    assert "fork" not in laid_over_draft(sample(0, 1, 2, "ab"))


def test_a_response_is_shown_in_all_its_epochs() -> None:
    samples = [
        sample(row, epoch, row if epoch else 0, "abxy" if epoch else None)
        for epoch in range(3)
        for row in range(3)
    ]
    chosen = followed(samples, 2)
    assert [[(s["row"], s["epoch"]) for s in epochs] for epochs in chosen] == [
        [(row, epoch) for epoch in range(3)] for row in (1, 2)
    ]
    run = Run("x", samples=samples)
    html = samples_html(run, 2)
    assert html.count("<article") == 2
    assert "epoch 1 · step 1 · 4 tokens, no draft · log_lenience 0.5" in html
    assert "epoch 3 · step 5 · 2 of 4 draft tokens kept, 2 new · log_lenience 0.5" in html
    long = [sample(0, epoch, 1, "ax") for epoch in range(30)]
    assert [s["epoch"] for s in followed(long)[0]] == [0, 4, 8, 12, 17, 21, 25, 29]


def test_samples_are_spread_over_the_run() -> None:
    samples = [{"step": step} for step in range(100)]
    picked = [sample["step"] for sample in pick_samples(samples, 5)]
    assert picked == [0, 25, 50, 74, 99]
    assert pick_samples(samples[:3], 5) == samples[:3]


def test_stacked_parts_add_up_to_the_rollout_seconds() -> None:
    steps, parts = seconds_parts(Run("x", metrics=[*metrics(2, 0), {"step": 2, "reward": 1.0}]))
    assert steps == [0, 1]  # a step without a time is left out
    assert parts == {"verification": [0.25] * 2, "decode": [1.5] * 2, "other": [0.25] * 2}


def test_running_mean_is_centred_and_shorter_at_the_ends() -> None:
    assert running_mean([1.0, 2.0, 6.0, 3.0], 3).tolist() == pytest.approx([1.5, 3.0, 11 / 3, 4.5])
    assert running_mean([1.0, 5.0], 1).tolist() == [1.0, 5.0]


def test_a_panel_nobody_recorded_is_left_out() -> None:
    assert panel_svg(Panel("reward", "", ""), [Run("x", metrics=[{"step": 1}])], "s") is None


def test_running_requests_of_the_last_step_are_drawn() -> None:
    rows = [
        {"step": 3, "seconds": [0.5, 1.0], "running": [8, 2]},
        {"step": 4, "seconds": [0.25], "running": [7]},
        {"step": 5, "seconds": [0.25], "running": []},  # damaged: the one before is shown
        {"step": 6, "seconds": ["x"], "running": [1]},
    ]
    assert running_curve(Run("a", running=rows)) == (4.0, [0.0, 0.25], [7.0, 7.0])
    assert running_curve(Run("b")) is None
    page = render_page([Run("a", running=rows), Run("b")])
    assert "Requests running within a step" in parse(page).text
    assert "Requests running within a step" not in render_page([Run("b")])
