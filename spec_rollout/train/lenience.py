"""Lenience that holds a budget: a controller over training steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from spec_rollout.acceptance import Lenient
from spec_rollout.config.rollouts import RolloutConfig
from spec_rollout.counters import RolloutStats

# Share of the newest step in the estimate: steps differ by their prompts.
_NEWEST = 0.5


class LenienceController:
    """Moves `log_lenience` so that what reuse costs, or gives, stays at a target.

    After each step with drafts the budget's ratio (`RolloutStats`) goes into a running estimate x.
    Then log_lenience moves by gain * (target - x) / target, at most by the gain, within its range;
    where more lenience makes the ratio smaller (`new_per_prompt`), the other way. A change of
    lenience shows in the next step already, so this needs no model of how it works.

    Args:
        config: With a `lenience_budget`.
    """

    def __init__(self, config: RolloutConfig) -> None:
        rule = config.acceptance()
        assert isinstance(rule, Lenient)
        assert config.lenience_budget is not None
        assert config.lenience_target is not None
        self._rule = rule
        self._budget: str = config.lenience_budget
        self._target = config.lenience_target
        self._gain = config.lenience_gain
        self._range = config.lenience_range
        self._log_lenience = self._within(rule.log_lenience)
        self._estimate: float | None = None

    @property
    def rule(self) -> Lenient:
        """For the next step."""
        return replace(self._rule, log_lenience=self._log_lenience)

    @property
    def estimate(self) -> float | None:
        """Of the budget's ratio; None before there was a draft."""
        return self._estimate

    def observe(self, stats: RolloutStats) -> None:
        """Takes a step's counts in; without drafts they say nothing."""
        if stats.num_drafts == 0:
            return
        value = float(getattr(stats, self._budget))
        if self._estimate is not None:
            value = _NEWEST * value + (1 - _NEWEST) * self._estimate
        self._estimate = value
        error = (self._target - value) / self._target
        if self._budget == "new_per_prompt":
            error = -error
        self._log_lenience = self._within(
            self._log_lenience + self._gain * max(-1.0, min(1.0, error))
        )

    def state(self) -> dict[str, float]:
        """For a checkpoint."""
        state = {"log_lenience": self._log_lenience}
        return state if self._estimate is None else {**state, "estimate": self._estimate}

    def restore(self, state: Mapping[str, float]) -> None:
        """Goes on from a `state`; an empty one is the beginning."""
        if state:
            self._log_lenience = self._within(state["log_lenience"])
            self._estimate = state.get("estimate")

    def _within(self, value: float) -> float:
        low, high = self._range
        return max(low, min(high, value))
