"""What the requests of an agent loop say to an engine that runs the plugin.

A *turn* is a prompt and its response, in as many requests as that takes: a trainer that aborts
requests to load new weights sends them again, with what they gave so far behind the prompt.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch

from spec_rollout import ops
from spec_rollout.acceptance import AcceptanceRule, Coupled, RuleKind
from spec_rollout.adapters.draft_pool import STEPS_REMEMBERED, DraftPool, common_prefix
from spec_rollout.adapters.settings import ReuseSettings
from spec_rollout.engines.vllm.admission import why_not_ours
from spec_rollout.engines.vllm.wire import EXTRA_ARG, ReuseRequest, extra_args
from spec_rollout.keys import noise_keys, prompt_key

# Of a rollout, as verl counts speculation: tokens drafted, tokens accepted, steps that tested some.
COUNT_NAMES = ("spec_num_draft_tokens", "spec_num_accepted_tokens", "spec_num_verify_steps")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RolloutName:
    """Which rollout an agent loop runs.

    Attributes:
        user_key: Of the prompt's row in the data (`rows.row_user_key`).
        sample: Index within the prompt's group.
        step: Training step.
        is_validation: It touches no drafts.
    """

    user_key: str
    sample: int
    step: int
    is_validation: bool


class Turn(Protocol):
    """See the module."""

    def extra_args(self, prompt_ids: list[int]) -> dict[str, Any]:
        """`SamplingParams.extra_args` of a request.

        Args:
            prompt_ids: Of the request: the turn's prompt, and what the turn gave so far.
        """
        ...


@dataclass(frozen=True, slots=True)
class NamedTurn:
    """The engine has the draft, and is told whose request it is.

    To it, a request that goes on with an aborted one is another prompt, with other noise and other
    drafts: less is reused, and nothing is wrong.
    """

    name: dict[str, Any]

    def extra_args(self, prompt_ids: list[int]) -> dict[str, Any]:
        """See `Turn`."""
        return {EXTRA_ARG: self.name}


@dataclass(frozen=True, slots=True)
class KeyedTurn:
    """The request carries its key, and its draft if it has one.

    Attributes:
        key: Noise key.
        rule: Of acceptance.
        prompt_len: Of the turn's prompt.
        draft_ids: [num_draft_tokens], int32.
        draft_logprobs: [num_draft_tokens], float32.
        store_as: Key of the prompt under which the response is to be kept; None: it is not.
    """

    key: int
    rule: AcceptanceRule
    prompt_len: int
    draft_ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    draft_logprobs: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    store_as: bytes | None = None

    def extra_args(self, prompt_ids: list[int]) -> dict[str, Any]:
        """See `Turn`. The first token's noise is that of its place in the response, and the draft
        goes on from there if it was followed so far."""
        done = len(prompt_ids) - self.prompt_len
        given = np.asarray(prompt_ids[self.prompt_len :], np.int64)
        start = done if np.array_equal(self.draft_ids[:done], given) else self.draft_ids.size
        request = ReuseRequest(
            self.key,
            self.rule,
            np.array(self.draft_ids[start:], np.int32),
            np.array(self.draft_logprobs[start:], np.float32),
            first_position=done,
        )
        return extra_args(request)

    def kept_len(self, token_ids: np.ndarray, logprobs: np.ndarray) -> int:
        """Draft tokens that passed the test. What is rejected may be drawn again, and what follows
        agree with the draft: that it does says nothing of who drew it.

        Args:
            token_ids: Of the response. [num_response_tokens], int32.
            logprobs: With which they were drawn or tested. [num_response_tokens], float32.
        """
        alike = common_prefix(self.draft_ids, token_ids)
        if not alike or self.rule.kind is RuleKind.COUPLED:  # which draws another where it rejects
            return alike
        kept = ops.accept_prefix(
            torch.from_numpy(self.draft_logprobs[:alike].copy()),
            torch.from_numpy(logprobs[:alike].copy()),
            rule=self.rule,
            keys=torch.tensor([self.key]),
            cu_draft_lens=torch.tensor([0, alike]),
        )
        return int(kept)


def fresh_turn(prompt_ids: list[int], key: int | None = None) -> KeyedTurn:
    """A plain sample: nothing is proposed to it, and it leaves nothing behind.

    Args:
        prompt_ids: Of the turn.
        key: Noise key; None is one that nobody had before.
    """
    key = secrets.randbits(63) if key is None else key
    return KeyedTurn(key, Coupled(), len(prompt_ids))


class RepeatableNoise:
    """Keys of plain samples that another run of the same job gets, too.

    Two requests of a run never share one: they are told apart by step, prompt and sample, by how
    often the same was asked for before, and by the process that asks.

    Args:
        seed: Of the job.
        worker: Number of this process among those that generate.
    """

    def __init__(self, seed: int, worker: int) -> None:
        self._seed = seed
        self._worker = worker
        self._asked: dict[int, Counter[str]] = {}

    def next_key(self, name: RolloutName, prompt_ids: list[int]) -> int:
        """The key of the next plain sample of a rollout."""
        asked = self._asked.setdefault(name.step, Counter())
        for old in [old for old in self._asked if old <= name.step - STEPS_REMEMBERED]:
            del self._asked[old]
        who = json.dumps([name.user_key, name.sample, name.is_validation, self._worker])
        turn = prompt_key(prompt_ids, who).hex()
        asked[turn] += 1
        # No user key of a sample's own noise looks like this.
        key = prompt_key(prompt_ids, f"plain {who} {asked[turn]}")
        return int(noise_keys(self._seed, name.step, [key], [0])[0])


class Reuse:
    """What a process that generates does about its rollouts.

    Nothing in it fails a rollout: what goes wrong with drafts is counted, said once, and rollouts
    are plain ones for the rest of that training step.

    Args:
        settings: Of the run.
        max_chunk: Draft tokens that the engine tests in one step at most.

    Attributes:
        counters: Since it was made.
        noise: Of plain samples; None: no other run has the same.
    """

    def __init__(self, settings: ReuseSettings, max_chunk: int) -> None:
        self._settings = settings
        self._max_chunk = max_chunk
        self._pool = DraftPool(settings.shards, settings.timeout)
        self._failed_step = -1
        self.noise: RepeatableNoise | None = None
        self.counters: dict[str, int] = dict.fromkeys(
            ("rollouts", "with_draft", "draft_tokens", "reused_tokens", "tokens", "failures"), 0
        )

    async def begin(
        self,
        name: RolloutName | None,
        prompt_ids: list[int],
        params: Mapping[str, Any],
        has_media: bool,
    ) -> Turn | None:
        """A turn begins.

        Args:
            name: None: not known.
            prompt_ids: Of the turn.
            params: Sampling parameters as vLLM calls them.
            has_media: The prompt is not tokens alone.

        Returns:
            What its requests say; None: nothing.
        """
        if name is None or not_served(params):
            return None
        if name.is_validation:
            return self._fresh(name, prompt_ids)
        if params.get("temperature", 1.0) == 0:  # a greedy baseline is nobody's sample
            return None
        self.counters["rollouts"] += 1
        epoch = self._settings.noise_epoch(name.step)
        if self._settings.drafts == "engine":
            return NamedTurn({"sample": name.sample, "epoch": epoch, "prompt_id": name.user_key})
        if has_media:  # which the prompt's key does not cover
            return self._fresh(name, prompt_ids)
        try:
            return await self._with_draft(name, prompt_ids, params)
        except Exception as error:
            self.failed(error, name.step)
            return self._fresh(name, prompt_ids)

    async def end(self, name: RolloutName | None, turn: Turn | None, output: Any) -> Any:
        """A turn is over.

        Args:
            name, turn: As of `begin`.
            output: verl's `TokenOutput`.

        Returns:
            What the agent loop gets: with counts, and other log-probs if the settings say so.
        """
        if self._settings.drafts == "engine" or name is None or name.is_validation:
            return output
        # All three in every row of a batch, or some trainer fails on the rows without.
        for count in COUNT_NAMES:
            output.extra_fields.setdefault(count, 0)
        if not isinstance(turn, KeyedTurn) or turn.store_as is None or not output.token_ids:
            return output
        try:
            return await self._keep(name, turn, turn.store_as, output)
        except Exception as error:
            self.failed(error, name.step)
            return output

    def extra_args(self, turn: Turn, prompt_ids: list[int]) -> dict[str, Any]:
        """`Turn.extra_args`; {} if that fails."""
        try:
            return turn.extra_args(prompt_ids)
        except Exception as error:
            self.failed(error, self._failed_step)
            return {}

    def failed(self, error: Exception, step: int) -> None:
        """Counts what went wrong, and says it the first time."""
        if not self.counters["failures"]:
            logger.warning(
                "spec_rollout: drafts are not to be had (%s: %s); rollouts are plain ones as long "
                "as that lasts, and counted",
                type(error).__name__,
                error,
            )
        self.counters["failures"] += 1
        self._failed_step = step

    def _fresh(self, name: RolloutName, prompt_ids: list[int]) -> KeyedTurn:
        key = None if self.noise is None else self.noise.next_key(name, prompt_ids)
        return fresh_turn(prompt_ids, key)

    async def _with_draft(
        self, name: RolloutName, prompt_ids: list[int], params: Mapping[str, Any]
    ) -> KeyedTurn:
        if name.step == self._failed_step:  # nobody waits for the same timeout again
            self.counters["failures"] += 1
            return self._fresh(name, prompt_ids)
        settings = self._settings
        key = prompt_key(prompt_ids, name.user_key)
        most = int(params.get("max_tokens") or 2**31 - 1)
        begun = await self._pool.begin(key, name.sample, name.step, most)
        if not begun.is_first:  # two rollouts of a step never share their noise
            return self._fresh(name, prompt_ids)
        rule = settings.rule
        epoch = settings.noise_epoch(name.step)
        if rule.fresh_noise:
            epoch = begun.noise_offset + name.step
        noise = int(noise_keys(settings.seed, epoch, [key], [name.sample])[0])
        self.counters["with_draft"] += bool(begun.token_ids.size)
        self.counters["draft_tokens"] += begun.token_ids.size
        return KeyedTurn(noise, rule, len(prompt_ids), begun.token_ids, begun.logprobs, key)

    async def _keep(self, name: RolloutName, turn: KeyedTurn, key: bytes, output: Any) -> Any:
        if output.log_probs is None:
            raise ValueError("log_probs: expected those of the response, got None")
        draft = turn.draft_ids
        ids = np.asarray(output.token_ids, np.int32)
        logprobs = np.asarray(output.log_probs, np.float32)
        kept = turn.kept_len(ids, logprobs)
        ended = await self._pool.end(key, name.sample, ids, logprobs, kept, name.step)
        self.counters["tokens"] += ids.size
        self.counters["reused_tokens"] += ended.accepted_len
        steps = verify_steps(ended.accepted_len, draft.size, self._max_chunk)
        counts = (int(draft.size), ended.accepted_len, steps)
        output.extra_fields.update(zip(COUNT_NAMES, counts, strict=True))
        if self._settings.behaviour_logprobs and ended.behaviour_logprobs is not None:
            output = output.model_copy(update={"log_probs": ended.behaviour_logprobs.tolist()})
        return output


def not_served(params: Mapping[str, Any]) -> bool:
    """Whether requests with these parameters are left to vLLM's own sampler."""
    return why_not_ours(SimpleNamespace(**{**params, "logprobs": None})) is not None


def verify_steps(accepted_len: int, draft_len: int, max_chunk: int, first_chunk: int = 16) -> int:
    """Engine steps that test a draft in chunks, each twice the last, until the first rejection."""
    steps, tested, chunk = 0, 0, min(first_chunk, max_chunk)
    while tested < draft_len and tested <= accepted_len:
        steps, tested, chunk = steps + 1, tested + chunk, min(2 * chunk, max_chunk)
    return steps
