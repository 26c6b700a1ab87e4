"""Acceptance rules: how much of a draft is kept, and how the next token is drawn.

Notation, for one row: draft y_1..y_L; q_i = probability of y_i under the policy that drew it; p_i =
probability of y_i under the current policy given the draft prefix. Both are of the *sampling*
distribution (temperature, then top-k, then top-p). Rules are immutable; a `Schedule` turns a
training step into a rule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Literal

import torch

from spec_rollout.checks import integer, of_kind, real


class RuleKind(IntEnum):
    """Rule numbers shared with `csrc/include/spec_rollout/acceptance.h`."""

    LENIENT = 0
    COUPLED = 1
    ONE_HOT = 2


# Of an op's arguments: an enum's conversion at each call costs as much as reading a tensor.
_LENIENT, _COUPLED = int(RuleKind.LENIENT), int(RuleKind.COUPLED)


@dataclass(frozen=True, slots=True)
class AcceptanceRule:
    """Base of all rules; use a subclass."""

    @property
    def kind(self) -> RuleKind:
        """The token test the kernels run."""
        return RuleKind.LENIENT

    @property
    def needs_draft_logprobs(self) -> bool:
        """Whether the test reads q (a draft without stored log-probs is then refused)."""
        return False

    @property
    def uses_drafts(self) -> bool:
        """Whether a draft token can ever be accepted; if not, the rollout leaves the cache
        alone."""
        return True

    @property
    def fresh_noise(self) -> bool:
        """Whether every step needs new noise for the rule's law to hold (true for all but
        `Coupled`)."""
        return True

    @property
    def lossless(self) -> bool:
        """Whether the output law is that of plain sampling, whatever the draft."""
        return False

    @property
    def kernel_params(self) -> tuple[int, float, float, float]:
        """(rule_kind, log_lenience, scale, min_target_prob), as the ops take them."""
        return int(self.kind), 0.0, 1.0, 0.0

    @property
    def needs_rounding(self) -> bool:
        """Whether the engine's rounding has to be measured first (`tolerance="auto"`)."""
        return isinstance(self, Lenient | Coupled) and self.tolerance == "auto"

    def with_tolerance(self, nats: float) -> AcceptanceRule:
        """The rule with this number in the place of `tolerance="auto"`; others stay as they are."""
        if isinstance(self, Lenient | Coupled) and self.needs_rounding:
            return replace(self, tolerance=nats)
        return self

    def cut_lens(self, draft_lens: torch.Tensor, keys: torch.Tensor) -> torch.Tensor | None:
        """Lengths that drafts are cut to *before* verification, or None for "whole".

        Args:
            draft_lens: [batch], integer.
            keys: Noise keys. [batch], int64.
        """
        return None


def _log_lenience(value: float) -> float:
    if math.isnan(number := real("log_lenience", value)):
        raise ValueError("log_lenience: expected a number, got NaN")
    return number


def _tolerance(value: float | Literal["auto"]) -> float | Literal["auto"]:
    if isinstance(value, str):
        if value != "auto":
            raise ValueError(f"tolerance: expected nats or 'auto', got {value!r}")
        return "auto"
    number = real("tolerance", value)
    if not (0.0 <= number < math.inf):
        raise ValueError(f"tolerance: expected a finite number >= 0 of nats, got {value}")
    return number


def _bonus(rule: Lenient | Coupled) -> float:
    """What the test adds to the drafted token's log-probability."""
    if isinstance(rule.tolerance, str):
        raise ValueError(
            "tolerance: expected a number of nats, got 'auto', which a RolloutSession replaces "
            "by the measured rounding of its engine (measure_rounding)"
        )
    return rule.log_lenience + rule.tolerance


def _set(rule: AcceptanceRule | Schedule, **numbers: float | str) -> None:
    """Puts the numbers, as Python's own, in the place of what was given, of whatever library."""
    for name, number in numbers.items():
        object.__setattr__(rule, name, number)


