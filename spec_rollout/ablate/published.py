"""Published figures that a grid's results are shown beside, for their shape.

SPEC-RL, arXiv 2509.23232: eight H100s, verl with vLLM, DeepMath-6K, 1,024 prompts of 8 rollouts a
step, responses of up to 4,096 tokens, 90 steps (15 epochs). Speed-ups are those of the rollout
stage as published, without verification.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class PublishedRun:
    """One line of a published table.

    Attributes:
        speedup: Of rollouts.
        tokens_m: Millions of generated tokens.
        accuracy: Average over the benchmarks, percent.
    """

    speedup: float
    tokens_m: float
    accuracy: float


PLAIN = PublishedRun(1.00, 554.8, 46.7)
# Table 3: Qwen3-1.7B-Base, GRPO, by log_lenience.
LENIENCE = {
    0.0: PublishedRun(1.22, 419.1, 46.6),
    0.2: PublishedRun(1.86, 246.7, 47.3),
    0.5: PublishedRun(2.29, 182.7, 48.0),
    0.8: PublishedRun(2.64, 144.8, 46.4),
    1.0: PublishedRun(2.91, 123.0, 45.4),
    2.0: PublishedRun(3.05, 114.4, 41.5),
    math.inf: PublishedRun(14.86, 40.0, 40.1),
}
# Table 2, the same setting: each draft is cut at a uniform place.
RANDOM_CUT = PublishedRun(2.35, 304.5, 43.1)

# Table 1, with the times of Table 13: what an algorithm saves. Speed-ups of rollouts as claimed, of
# rollouts with verification and assembly counted, of the whole step; tokens in millions and
# accuracy in percent without and with reuse.
ALGORITHMS: tuple[tuple[str, str, float, float, float, float, float, float, float], ...] = (
    ("Qwen3-1.7B-Base", "grpo", 2.29, 1.95, 1.46, 554.8, 182.7, 46.7, 48.0),
    ("Qwen3-1.7B-Base", "ppo", 1.94, 1.69, 1.31, 565.1, 230.8, 45.3, 45.4),
    ("Qwen3-1.7B-Base", "dapo", 2.17, 1.87, 1.40, 543.1, 171.6, 42.1, 42.0),
    ("Qwen3-8B-Base", "grpo", 2.51, 2.01, 1.51, 1033.1, 336.6, 68.3, 68.5),
    ("Qwen3-8B-Base", "ppo", 1.94, 1.60, 1.29, 984.0, 400.1, 67.1, 67.5),
    ("Qwen3-8B-Base", "dapo", 2.88, 2.37, 1.88, 1052.2, 326.2, 66.3, 66.3),
    ("LLaMA-3.2-1B-Instruct", "grpo", 2.60, 2.15, 1.40, 553.9, 162.5, 18.7, 19.2),
    ("LLaMA-3.2-1B-Instruct", "ppo", 2.01, 1.71, 1.27, 521.5, 210.6, 21.4, 21.3),
    ("LLaMA-3.2-1B-Instruct", "dapo", 2.48, 2.10, 1.38, 482.6, 123.1, 19.6, 21.2),
)


def published_run(changes: dict[str, Any] | Any) -> PublishedRun | None:
    """The published run that a variant's changes are those of, if there is one."""
    rule = changes.get("rollout.rule")
    special = any(
        changes.get(f"rollout.{key}") not in off
        for key, off in (
            ("fresh_share", (0.0, None)),
            ("max_age", ("none", None)),
            ("lenience_budget", ("none", None)),
            ("start_log_lenience", ("none", None)),
            ("drafting", (False, None)),
            ("tolerance", (0.0, None)),
        )
    )
    if special:
        return None
    if rule == "none":
        return PLAIN
    if rule == "random_cut":
        return RANDOM_CUT
    if rule == "lenient":
        lenience = changes.get("rollout.log_lenience")
        return LENIENCE.get(lenience) if isinstance(lenience, float) else None
    return None
