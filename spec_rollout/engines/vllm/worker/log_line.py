"""One line now and then about what an engine that proposes by itself gains."""

from __future__ import annotations

import time
from collections.abc import Callable

from spec_rollout.engines.vllm.metrics import ReuseMetrics


class LogLine:
    """Writes at most one line in so many seconds, and none while nothing is generated.

    Args:
        seconds: Between two lines; 0 writes none.
        write: Takes the line.
    """

    clock: Callable[[], float] = staticmethod(time.monotonic)

    def __init__(self, seconds: float, write: Callable[[str], None]) -> None:
        self._seconds = seconds
        self._write = write
        self._last = self.clock()
        self._num_rows = 0  # requests of all steps that gave them something
        self._num_tokens = 0
        self._at_last = (0, 0)  # proposed and accepted tokens

    def step(
        self, num_rows: int, num_tokens: int, metrics: ReuseMetrics, rest: Callable[[], str]
    ) -> None:
        """A step is over.

        Args:
            num_rows: Requests that were given tokens.
            num_tokens: How many, all together.
            metrics: Of the worker.
            rest: Gives the rest of the line.
        """
        if not self._seconds:
            return
        self._num_rows += num_rows
        self._num_tokens += num_tokens
        now = self.clock()
        if now - self._last < self._seconds or not self._num_rows:
            return
        proposed = metrics.num_proposed_tokens + metrics.num_verified_tokens
        accepted = metrics.num_accepted_proposals + metrics.num_accepted_tokens
        new_proposed = proposed - self._at_last[0]
        new_accepted = accepted - self._at_last[1]
        if new_proposed < 0:  # the counters were started anew
            new_proposed, new_accepted = proposed, accepted
        share = f"{new_accepted / new_proposed:.0%}" if new_proposed else "none"
        self._write(
            f"spec_rollout: {self._num_tokens / self._num_rows:.2f} tokens per request and step, "
            f"{share} of {new_proposed:,} proposed tokens accepted; {rest()}"
        )
        self._last = now
        self._num_rows = self._num_tokens = 0
        self._at_last = (proposed, accepted)