@dataclass(frozen=True, slots=True)
class Lenient(AcceptanceRule):
    """SPEC-RL's test (arXiv 2509.23232, eq. 4): accept y_i iff ln u_i <= scale * (log_lenience + ln
    p_i - ln q_i).

    The token after the accepted prefix is drawn from the full target distribution, not from the
    residual, so the law at one position is min(q, l p) + (1 - sum_v min(q_v, l p_v)) p with l =
    e^log_lenience: biased towards the old policy even at l = 1. `log_lenience=inf` reuses whole
    drafts, `-inf` nothing.

    Attributes:
        log_lenience: Natural-log units; 0 is the standard test, > 0 accepts more.
        scale: Positive factor on the log ratio; 1 is the published rule.
        min_target_prob: A token is also required to have p_i above this. 0 (off) to 1; 0 with
            `log_lenience=inf`, which keeps drafts unseen.
        tolerance: Nats added to `log_lenience` to make up for what rounding loses; "auto" is the
            measured rounding of the engine (`Rounding.tolerance`). At one position the law moves by
            at most 1 - e^(-scale * tolerance) in total variation.
    """

    log_lenience: float = 0.0
    scale: float = 1.0
    min_target_prob: float = 0.0
    tolerance: float | Literal["auto"] = 0.0

    def __post_init__(self) -> None:
        log_lenience = _log_lenience(self.log_lenience)
        scale = real("scale", self.scale)
        if not (0.0 < scale < math.inf):
            raise ValueError(f"scale: expected a positive finite number, got {self.scale}")
        min_target_prob = real("min_target_prob", self.min_target_prob)
        if not (0.0 <= min_target_prob < 1.0):
            raise ValueError(
                f"min_target_prob: expected 0 <= value < 1, got {self.min_target_prob}"
            )
        if min_target_prob > 0.0 and log_lenience == math.inf:
            raise ValueError(
                "min_target_prob: expected 0 with log_lenience=inf, which keeps drafts unseen, got "
                f"{self.min_target_prob}"
            )
        _set(self, log_lenience=log_lenience, scale=scale, min_target_prob=min_target_prob)
        _set(self, tolerance=_tolerance(self.tolerance))

    @property
    def needs_draft_logprobs(self) -> bool:
        return math.isfinite(self.log_lenience)

    @property
    def uses_drafts(self) -> bool:
        return self.log_lenience > -math.inf

    @property
    def kernel_params(self) -> tuple[int, float, float, float]:
        return _LENIENT, _bonus(self), self.scale, self.min_target_prob


@dataclass(frozen=True, slots=True)
class Coupled(AcceptanceRule):
    """Replay under the same keyed Gumbel noise: accept y_i iff it is argmax_v(logit_v / T + g(key,
    position, v)).

    Lossless at `log_lenience = 0`: the output is what plain sampling with that noise gives,
    whatever the draft was. With `log_lenience > 0` the drafted token gets that bonus in the argmax,
    which biases towards the draft. Needs no stored probabilities. Across epochs the noise must stay
    the same for drafts to be re-accepted, so it is refreshed only every `refresh_epochs` (an option
    of the rollout, not of the rule).

    Attributes:
        log_lenience: Bonus of the drafted token in nats; greater than -inf.
        tolerance: Nats added to it, so that rounding alone rejects fewer near-ties; "auto" is the
            measured rounding of the engine (`Rounding.tolerance`), which is 0 where results do not
            depend on the batch. At one position the law is at most 1 - e^(-tolerance) from plain
            sampling's in total variation.
    """

    log_lenience: float = 0.0
    tolerance: float | Literal["auto"] = 0.0

    def __post_init__(self) -> None:
        log_lenience = _log_lenience(self.log_lenience)
        if log_lenience == -math.inf:
            raise ValueError(
                "log_lenience: expected > -inf, got -inf, which would forbid the drafted token; "
                "for plain generation use NoReuse()"
            )
        _set(self, log_lenience=log_lenience, tolerance=_tolerance(self.tolerance))

    @property
    def kind(self) -> RuleKind:
        return RuleKind.COUPLED

    @property
    def fresh_noise(self) -> bool:
        return False

    @property
    def lossless(self) -> bool:
        return self.log_lenience == 0.0 and self.tolerance == 0.0

    @property
    def kernel_params(self) -> tuple[int, float, float, float]:
        return _COUPLED, _bonus(self), 1.0, 0.0


