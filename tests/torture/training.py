"""Whole training runs, killed and resumed until they are through."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from children import Child, run
from faults import Outcome, Say
from tiny_runs import save_tiny_model

from spec_rollout.config.sections import RunConfig
from spec_rollout.config.toml import from_dict
from spec_rollout.train import trainer

_STEPS = 6


def config_of(folder: Path) -> RunConfig:
    """A run of a second: a checkpoint each step, rollouts on disk under a bound that evicts."""
    save_tiny_model(folder / "model")
    rows = [{"prompt": f"{a} {b} =?\n", "answer": str(a + b)} for a in range(3) for b in range(2)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return from_dict(
        {
            "model": {"path": str(folder / "model"), "device": "cpu"},
            "data": {"path": str(folder / "rows.jsonl")},
            "rollout": {
                **{"num_samples": 4, "max_tokens": 12, "num_slots": 8, "rule": "lenient"},
                **{"log_lenience": 0.5, "cache_store": "disk", "cache_max_bytes": 9000},
            },
            "reward": {"functions": ["tiny_runs:count_digits"]},
            "train": {"prompts_per_step": 3, "epochs": _STEPS // 2, "lr": 3e-3, "kl_coef": 0.0},
            "eval": {"num_train_prompts": 4, "num_samples": 2, "correct_at": 0.5},
            "checkpoint": {"every_steps": 1, "keep_last": 2},
            "log": {"run_dir": str(folder / "run"), "progress": "off"},
        }
    )


def left_by(run_dir: Path) -> list[Mapping[str, Any]]:
    """Rows of a run without the times it took."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if not k.endswith("_seconds")} for row in rows]


def kill_while_training(folder: Path, times: int, seed: int = 0) -> Outcome:
    """SIGKILL at random moments of training; what is resumed comes to the same rows.

    Rows have rewards, lengths, what was reused, losses and norms of gradients: any draft that was
    lost, and any weight that is another, changes them. Lost counts rows that differ.
    """
    outcome, rng = Outcome("kill -9 while training, resumed"), random.Random(seed)
    torch.set_num_threads(1)
    folder.mkdir(parents=True)
    config = config_of(folder)
    # Once here, so that children, which are forks, need not import what a run imports.
    start = time.perf_counter()
    trainer.run(config)
    run_dir = Path(config.log.run_dir)
    expected = left_by(run_dir)
    assert len(expected) == _STEPS + 1
    shutil.rmtree(run_dir)
    whole = replace(config, log=replace(config.log, run_dir=str(folder / "timed")))
    start = time.perf_counter()
    trainer.run(whole)
    seconds = time.perf_counter() - start

    def work(say: Say) -> None:
        if (run_dir / "config.toml").exists():
            trainer.resume(run_dir)
        else:
            shutil.rmtree(run_dir, ignore_errors=True)
            trainer.run(config)
        say(_differing(left_by(run_dir), expected))

    while outcome.tried < times:
        child = Child(work)
        time.sleep(rng.random() * seconds * 0.6)
        child.kill()
        killed = child.end()
        if killed.said or killed.error:  # it was through before, or failed
            shutil.rmtree(run_dir)
        outcome.count(None, sum(killed.said), killed)
    ended = run(work)
    outcome.lost += ended.said[0] if ended.said else len(expected)
    if ended.error:
        outcome.survived -= 1
        outcome.notes += (ended.error.strip().splitlines()[-1],)
    return outcome


def _differing(found: list[Mapping[str, Any]], expected: list[Mapping[str, Any]]) -> int:
    same = sum(a == b for a, b in zip(found, expected, strict=False))
    return max(len(found), len(expected)) - same
