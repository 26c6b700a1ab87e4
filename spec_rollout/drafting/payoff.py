"""Whether proposing pays at all, judged by what steps with and without proposals gave."""

from __future__ import annotations


class Payoff:
    """Whether steps with proposals give more tokens per second than steps without.

    Each batch size (to a power of two) is judged by its own steps. `StepCost` prices one proposed
    token. This also sees what any step with proposals costs beyond its tokens, so it bounds what
    useless proposals can lose. Now and then a step does the opposite of what has paid so far. The
    clearer it paid, the more seldom that is.

    It reads no clock: the engine says what each step took.
    """

    # (how many times as many tokens per second, one step in so many does the opposite)
    _EXPLORE = ((1.0, 16), (1.3, 64), (2.0, 256))
    _FORGET = 0.9  # per step of that kind and size

    def __init__(self) -> None:
        self._rates: dict[tuple[int, bool], tuple[float, float]] = {}  # tokens, seconds
        self._asked: dict[int, int] = {}

    def observe(self, rows: int, has_proposals: bool, tokens: int, seconds: float) -> None:
        """Adds a step of decoding that gave `tokens` tokens to `rows` >= 1 requests."""
        key = (rows.bit_length(), has_proposals)
        old_tokens, old_seconds = self._rates.get(key, (0.0, 0.0))
        self._rates[key] = (
            self._FORGET * old_tokens + tokens / rows,
            self._FORGET * old_seconds + seconds,
        )

    def pays(self, rows: int) -> bool:
        """Whether the next step, of `rows` requests, should have proposals."""
        size = rows.bit_length()
        self._asked[size] = asked = self._asked.get(size, 0) + 1
        tokens, seconds = self._rates.get((size, True), (0.0, 0.0))
        plain_tokens, plain_seconds = self._rates.get((size, False), (0.0, 0.0))
        if not plain_seconds or not seconds:
            return asked % self._EXPLORE[0][1] != 0
        ratio = tokens * plain_seconds / (plain_tokens * seconds)
        clear = max(ratio, 1.0 / max(ratio, 1e-9))
        every = next(steps for least, steps in reversed(self._EXPLORE) if clear >= least)
        return (ratio >= 1.0) != (asked % every == 0)
