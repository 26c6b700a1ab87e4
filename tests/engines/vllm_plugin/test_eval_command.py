"""`spec-rollout eval --engine vllm`: the same responses with drafting, and those of either engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("even_steps")]


def test_drafting_changes_no_response_and_engines_agree(tmp_path: Path) -> None:
    from spec_rollout import cli
    from spec_rollout.demo import model_dir
    from spec_rollout.demo.task import heldout_problems, write_jsonl

    write_jsonl(heldout_problems(3), tmp_path / "heldout.jsonl")

    def responses(name: str, *options: str) -> tuple[list[Any], dict[str, Any]]:
        out, rows = tmp_path / f"{name}.json", tmp_path / f"{name}.jsonl"
        argv = ["eval", "--model", str(model_dir()), "--prompts", str(tmp_path / "heldout.jsonl")]
        argv += ["--reward", "spec_rollout.demo.task:reward", "--max-tokens", "120", *options]
        argv += ["--num-samples", "4", "--top-p", "1", "--num-slots", "8"]
        assert cli.main([*argv, "--out", str(out), "--responses", str(rows)]) == 0
        return [json.loads(line) for line in rows.open()], json.loads(out.read_text())

    plain, _ = responses("plain", "--engine", "vllm")
    drafted, content = responses("drafted", "--engine", "vllm", "--drafting")
    assert plain == drafted
    assert len(plain) == 12
    assert content["settings"]["engine"] == "VLLMEngine"
    # Other kernels round otherwise, which decides a draw now and then.
    embedded, _ = responses("embedded")
    same = sum(a["response"] == b["response"] for a, b in zip(plain, embedded, strict=True))
    assert same >= 10
