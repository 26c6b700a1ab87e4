"""A reward for the runs of the tests: how often a letter occurs. It says nothing of interest."""

from __future__ import annotations

from typing import Any


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None, **kwargs: Any
) -> float:
    """Share of the letters of a response that are `ground_truth`."""
    return solution_str.count(ground_truth) / max(len(solution_str), 1)
