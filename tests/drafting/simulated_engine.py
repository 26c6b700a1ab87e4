"""An engine without a model: responses are known beforehand, and a clock says what steps take.

What is real is all that decides about proposals: `Drafter`, `StepCost`, `Payoff`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from spec_rollout import ops
from spec_rollout.drafting import Drafter, Payoff
from spec_rollout.keys import prompt_key

GROUP = 8
VOCAB = 64
MAX_PROPOSAL = 32
# Of the policies: how far weights move from one epoch to the next, and how sure they are.
DRIFT, SHARP = 0.1, 11.0


@dataclass(frozen=True, slots=True)
class Epoch:
    """What a rollout call generates: token ids and their log-probs [requests, length], the noise
    keys [requests], and each request's prompt [requests]."""

    token_ids: np.ndarray
    logprobs: np.ndarray
    keys: np.ndarray
    prompts: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each response: some are much longer than most. [requests]."""
        requests, longest = self.token_ids.shape
        share = np.random.default_rng(requests).beta(1.5, 3.0, requests)
        share[0] = 1.0
        return np.maximum((longest * share).astype(np.int64), 2)


@dataclass(slots=True)
class Outcome:
    """What a rollout call took; `with_proposals` says of each step whether it had any."""

    seconds: float = 0.0
    proposed: int = 0
    accepted: int = 0
    with_proposals: list[bool] | None = None


def sampled(prompts: np.ndarray, keys: np.ndarray, length: int, weights: int) -> Epoch:
    """Responses of a policy over two tokens of context and the prompt.

    About a nat a token; policies of neighbouring `weights` differ a little.
    """
    requests = prompts.size
    history = np.zeros((requests, 2), np.int64)
    ids = np.zeros((requests, length), np.int32)
    logprobs = np.zeros((requests, length), np.float32)
    tokens = np.arange(VOCAB)
    for t in range(length):
        context = history[:, 0] * 1_009 + history[:, 1] * 9_176_263 + prompts * 77_003
        mixed = (context[:, None] * 2_654_435_761 + tokens * 40_503) % 2**32
        mixed = (mixed ^ (mixed >> 13)) * 1_274_126_177 % 2**32
        base = (mixed ^ (mixed >> 16)) / 2**32
        drift = np.sin(1e4 * base + weights) * DRIFT
        logits = torch.from_numpy(SHARP * base**12 + drift).float()
        drawn = ops.sample_tokens(
            logits, keys=torch.from_numpy(keys), positions=torch.full((requests,), t)
        )
        ids[:, t], logprobs[:, t] = drawn.token_ids.numpy(), drawn.logprobs.numpy()
        history = np.stack([history[:, 1], ids[:, t]], axis=1)
    return Epoch(ids, logprobs, keys, prompts)


def unpredictable(requests: int, length: int, seed: int) -> Epoch:
    """Every prompt is new, and no token says anything about the next."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 5_000, (requests, length)).astype(np.int32)
    keys = rng.integers(-(2**62), 2**62, requests)
    prompts = 10**6 * (seed + 1) + np.arange(requests)
    return Epoch(ids, np.full(ids.shape, -8.5, np.float32), keys, prompts)


class SimulatedEngine:
    """Steps as the engines make them, one after another.

    Args:
        seconds: Of a step with so many requests and proposed tokens.
        decides: Whether to leave it to `Payoff`; else steps always have proposals where there are
            any ("always") or never ("never").
        favours_longest: As the engines do (`Drafter.propose`).
    """

    def __init__(
        self,
        seconds: Callable[[int, int], float],
        decides: str = "payoff",
        *,
        favours_longest: bool = True,
    ) -> None:
        self._seconds = seconds
        self._decides = decides
        self._favours_longest = favours_longest
        self.drafter = Drafter(max_table_bytes=5 * 64 * 2**12)
        self.payoff = Payoff()

    def rollout(self, epoch: Epoch, *, follows: bool = False) -> Outcome:
        """Generates the responses of an epoch, whose prompts may have history.

        Args:
            follows: Each request follows the last rollout with its noise key, if there is one.
        """
        outcome = Outcome(with_proposals=[])
        requests = epoch.prompts.size
        lengths = epoch.lengths
        groups = [prompt_key([int(p)]) for p in epoch.prompts]
        handles = np.array(
            [
                self.drafter.join(group, tag=int(key))
                for group, key in zip(groups, epoch.keys, strict=True)
            ]
        )
        if follows:
            for handle, group, key in zip(handles, groups, epoch.keys, strict=True):
                own = self.drafter.recall(group, int(key))
                if own is not None:
                    self.drafter.follow(int(handle), *own)
        self.payoff.begin()
        done = np.zeros(requests, np.int64)
        live, given = np.arange(requests), np.ones(requests, np.int64)
        self._extend(epoch, handles, live, done, given)
        done += given
        while live.size:
            lens = np.zeros(live.size, np.int64)
            expected = 0.0
            if self._decides == "always" or (
                self._decides == "payoff" and self.payoff.pays(live.size)
            ):
                proposals = self.drafter.propose(
                    handles[live],
                    np.minimum(lengths[live] - 1 - done[live], MAX_PROPOSAL),
                    self.payoff.threshold(live.size),
                    favours_longest=self._favours_longest,
                    max_total=self.payoff.room(live.size),
                    keys=epoch.keys[live],
                    positions=done[live],
                )
                expected = float(proposals.expected.sum())
                num = proposals.token_ids.size
                if self._decides == "always" or self.payoff.worth(live.size, num, expected):
                    lens = proposals.lens
            accepted = np.zeros(live.size, np.int64)
            if lens.any():
                ends = np.cumsum(lens)
                for i, r in enumerate(live.tolist()):
                    found = proposals.token_ids[ends[i] - lens[i] : ends[i]]
                    truth = epoch.token_ids[r, done[r] : done[r] + lens[i]]
                    differs = np.flatnonzero(found != truth)
                    accepted[i] = differs[0] if differs.size else lens[i]
                self.drafter.observe(handles[live], accepted)
                self.payoff.tested(expected, int(accepted.sum()))
            total = int(lens.sum())
            seconds = self._seconds(live.size, total)
            self.payoff.observe(live.size, total, seconds, int(accepted.sum()))
            outcome.seconds += seconds
            outcome.proposed += total
            outcome.accepted += int(accepted.sum())
            outcome.with_proposals.append(total > 0)
            given = np.minimum(accepted + 1, lengths[live] - done[live])
            self._extend(epoch, handles, live, done, given)
            done[live] += given
            for r in live[done[live] >= lengths[live]].tolist():
                self.drafter.leave(int(handles[r]))
            live = live[done[live] < lengths[live]]
        return outcome

    def _extend(
        self,
        epoch: Epoch,
        handles: np.ndarray,
        live: np.ndarray,
        done: np.ndarray,
        given: np.ndarray,
    ) -> None:
        columns = np.concatenate(
            [np.arange(done[r], done[r] + n) for r, n in zip(live, given, strict=True)]
        )
        rows = np.repeat(live, given)
        self.drafter.extend(
            handles[live], epoch.token_ids[rows, columns], given, epoch.logprobs[rows, columns]
        )
