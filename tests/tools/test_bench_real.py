"""The benchmark of a model that speaks, as far as the demo's goes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_runs import ROOT, tiny_run
from safetensors.torch import save_file

for _folder in ("benchmarks", "tools"):
    sys.path.insert(0, str(ROOT / _folder))

import bench_real  # noqa: E402
import real_policies  # noqa: E402
import real_rollouts  # noqa: E402
from renderers.real import real_summary_table, real_table  # noqa: E402

from spec_rollout.types import SamplingParams  # noqa: E402


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("real")
    arguments = ["--engines", "embedded", "--dtypes", "float32", "--requests", "4", "16"]
    arguments += ["--repeats", "1", "--group", "4", "--max-tokens", "16"]
    content = tiny_run("real", folder, *arguments)
    assert (folder / "out" / "real.png").stat().st_size > 5_000
    return content


@pytest.mark.slow
def test_every_rule_is_measured_at_every_size(content: dict[str, Any]) -> None:
    rows = {(r["requests"], r["phase"], r["contender"]): r for r in content["rows"]}
    rules = ["none", "drafting", "same noise", "coupled", "lenient 0", "lenient 0.5", "both"]
    orders = ["as they come", "longest first"]
    assert set(rows) == {
        *((n, "first", name) for n in (4, 16) for name in rules[:2]),
        *((n, "later", name) for n in (4, 16) for name in rules),
        *((16, "later", name) for name in orders),
    }
    for n in (4, 16):
        assert rows[n, "later", "none"]["reused"] == rows[n, "first", "none"]["reused"] == 0
        assert "over_base" not in rows[n, "later", "none"]  # there is no stock
        # The same noise: reuse and proposals change steps, never tokens; nor does the order.
        for phase, name, base in (
            ("first", "drafting", "none"),
            ("later", "drafting", "none"),
            ("later", "coupled", "same noise"),
            ("later", "both", "same noise"),
        ):
            assert rows[n, phase, name]["base"] == base
            for key in ("num_response_tokens", "longest_response"):
                assert rows[n, phase, name][key] == rows[n, phase, base][key]
        assert rows[n, "later", "lenient 0.5"]["base"] == "none"
        for key in ("num_response_tokens", "reused", "longest_response"):
            assert rows[n, "later", "both"][key] == rows[n, "later", "coupled"][key]
            assert rows[16, "later", orders[0]][key] == rows[16, "later", orders[1]][key]
        assert 0 < rows[n, "later", "coupled"]["reused"] < 1
        # What is proposed hangs on the clock.
        assert rows[n, "first", "drafting"]["tokens_per_step"] >= 1
    lenient = [rows[16, "later", name]["reused"] for name in ("lenient 0", "lenient 0.5")]
    assert 0.3 < lenient[0] < lenient[1] < 1
    assert content["training"]["updates"] == 2
    assert len(content["crossovers"]) == 1 + 5


@pytest.mark.slow
def test_the_sample_is_guessed_better_than_the_mode_where_the_policy_is_uncertain(
    content: dict[str, Any],
) -> None:
    found = content["entropy"]
    assert found["tokens"] == sum(one["tokens"] for one in found["bins"])
    assert found["guessed"]["old mode"] == found["guessed"]["old sample"] == 1
    sure, unsure = found["bins"][0], found["bins"][7]
    assert min(sure["tokens"], unsure["tokens"]) > 10
    assert sure["old mode"] > 0.9 > 0.5 > unsure["old mode"]
    assert unsure["old sample"] > unsure["old mode"] + 0.2
    assert unsure["history and noise"] > unsure["history"] + 0.2


@pytest.mark.slow
def test_what_came_out_has_tables(content: dict[str, Any]) -> None:
    text = real_table(content)
    assert "| embedded | float32 | 4 | " in text
    assert "| embedded | float32 | 16 in 4 slots | longest first | " in text
    summary = real_summary_table(content).splitlines()
    assert summary[0] == "|  | reused, 16 | float32, 4 / 16 requests | step, float32 |"
    assert len(summary) == 2 + 6 + 2
    assert summary[3].startswith("| first epoch, drafting | 0% | ")
    assert "`coupled`, `both` over `same noise`, the same engine" in text
    assert "vLLM" not in text


def test_the_tables_say_what_was_divided_by_what() -> None:
    def row(contender: str, base: str, over_base: float, phase: str = "later") -> dict[str, Any]:
        return {
            **{"engine": "vllm", "dtype": "float32", "requests": 4, "phase": phase},
            **{"contender": contender, "base": base, "over_base": over_base},
            **{"step_over_base": 1.0, "reused": 0.25, "tokens_per_step": 1.0, "max_row_steps": 9.0},
            **{"num_engine_steps": 9.0, "computed_per_token": 1.0, "seconds": {"p50": 2.0}},
        }

    stock, none = row("stock", "stock", 1.0), row("none", "stock", 1.5)
    about = {"data": "questions", "temperature": 1.0, "max_tokens": 8, "training": {"updates": 2}}
    source = {
        "environment": {"cpu": "C", "cores": 2, "packages": {"torch": "2"}, "commit": "c" * 40},
        "date": "2026-11-30T00:00:00",
    }
    old = {**about, **source, "rows": [stock, none, row("coupled", "none", 0.875)]}
    text = real_table(old)
    assert (
        "Divided are `coupled` over `none`, the same engine, which reuses nothing; "
        "`none` over stock vLLM. `coupled` did not draw the noise of `none`: other texts. "
        "Stock vLLM was not warmed up, the plugin was" in text
    )
    assert "| none (over cold stock) | coupled |" in text
    summary = real_summary_table(old)
    assert "stock" not in summary
    assert "| `Coupled()` | 25% | 0.88 | 1.00 |" in summary

    new = {**old, "stock_is_warm": True}
    new["rows"] = [stock, none, row("same noise", "stock", 1.5), row("both", "same noise", 2.0)]
    text = real_table(new)
    assert (
        "Divided are `both` over `same noise`, the same engine, which reuses nothing and draws the "
        "same noise; `none`, `same noise` over stock vLLM." in text
    )
    assert "other texts" not in text
    assert "warmed" not in text
    assert "| none (over stock) | same noise (over stock) | both |" in text
    assert "| plugin, nothing reused / stock | 25% | 1.50 | 1.00 |" in real_summary_table(new)


def test_stock_is_warmed_up_as_the_engine_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its first call, which is timed, is the first that its engine ever gets."""
    calls: list[tuple[str, int, int]] = []

    class Session:
        def __init__(self, *args: Any, **kw: Any) -> None: ...

        def rollout(self, prompts: Any, group: int, sampling: Any, **kw: Any) -> None:
            calls.append(("engine", len(prompts) * group, sampling.max_tokens))

    def stock(prompts: Any, sampling: Any) -> dict[str, float]:
        calls.append(("stock", len(prompts), sampling.max_tokens))
        return {}

    monkeypatch.setattr(real_rollouts, "RolloutSession", Session)
    monkeypatch.setattr(real_rollouts, "sampling_of", lambda _: SamplingParams(max_tokens=64))
    monkeypatch.setattr(real_rollouts, "questions", lambda data, count: [{}] * count)
    monkeypatch.setattr(real_rollouts, "prompt_ids", lambda rows, model: [[1]] * len(rows))
    monkeypatch.setattr(real_rollouts, "_round", lambda *_: calls.append(("round", 0, 0)))
    args = argparse.Namespace(
        repeats=2, requests=[4], group=2, data=None, old=None, budget=600.0, engine="vllm"
    )
    engine: Any = object()
    served = real_rollouts.Served(engine, lambda _: None, lambda _: None, stock)
    real_rollouts.measure(args, served)
    assert calls == [("engine", 4, 4), ("stock", 4, 4), ("round", 0, 0), ("round", 0, 0)]


