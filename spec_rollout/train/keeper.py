"""When a run's checkpoints are written, and what is in them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from spec_rollout.cache import DiskStore
from spec_rollout.config.sections import CheckpointConfig
from spec_rollout.train.checkpoint import list_checkpoints, save_checkpoint
from spec_rollout.train.components import Components
from spec_rollout.train.state import age_of
from spec_rollout.train.tensors import rng_state

# Writing takes at most this share of a run's time, unless it is asked for by steps.
_SHARE = 1 / 20


class CheckpointKeeper:
    """Writes the checkpoints of a run.

    Args:
        config: See `CheckpointConfig`.
        root: Their folder.
        parts: Of the run.
        clock: Gives seconds.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        root: Path,
        parts: Components,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._root = root
        self._parts = parts
        self._clock = clock
        self._last = clock()
        self._seconds = 0.0
        self._rng = rng_state()

    def mark(self) -> None:
        """Notes the random states of now; to be called where what comes next is done again if it
        fails. Rewards may draw from them."""
        self._rng = rng_state()

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after this step."""
        every = self._config.every_steps
        if every is not None and step > 0 and step % every == 0:
            return True
        minutes = self._config.every_minutes
        if minutes is None:
            return False
        return self._clock() - self._last >= max(60 * minutes, self._seconds / _SHARE)

    def save(
        self,
        step: int,
        pending_row: dict[str, Any] | None,
        *,
        at_mark: bool = False,
        prune: bool = True,
    ) -> Path:
        """Writes a checkpoint.

        Args:
            step: Updates done.
            pending_row: See `TrainState`.
            at_mark: With the random states of the last `mark`.
            prune: Remove older ones, as the config says.
        """
        parts, start = self._parts, self._clock()
        folder = save_checkpoint(
            self._root,
            replace(
                parts.state,
                step=step,
                pending_row=pending_row,
                lenience={} if parts.lenience is None else parts.lenience.state(),
                rounding=parts.rounding_state(),
            ),
            model=parts.policy.model,
            tokenizer=parts.policy.tokenizer,
            optimizer=parts.optimizer,
            cache=parts.cache,
            store=parts.store.inner if isinstance(parts.store.inner, DiskStore) else None,
            value_head=parts.value_head,
            keep_last=self._config.keep_last if prune else None,
            rng=self._rng if at_mark else None,
        )
        self._last = self._clock()
        self._seconds = self._last - start
        return folder

    def newest(self) -> int | None:
        """Step of the newest checkpoint; None if there is none."""
        found = list_checkpoints(self._root)
        age = age_of(found[-1]) if found else None
        return None if age is None else age[0]
