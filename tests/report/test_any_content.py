"""A page is written whatever a run holds: what can be shown is shown, the rest is named."""

from __future__ import annotations

import json
import os
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from spec_rollout.report import Run, load_run, render_page, write_report
from spec_rollout.report.texts import cut, fact_text, visible

_GOOD = {"step": 1, "reward": 0.25, "rollout_seconds": 2.0, "num_rollouts": 4}
_DEEP = 5000


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.text: list[str] = []
        self.num_figures = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.num_figures += tag == "svg"

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def page_of(tmp_path: Path, **files: str | bytes) -> tuple[str, int]:
    """Text and number of figures of the page of a run with one good row of metrics and these
    files."""
    run = tmp_path / "run"
    run.mkdir()
    contents: dict[str, str | bytes] = {"metrics.jsonl": json.dumps(_GOOD) + "\n"}
    for name, content in {**contents, **{k.replace("_", "."): v for k, v in files.items()}}.items():
        data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
        (run / name).write_bytes(data)
    page = _Text()
    page.feed(write_report([load_run(run)], tmp_path / "page.html").read_text(encoding="utf-8"))
    return "".join(page.text), page.num_figures


def rows(*changes: dict[str, Any]) -> str:
    return "".join(json.dumps({**_GOOD, **change}) + "\n" for change in ({}, *changes))


def test_numbers_that_cannot_be_drawn_are_left_out_and_named(tmp_path: Path) -> None:
    changes = [{"step": 2, "reward": 10**400, "entropy": 1e308}, {"step": 3, "entropy": 1e308}]
    changes.append({"step": 4, "reward": float("nan"), "entropy": float("inf"), "kl": -(10**4000)})
    text, figures = page_of(tmp_path, metrics_jsonl=rows(*changes))
    assert "reward of 1 rows is beyond 1e+100; left out" in text
    assert "entropy of 2 rows is beyond 1e+100; left out" in text
    assert "kl of 1 rows is beyond 1e+100; left out" in text
    assert "training steps4" in text
    assert "rollout seconds, everything counted8.0" in text
    assert figures == 3  # reward, seconds as a curve and stacked


@pytest.mark.parametrize("value", [1e99, -1e99, 0, -5, 10**100, "x", "", None, [1], {"": {}}, True])
def test_every_key_may_hold_anything(tmp_path: Path, value: Any) -> None:
    keys = [*_GOOD, "epoch", "entropy", "reused_fraction", "verification_seconds", "decode_seconds"]
    text, figures = page_of(
        tmp_path,
        metrics_jsonl=rows(*({"step": 2, key: value} for key in keys), dict.fromkeys(keys, value)),
        summary_json=json.dumps({key: value for key in ("environment", "accuracy_after", "effective_speedup")}),
        samples_jsonl=json.dumps(dict.fromkeys(("step", "prompt", "tokens", "accepted_tokens", "logprobs", "reward"), value)),
        running_jsonl=json.dumps({"step": 2, "seconds": value, "running": [value]}),
    )  # fmt: skip
    assert "not shown" not in text
    assert figures >= 3


def test_texts_are_shown_as_far_as_they_can_be(tmp_path: Path) -> None:
    sample = '{"step": 1, "prompt": "a\\ud800b\\u0000c\\r\\n<d>", "tokens": ["\\udfff", "", 7, null, ["x"]]}'
    text, _ = page_of(tmp_path, samples_jsonl=sample + "\n", config_toml=b'name = "\xff\x1b"\n')
    assert "a\\ud800b\N{SYMBOL FOR NULL}c\N{SYMBOL FOR CARRIAGE RETURN}\n<d>" in text
    assert "\\udfff7None['x']" in text
    assert 'name = "\N{REPLACEMENT CHARACTER}\N{SYMBOL FOR ESCAPE}"' in text


def test_what_is_nested_deeply_is_left_out_and_named(tmp_path: Path) -> None:
    deep = "[" * _DEEP + "]" * _DEEP
    less = '{"a": ' * 500 + "1" + "}" * 500
    text, _ = page_of(
        tmp_path,
        metrics_jsonl=json.dumps(_GOOD) + f'\n{{"step": 2, "reward": {deep}}}\n{{"step": 3, "kl": {less}}}\n',
        environment_json=f'{{"cpu": {less}, "gpu": "none"}}',
        samples_jsonl=f'{{"step": 1, "prompt": {less}, "response": {less}}}\n',
        summary_json=deep,
    )  # fmt: skip
    assert "metrics.jsonl: line 2 is not JSON; left out" in text
    assert "summary.json: not readable (RecursionError); left out" in text
    assert "training steps1" in text  # the third row has no rollouts
    assert "gpunone" in text
    assert "not shown" not in text


@pytest.mark.slow
def test_a_line_of_a_hundred_megabytes_is_cut(tmp_path: Path) -> None:
    long = json.dumps({"step": 1, "prompt": "p" * 10**8, "tokens": ["t"] * 50_000})
    text, _ = page_of(tmp_path, samples_jsonl=long + "\n")
    assert len(text) < 10**6
    assert "p\N{HORIZONTAL ELLIPSIS} (99,800,000 more characters)" in text
    assert "t\N{HORIZONTAL ELLIPSIS} (30,000 more tokens)" in text


def test_many_broken_lines_are_counted(tmp_path: Path) -> None:
    text, _ = page_of(tmp_path, metrics_jsonl=json.dumps(_GOOD) + "\n" + "{\n" * 1000)
    assert text.count("is not JSON") + text.count("is cut off") == 20
    assert "metrics.jsonl: 980 more lines left out" in text


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(_GOOD))
    os.mkfifo(tmp_path / "samples.jsonl")
    (tmp_path / "config.toml").mkdir()
    assert load_run(tmp_path).problems == [
        "samples.jsonl: expected a file, got something else; left out",
        "config.toml: expected a file, got something else; left out",
    ]


def test_keys_and_names_of_any_kind() -> None:
    facts: dict[Any, Any] = {1: 2, None: {3: [4]}, ("a", "b"): 10**5000, "date": "today"}
    run = Run("\ud800\x00" * 99, metrics=[dict(_GOOD)], environment=facts)
    page = render_page([run, Run("", metrics=[dict(_GOOD)], environment={"x": {}})])
    assert "<td>1</td><td>2</td>" in page
    assert "<td>None</td><td>3 4</td>" in page
    assert "(int)" in page
    page.encode("utf-8")


def test_a_part_that_fails_is_named_and_the_rest_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> str:
        raise ArithmeticError("cannot draw <this>")

    monkeypatch.setattr("spec_rollout.report.page.seconds_svg", fails)
    page = render_page([Run("a", metrics=[dict(_GOOD)])])
    assert "rollout seconds: not shown (ArithmeticError: cannot draw &lt;this&gt;)" in page
    assert page.count("<svg") == 2
    assert "<h2>Summary</h2>" in page


def test_texts() -> None:
    assert visible("a\tb\nc\x07\x7f\ud912") == "a\tb\nc\N{SYMBOL FOR BELL}\\u007f\\ud912"
    assert cut("abcdef", 4) == "abcd\N{HORIZONTAL ELLIPSIS} (2 more characters)"
    assert cut("abcd", 4) == "abcd"
    assert (
        fact_text({"a": [1, None, []], "b": None, "c": {"d": True}})
        == "a 1; unknown; none, c d True"
    )
