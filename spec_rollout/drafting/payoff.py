"""Whether proposing pays, decided anew for each step by what its proposals promise."""

from __future__ import annotations

from spec_rollout.drafting.step_cost import StepCost

_FORGET = 0.9  # what passed, per step with proposals
_FORGET_UNUSED = 0.95  # and per step whose proposals were not used
_PRIOR_TOKENS = 4.0  # for which the drafter's word is taken
# What is remembered of what passed: as many tokens as in so many steps like the last, and so many.
_TRUST_STEPS, _TRUST_TOKENS = 3.0, 16.0
_FORGET_PRICE = 0.95  # what tokens took, per step
_MOST_PER_ROW = 6.0  # tokens of a step that count
_PLAIN_STEPS = 2.0  # for which tokens are taken to cost what they do without proposals
# A probability, while it is not known what proposed tokens take.
_FIRST_GUESS = 0.5
# Steps in a row without proposals worth it, after which one is not looked at before the next; for
# each as many steps more, another.
_PATIENCE = 8
_MAX_WAIT = 4
# Steps after which proposals are tried that are not thought worth it; twice as many each time.
_TRIAL_TOKENS = 8
_FIRST_TRIAL, _LAST_TRIAL = 16, 512
_DOUBTFUL_STEPS = 2  # with proposals, after a trial that showed that costs were wrong


