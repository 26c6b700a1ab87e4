"""Checks what an engine tells the drafter about the noise of its requests."""

from __future__ import annotations

import numpy as np
import pytest

from spec_rollout.drafting import HistoryDrafter


class NoiseWatch:
    """From now on every proposal is asked for with the request's key, and the position after all
    the tokens given before.

    Attributes:
        keys: Of the requests. [batch], int64; None where no noise may be looked at.
        asked: Requests that proposals were asked for.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, keys: np.ndarray) -> None:
        self.keys: np.ndarray | None = keys
        self.asked: set[int] = set()
        known = np.zeros(keys.size, np.int64)
        extend, propose = HistoryDrafter.extend, HistoryDrafter.propose

        def extended(drafter, rows, token_ids, lens, *args):
            np.add.at(known, rows, lens)
            extend(drafter, rows, token_ids, lens, *args)

        def proposed(drafter, rows, *args, keys, positions, with_noise=None, **kwargs):
            if self.keys is None:
                assert keys is None or (with_noise is not None and not with_noise.any())
            else:
                assert with_noise is None or with_noise.all()
                np.testing.assert_array_equal(keys, self.keys[rows])
                np.testing.assert_array_equal(positions, known[rows])
            self.asked.update(rows.tolist())
            noise = {"keys": keys, "positions": positions, "with_noise": with_noise}
            return propose(drafter, rows, *args, **noise, **kwargs)

        monkeypatch.setattr(HistoryDrafter, "extend", extended)
        monkeypatch.setattr(HistoryDrafter, "propose", proposed)
