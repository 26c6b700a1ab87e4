"""The benchmark of a model that speaks, on vLLM, as far as the demo's goes."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench_runs import tiny_run


@pytest.mark.slow
def test_every_rule_is_measured_beside_stock_vllm(vllm_installed: None, tmp_path: Path) -> None:
    arguments = ["--engines", "vllm", "--dtypes", "float32", "--requests", "16"]
    arguments += ["--repeats", "1", "--group", "4", "--max-tokens", "16"]
    content = tiny_run("real", tmp_path, *arguments)
    rows = {(row["phase"], row["contender"]): row for row in content["rows"]}
    rules = {"none", "drafting", "same noise", "coupled", "lenient 0", "lenient 0.5", "both"}
    orders = {"as they come", "longest first"}
    assert {name for phase, name in rows if phase == "later"} == {"stock"} | rules | orders
    assert {name for phase, name in rows if phase == "first"} == {"none", "drafting"}
    assert {name for (_, name), row in rows.items() if "over_base" not in row} == orders
    for phase, name, base in (
        ("later", "stock", "stock"),
        ("first", "none", "stock"),
        ("later", "same noise", "stock"),
        ("first", "drafting", "none"),
        ("later", "both", "same noise"),
    ):
        assert rows[phase, name]["base"] == base
    assert rows["later", "stock"]["over_base"] == 1
    for name in ("coupled", "both"):
        tokens = rows["later", name]["num_response_tokens"]
        assert tokens == rows["later", "same noise"]["num_response_tokens"]
    for key in ("num_response_tokens", "reused"):
        assert rows["later", "both"][key] == rows["later", "coupled"][key]
        assert rows["later", "as they come"][key] == rows["later", "longest first"][key]
    assert rows["later", "coupled"]["reused"] > 0
    assert (
        rows["later", "stock"]["max_row_steps"] == rows["later", "none"]["longest_response"] == 16
    )
    assert rows["later", "both"]["max_row_steps"] <= 16