class Payoff:
    """Decides which proposals are worth computing.

    A token that is not given now has to be given later. What that takes is taken to be what tokens
    take now: of the last steps, the seconds over those of a step without proposals, divided by the
    tokens they gave a row; at first, of steps without proposals. A step in which whole drafts
    passed says little of those that follow, and counts as part of one. So one more token pays if it
    passes with a probability of at least

        threshold = seconds per proposed token / seconds per token

    and a step should have proposals if

        expected tokens * trust * seconds per token > seconds that they add

    their fixed part included. The drafter says how many tokens are expected to pass. Trust is the
    share of the expected tokens that passed in the last steps.

    What steps cost is kept as long as the engine lives (`StepCost`). What proposals were good for
    is forgotten when the history changes, and soon anyway where they are not used. So when there is
    more to propose, the next steps have it.

    What a step takes is measured on a machine that does other things, too, so what was learned may
    be wrong, and would never be corrected where nothing is proposed. So now and then a few tokens
    are proposed against it: after 16 steps first, then after twice as many each time, until
    proposals are worth it again. Where that shows that it was wrong, the next steps have more.

    Asking the drafter takes time, too. Where its proposals have not been worth it for many steps,
    it is asked in one step of up to five.

    It reads no clock: the engine says what each step took.

    Args:
        cost: What steps cost, learned so far. None knows nothing.
    """

    def __init__(self, cost: StepCost | None = None) -> None:
        self.cost = StepCost() if cost is None else cost
        self._trial_gap = self._until_trial = _FIRST_TRIAL  # steps
        self._was_tried = False  # since proposals were worth it
        self._is_trial = False  # the next step has proposals that are not thought worth it
        self._num_doubtful = 0  # steps with proposals that are to show what they cost
        self.begin()

    def begin(self) -> None:
        """The history has changed, as when a rollout call begins: what proposals were good for is
        forgotten."""
        self._lately_steps = self._lately_tokens = 0.0  # as long as plain ones; of each row
        self._expected = self._accepted = 0.0
        self._refused = 0  # steps in a row
        self._wait = 0  # steps

    def observe(self, rows: int, proposed: int, seconds: float, accepted: int | None) -> None:
        """Adds a step.

        Args:
            rows: Requests in the batch, >= 1.
            proposed: Tokens computed beyond one per row.
            seconds: What the step took.
            accepted: How many of `proposed` were kept; None where they were not all proposals.
        """
        if self.cost.observe(rows, proposed, seconds, is_trial=self._is_trial):
            self._num_doubtful = _DOUBTFUL_STEPS
        self._is_trial = False
        plain = self.cost.plain(rows)
        if accepted is not None and plain:
            tokens = 1.0 + accepted / rows
            share = min(1.0, _MOST_PER_ROW / tokens)
            self._lately_steps = _FORGET_PRICE * self._lately_steps + share * seconds / plain
            self._lately_tokens = _FORGET_PRICE * self._lately_tokens + share * tokens

    def tested(self, expected: float, accepted: int) -> None:
        """Of the proposals of a step, `expected` tokens were expected to pass, `accepted` did."""
        self._expected = _FORGET * self._expected + expected
        self._accepted = _FORGET * self._accepted + accepted
        keep = min(1.0, max(_TRUST_STEPS * expected, _TRUST_TOKENS) / max(self._expected, 1e-9))
        self._expected *= keep
        self._accepted *= keep

    def pays(self, rows: int) -> bool:
        """Whether to ask the drafter for proposals to the next step, of `rows` requests."""
        self._until_trial -= 1
        if self._wait:
            self._wait -= 1
            return False
        return not self.cost.lacks_plain_steps(rows)

    def threshold(self, rows: int) -> float:
        """The least probability at which a proposed token pays, between 0.05 and 0.95."""
        if self._num_doubtful or self._is_trial_due():
            return _FIRST_GUESS
        share = _FIRST_GUESS
        proposing, seconds = self.cost.proposing(rows), self._seconds_per_token(rows)
        if proposing is not None and proposing[0] > 0.0 and seconds:
            share = proposing[0] / seconds
        return min(max(share, 0.05), 0.95)

    def room(self, rows: int) -> int:
        """Most tokens to propose in the next step, of `rows` requests (`StepCost.room`)."""
        if self._num_doubtful:
            return self.cost.trial_room(rows)
        return _TRIAL_TOKENS if self._is_trial_due() else self.cost.room(rows)

    def worth(self, rows: int, proposed: int, expected: float, *, beside: int = 0) -> bool:
        """Whether a step should have these proposals.

        Args:
            rows: Requests of the step.
            proposed: Tokens for all together.
            expected: How many of them are expected to pass (`Proposals.expected`).
            beside: Tokens that the step tests anyway, of drafts. With them the fixed part of
                testing is paid.
        """
        is_paid = beside > 0
        if proposed > 0 and self._num_doubtful:
            self._num_doubtful -= 1
            return True
        if proposed > 0 and self._is_worth(rows, proposed, expected, self._trust(), is_paid):
            self._refused = 0
            if self._was_tried:
                self._trial_gap, self._was_tried = _FIRST_TRIAL, False
            self._until_trial = self._trial_gap
            return True
        # Where only trust is wanting, time brings it back.
        if (
            proposed > 0
            and self._is_trial_due()
            and not self._is_worth(rows, proposed, expected, 1.0, is_paid)
        ):
            self._trial_gap = min(2 * self._trial_gap, _LAST_TRIAL)
            self._until_trial, self._was_tried, self._is_trial = self._trial_gap, True, True
            return True
        self._refused += 1
        self._wait = min(self._refused // _PATIENCE, _MAX_WAIT)
        self._expected *= _FORGET_UNUSED
        self._accepted *= _FORGET_UNUSED
        return False

    def _is_trial_due(self) -> bool:
        return self._until_trial <= 0

    def _trust(self) -> float:
        return (self._accepted + _PRIOR_TOKENS) / (self._expected + _PRIOR_TOKENS)

    def _is_worth(
        self, rows: int, proposed: int, expected: float, trust: float, is_paid: bool
    ) -> bool:
        proposing, seconds = self.cost.proposing(rows), self._seconds_per_token(rows)
        if proposing is None or seconds is None:
            return True  # to learn it
        per_token, fixed = proposing
        return expected * trust * seconds > per_token * proposed + (0.0 if is_paid else fixed)

    def _seconds_per_token(self, rows: int) -> float | None:
        plain = self.cost.plain(rows)
        if plain is None:
            return None
        steps, tokens = self._lately_steps + _PLAIN_STEPS, self._lately_tokens + _PLAIN_STEPS
        return plain / rows * steps / tokens
