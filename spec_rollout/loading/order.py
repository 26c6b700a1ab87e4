"""The order in which training sees its prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class PromptOrder:
    """Which rows a step sees: a pure function of (seed, step), so a resumed run needs no stored
    position.

    Every row comes once per epoch; the last step of an epoch takes what is left.

    Args:
        num_rows: Rows of the data.
        prompts_per_step: Rows per step.
        seed: Of the shuffles.
        shuffle: New order each epoch; otherwise file order.
    """

    def __init__(
        self, num_rows: int, prompts_per_step: int, *, seed: int, shuffle: bool = True
    ) -> None:
        if num_rows < 1 or prompts_per_step < 1:
            raise ValueError(
                f"num_rows, prompts_per_step: expected at least 1, got {num_rows}, "
                f"{prompts_per_step}"
            )
        self._num_rows = num_rows
        self._per_step = prompts_per_step
        self._seed = seed % 2**63
        self._shuffle = shuffle
        # Rows of the epoch asked for last: shuffling takes long where there are many.
        self._of_epoch = (-1, np.arange(0))

    @property
    def steps_per_epoch(self) -> int:
        return -(-self._num_rows // self._per_step)

    def epoch_of(self, step: int) -> int:
        """Epoch (0-based) of a step (0-based)."""
        return step // self.steps_per_epoch

    def rows_of(self, step: int) -> Sequence[int]:
        """Row indices of a step (0-based)."""
        epoch, index = divmod(step, self.steps_per_epoch)
        last, order = self._of_epoch
        if last != epoch:
            order = np.arange(self._num_rows)
            if self._shuffle:
                order = np.random.default_rng((self._seed, epoch)).permutation(self._num_rows)
            self._of_epoch = (epoch, order)
        return order[index * self._per_step : (index + 1) * self._per_step].tolist()
