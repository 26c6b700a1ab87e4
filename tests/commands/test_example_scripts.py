"""The launch scripts: a pair that is one run with and without reuse, here of a tiny model; and what
all find from a checkout."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
VANILLA = EXAMPLES / "vanilla-grpo" / "1.7B-grpo.sh"
SPEC = EXAMPLES / "spec-rl" / "1.7B-grpo-lenience-0.5.sh"
VERL = EXAMPLES / "verl_grpo.sh"
# Of the machine and the task; what is left is the run as it stands.
TINY = {
    "model.device": "cpu",
    "rollout.engine": "transformers",
    "rollout.num_samples": "4",
    "rollout.max_tokens": "24",
    "reward.functions": '["spec_rollout.demo.task:reward"]',
    "train.prompts_per_step": "3",
    "train.epochs": "2",
    "train.lr": "1e-4",
    "train.threads": "1",
    "eval.every_steps": "none",
    "eval.num_train_prompts": "3",
    "log.progress": "off",
}


def settings_of(script: Path) -> dict[str, str]:
    return dict(re.findall(r"--set ([\w.]+)=(\"[^\"]*\"|[\w.]+)", _commands(script)))


def _commands(script: Path) -> str:
    return "\n".join(x for x in script.read_text().splitlines() if not x.startswith("#"))


def test_they_differ_in_the_rule_and_the_folder_alone() -> None:
    vanilla, spec = settings_of(VANILLA), settings_of(SPEC)
    differ = {k for k in vanilla | spec if vanilla.get(k) != spec.get(k)}
    assert differ == {"rollout.rule", "rollout.log_lenience", "log.run_dir"}
    assert spec["rollout.log_lenience"] == "0.5"


@pytest.mark.parametrize("script", [VANILLA, SPEC])
def test_they_run_the_installed_package_and_not_that_of_the_current_folder(
    script: Path, tmp_path: Path
) -> None:
    (tmp_path / "spec_rollout").mkdir()
    (tmp_path / "spec_rollout" / "__init__.py").write_text("raise SystemExit('a checkout')")
    done = subprocess.run(
        ["bash", str(script), "--help"],
        cwd=tmp_path, env={**os.environ, "PYTHON": sys.executable},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "--resume" in done.stdout


def test_verl_does_not_run_in_the_checkout(tmp_path: Path) -> None:
    # Beside other things it says where it is: Ray's workers look for modules there.
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$PWD" "$@"\n')
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", str(VERL), "trainer.total_epochs=5"],
        cwd=EXAMPLES.parent,
        env={
            **os.environ,
            "CPU": "0",
            "PYTHON": os.path.relpath(python, EXAMPLES.parent),
            "MODEL": "Qwen/Qwen3-1.7B",
            "DATA": "examples/tiny.toml",
            "WORK": str(tmp_path / "work"),
        },
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder, *arguments = done.stdout.splitlines()
    assert folder == str((tmp_path / "work").resolve())
    assert arguments[:2] == ["-m", "verl.trainer.main_ppo"]
    assert "actor_rollout_ref.model.path=Qwen/Qwen3-1.7B" in arguments  # of the hub
    assert f"data.train_files={EXAMPLES / 'tiny.toml'}" in arguments
    assert arguments[-1] == "trainer.total_epochs=5"


def launch(script: Path, model_dir: Path, data: Path, run_dir: Path, *more: str) -> list[dict]:
    """Rows of metrics.jsonl of a run by a script."""
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "MODEL_PATH": str(model_dir),
        "DATA_PATH": str(data),
        "SAVE_PATH": str(run_dir),
    }
    overrides = [x for pair in TINY.items() for x in ("--set", "=".join(pair))]
    done = subprocess.run(
        ["bash", str(script), *overrides, *more],
        env=environment, capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_both_run_on_a_tiny_model(model_dir: Path, write_rows, tmp_path: Path) -> None:
    data = write_rows(
        [{"prompt": f"{a} {b} =?\n", "answer": str(a + b)} for a in range(3) for b in range(2)]
    )
    vanilla = launch(VANILLA, model_dir, data, tmp_path / "vanilla")
    spec = launch(SPEC, model_dir, data, tmp_path / "spec", "--set", "model.lora_rank=2")
    for rows in (vanilla, spec):
        assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert all(row["reused_fraction"] == 0 for row in vanilla[1:])
    assert spec[-1]["reused_fraction"] > 0.3
    # bfloat16 arithmetic in the trainer, float32 in this engine.
    assert 0 < spec[1]["logprob_gap"] < 0.05
