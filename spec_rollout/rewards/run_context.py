"""What reward functions may ask of a run and tell it: what TRL's trainer hands to its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is; the attributes of transformers' `TrainerState` that rewards read.

    Attributes:
        global_step: Updates done.
        max_steps: Of the whole run.
        epoch: Passes over the data begun before this one.
    """

    global_step: int = 0
    max_steps: int = 0
    epoch: float = 0.0


@dataclass(frozen=True, slots=True)
class RunContext:
    """What the functions of one call get beside the responses.

    Attributes:
        progress: How far the run is.
        logged: What they logged, by name.
    """

    progress: Progress = field(default_factory=Progress)
    logged: dict[str, list[float]] = field(default_factory=dict)

    def log_metric(self, name: str, value: float) -> None:
        """Notes a figure; the step's row has the mean of all of a name."""
        self.logged.setdefault(str(name), []).append(float(value))

    def log_extra(self, column: str, values: Any) -> None:
        """For a table of completions, which TRL prints and this trainer does not."""


FROM_RUN: Mapping[str, Callable[[RunContext], Any]] = {
    "trainer_state": lambda context: context.progress,
    "log_metric": lambda context: context.log_metric,
    "log_extra": lambda context: context.log_extra,
}
