"""What steps take, and what is learnt from it about proposing."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

from spec_rollout.drafting import Payoff
from spec_rollout.engines.vllm.metrics import ReuseMetrics
from spec_rollout.engines.vllm.worker.request_state import Row

# With fewer of the requests than this share running, a rollout call is in its tail.
_TAIL_SHARE = 0.1


class Counted(Protocol):
    """Whose steps are timed (`sampling.record.Record` is one).

    Attributes:
        metrics: Counters.
        num_kept: Tokens of proposals kept in this step; set back to 0 after it.
        history: What is proposed from, None where nothing is.
    """

    num_kept: int

    @property
    def metrics(self) -> ReuseMetrics: ...

    @property
    def history(self) -> Any: ...


class StepTimes:
    """Counts and times the steps of a worker.

    Args:
        record: Whose steps.

    Attributes:
        payoff: What was learnt; it lives as long as the engine.
        clock: Seconds; what a step takes is the difference of two readings.
    """

    # What is proposed depends on it. Tests that count proposals or steps set a clock of their own.
    clock: Callable[[], float] = staticmethod(time.perf_counter)

    def __init__(self, record: Counted) -> None:
        self.payoff = Payoff()
        self._record = record
        self._num_requests = 0  # of the rollout call, where known
        self._is_decode = False
        self._in_tail = False
        self._end: float | None = None  # of the last step
        self._work: tuple[int, int] | None = None  # requests and further tokens of this step

    def begin(self, num_requests: int) -> None:
        """A rollout call of so many requests begins."""
        self._num_requests = num_requests
        if self._record.history is not None:
            self.payoff.begin()
        self._end = None

    def count(self, num_tokens: int, num_logits: int, rows: list[Row | None]) -> None:
        """A step in which the model computed `num_tokens` tokens, and logits after `num_logits`."""
        num_requests = len(rows)
        is_decode = num_tokens == num_logits and (
            num_tokens == num_requests or not any(row is not None and row.alive for row in rows)
        )
        metrics = self._record.metrics
        metrics.num_engine_steps += 1
        metrics.num_computed_tokens += num_tokens
        metrics.num_decode_steps += is_decode
        # Prefill is another kind of work: from its steps nothing is learnt about decoding.
        is_learnt = num_tokens == num_logits
        self._work = (num_requests, num_tokens - num_requests) if is_learnt else None
        self._is_decode = is_decode
        self._in_tail = is_decode and num_requests < _TAIL_SHARE * self._num_requests
        metrics.num_tail_steps += self._in_tail

    def end_step(self) -> None:
        """The step's tokens are sampled and the next one's proposals made.

        A step takes from the end of the one before to its own, scheduling and all.
        """
        record, now = self._record, self.clock()
        if self._end is not None:
            seconds = now - self._end
            if self._in_tail:
                record.metrics.tail_seconds += seconds
            if record.history is not None and self._work is not None:
                rows, extra = self._work
                gained = record.num_kept if self._is_decode else None
                self.payoff.observe(rows, extra, seconds, gained)
        record.num_kept = 0
        self._end = now