@dataclass(frozen=True, slots=True)
class OneHot(AcceptanceRule):
    """Lossless for any draft: accept y_i with probability p_i, else draw from p without y_i.

    Speculative sampling (Leviathan et al., 2023) with a drafter that puts all its mass on y_i.
    """

    @property
    def kind(self) -> RuleKind:
        return RuleKind.ONE_HOT

    @property
    def lossless(self) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class RandomReuse(AcceptanceRule):
    """Baseline: with probability `prob` a whole draft is reused unseen, else nothing of it."""

    prob: float = 0.5

    def __post_init__(self) -> None:
        prob = real("prob", self.prob)
        if not (0.0 <= prob <= 1.0):
            raise ValueError(f"prob: expected 0 <= value <= 1, got {self.prob}")
        _set(self, prob=prob)

    @property
    def kernel_params(self) -> tuple[int, float, float, float]:
        return _LENIENT, math.inf, 1.0, 0.0

    def cut_lens(self, draft_lens: torch.Tensor, keys: torch.Tensor) -> torch.Tensor | None:
        return torch.where(
            _row_uniforms(keys) < self.prob, draft_lens, torch.zeros_like(draft_lens)
        )


@dataclass(frozen=True, slots=True)
class RandomCut(AcceptanceRule):
    """Baseline: each draft is cut at a uniform length in 0..L (SPEC-RL, Table 2) and kept unseen up
    to there."""

    @property
    def kernel_params(self) -> tuple[int, float, float, float]:
        return _LENIENT, math.inf, 1.0, 0.0

    def cut_lens(self, draft_lens: torch.Tensor, keys: torch.Tensor) -> torch.Tensor | None:
        lens = torch.floor(_row_uniforms(keys) * (draft_lens + 1).double()).to(draft_lens.dtype)
        return torch.minimum(lens, draft_lens)


@dataclass(frozen=True, slots=True)
class NoReuse(AcceptanceRule):
    """Plain generation: drafts are ignored."""

    @property
    def uses_drafts(self) -> bool:
        return False

    @property
    def lossless(self) -> bool:
        return True

    @property
    def kernel_params(self) -> tuple[int, float, float, float]:
        return int(RuleKind.LENIENT), -math.inf, 1.0, 0.0

    def cut_lens(self, draft_lens: torch.Tensor, keys: torch.Tensor) -> torch.Tensor | None:
        return torch.zeros_like(draft_lens)


def _row_uniforms(keys: torch.Tensor) -> torch.Tensor:
    """One uniform in [0, 1) per row, from the keys' own bits mixed once more (never shared with a
    token draw)."""
    from spec_rollout.keys import mix64

    bits = mix64(keys.cpu().numpy().view("uint64") ^ 0xD1B54A32D192ED03)
    return torch.from_numpy((bits >> 11).astype("float64") * 2.0**-53).to(keys.device)


@dataclass(frozen=True, slots=True)
class Schedule:
    """Linear schedule of a rule's `log_lenience` over training steps.

    Attributes:
        rule: The rule at and after `num_steps`.
        start_log_lenience: Value at step 0; None keeps the rule constant.
        num_steps: Steps over which the value moves to `rule.log_lenience`.
    """

    rule: AcceptanceRule
    start_log_lenience: float | None = None
    num_steps: int = 0

    def __post_init__(self) -> None:
        of_kind("rule", self.rule, AcceptanceRule, "an acceptance rule such as Lenient(0.0)")
        num_steps = integer("num_steps", self.num_steps)
        if self.start_log_lenience is not None:
            start = real("start_log_lenience", self.start_log_lenience)
            if not isinstance(self.rule, (Lenient, Coupled)):
                raise ValueError(
                    "start_log_lenience: expected a rule with log_lenience (Lenient, Coupled), "
                    f"got {type(self.rule).__name__}"
                )
            if not (math.isfinite(start) and math.isfinite(self.rule.log_lenience)):
                raise ValueError(
                    "start_log_lenience: expected finite ends to interpolate between, "
                    f"got {self.start_log_lenience} and {self.rule.log_lenience}"
                )
            if num_steps < 1:
                raise ValueError(f"num_steps: expected at least 1, got {self.num_steps}")
            _set(self, start_log_lenience=start)
        _set(self, num_steps=num_steps)

    def at(self, step: int) -> AcceptanceRule:
        """The rule to use at training step `step` (0-based)."""
        step = integer("step", step)
        if self.start_log_lenience is None or step >= self.num_steps:
            return self.rule
        assert isinstance(self.rule, (Lenient, Coupled))
        mix = step / self.num_steps
        value = (1 - mix) * self.start_log_lenience + mix * self.rule.log_lenience
        return replace(self.rule, log_lenience=value)