def test_where_it_stops_paying() -> None:
    def rows(*speeds: float) -> list[dict[str, Any]]:
        base = {"engine": "vllm", "dtype": "float32", "phase": "later", "contender": "both"}
        sizes = (4, 16, 64)
        pairs = zip(sizes, speeds, strict=True)
        return [{**base, "requests": size, "over_base": speed} for size, speed in pairs]

    def said(*speeds: float) -> tuple[float | None, str]:
        (one,) = bench_real.crossovers(rows(*speeds))
        return one["at"], one["text"]

    assert said(2.0, 1.5, 1.1) == (None, "pays at all sizes (4 to 64 tried)")
    assert said(0.9, 0.8, 0.7) == (None, "pays at no size (4 to 64 tried)")
    assert said(2.0, 1.2, 0.8) == (32.0, "pays up to about 32 requests")
    assert said(0.9, 1.1, 1.2) == (8.0, "pays from about 8 requests")


def test_questions_come_from_the_demo_or_a_file(tmp_path: Path) -> None:
    (row,) = real_policies.questions(None, 1)
    assert row["question"].startswith("I have ")
    assert real_policies.in_words("62 +17 -8 =?\n").startswith(
        "I have 62 marbles. Then I find 17. Then I lose 8. How many"
    )
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "one?", "answer": 1}\n{"question": "two?"}\n')
    assert real_policies.questions(path, 1) == [{"question": "one?", "answer": "1"}]
    with pytest.raises(ValueError, match=r"rows\.jsonl, row 1: expected a question and an answer"):
        real_policies.questions(path, 2)
    with pytest.raises(ValueError, match=r"rows\.jsonl: expected at least 3 rows, got 2"):
        real_policies.questions(path, 3)


def test_an_update_below_bfloat16s_precision_is_lost_or_rounded_up(tmp_path: Path) -> None:
    # Between 1 and 2 bfloat16 has steps of 2**-7: 1.001 is 1 there, 1.006 is 1 + 2**-7.
    for name, values in (("old", [1.0, 1.0]), ("new", [1.001, 1.006])):
        (tmp_path / name).mkdir()
        save_file({"w": torch.tensor(values)}, tmp_path / name / "model.safetensors")
    found = real_policies.rounded_update(tmp_path / "old", tmp_path / "new")
    assert found["norm_float32"] == pytest.approx((1e-6 + 36e-6) ** 0.5, rel=1e-3)
    assert found["norm_bfloat16"] == 2**-7
    assert found["changed_in_bfloat16"] == 0.5
