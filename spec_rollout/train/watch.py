"""What a run says about its own training: that it learns nothing, or repeats itself."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from spec_rollout.rewards.rewards import failures_note

_MOST_IDLE = 20
# More than this share of the different responses were in the cache already.
_MOST_REPEATED = 0.5


class TrainingWatch:
    """Looks at every step, and says each thing once.

    Args:
        name: Of the run.
        steps_per_epoch: Of the data.
        rule: Acceptance rule, as the config names it.
    """

    def __init__(self, name: str, steps_per_epoch: int, rule: str) -> None:
        self._name = name
        self._rule = rule
        self._num_idle = 0
        self._counts: deque[tuple[int, int]] = deque(maxlen=steps_per_epoch)
        self._said_repeated = False

    def idle(self, has_advantage: bool) -> None:
        """Says so after many steps of which nothing was learned."""
        self._num_idle = 0 if has_advantage else self._num_idle + 1
        if self._num_idle == _MOST_IDLE:
            self._say(
                f"no response of the last {_MOST_IDLE} steps had an advantage (all rewards of a "
                "prompt are equal, or skipped): nothing is learned from them"
            )

    def failed(self, when: str, num_failed: int, failures: Sequence[str]) -> None:
        """Says which rewards failed; their responses are left out.

        Args:
            when: The step, or its evaluation.
            num_failed: Responses.
            failures: A line each.
        """
        if num_failed:
            self._say(f"{when}: {failures_note(num_failed, failures)}")

    def repeated(self, row: Mapping[str, Any]) -> None:
        """Says so after an epoch of which most responses were those of the epoch before.

        Args:
            row: Of metrics.jsonl; the first epoch has nothing to repeat.
        """
        if row["epoch"] == 0 or self._said_repeated:
            return
        self._counts.append((row["num_distinct_responses"], row["num_new_responses"]))
        num_distinct, num_new = (sum(column) for column in zip(*self._counts, strict=True))
        if len(self._counts) < (self._counts.maxlen or 0):
            return
        if num_new < (1 - _MOST_REPEATED) * num_distinct:
            self._said_repeated = True
            remedy = (
                "a smaller rollout.log_lenience, or rollout.fresh_share = 0.5, makes it see more"
            )
            if self._rule == "coupled":
                remedy = "rollout.refresh_epochs draws new noise now and then"
            self._say(
                f"of the {num_distinct:,} different responses of the last {len(self._counts)} "
                f"steps {num_distinct - num_new:,} were in the cache already: training repeats "
                f"itself, which costs accuracy; {remedy}"
            )

    def _say(self, text: str) -> None:
        print(f"note: {self._name}: {text}", file=sys.stderr, flush=True)
