"""Rows of unequal length, end to end."""

from __future__ import annotations

import numpy as np


def ranges(counts: np.ndarray) -> np.ndarray:
    """0..counts[0]-1, 0..counts[1]-1, ... end to end. [n], int64 -> [sum(counts)], int64."""
    return np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
