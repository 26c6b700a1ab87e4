"""The embedded engine: verifies drafts in the pass that fills the KV cache, and decodes on from
there."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from spec_rollout import ops
from spec_rollout.acceptance import AcceptanceRule
from spec_rollout.checks import integer
from spec_rollout.drafting import HistoryDrafter, MatchShares, Payoff
from spec_rollout.engines.eos import eos_token_ids
from spec_rollout.engines.transformers.decode import Decoder
from spec_rollout.engines.transformers.forward import ModelForward
from spec_rollout.engines.transformers.invariance import batch_invariance_error
from spec_rollout.engines.transformers.lengths import row_limit
from spec_rollout.engines.transformers.requests import Plan
from spec_rollout.engines.transformers.results import Results
from spec_rollout.engines.transformers.row_check import checked_forward
from spec_rollout.engines.transformers.unwrap import unwrap
from spec_rollout.engines.transformers.verify import Verified, Verifier
from spec_rollout.engines.transformers.weights import copy_weights
from spec_rollout.types import History, RolloutRequests, Rollouts, RolloutStats, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Waiting requests are let in when this share of the slots is free. A refill costs some forwards
# however few rows it serves, free slots cost their share of a decoding step's fixed part: the sum
# has a flat minimum between a quarter and a third.
_REFILL_SHARE = 0.25


class TransformersEngine:
    """A `RolloutEngine` around any Hugging Face causal LM with a standard KV cache.

    Requests pass through two stages. The verifier runs prompt and draft through the model in
    chunks, tests every draft token against the logits of that very pass, and stops a row at its
    first rejection; a finished draft that is accepted whole never occupies a slot. For the others,
    the KV of prompt and accepted tokens moves into a free slot and decoding goes on from the token
    that verification drew. Finished rows' slots are refilled, and compacted away once nothing
    waits, so that time follows the tokens computed. Log-probs come from the same passes.

    Requests that come with a history are decoded with proposals from it (`HistoryDrafter`): a step
    then gives a row as many tokens as agree with what sampling gives, and one more.

    Rules that cut drafts unseen (`RandomReuse`, `RandomCut`) do so in the rollout layer
    (`AcceptanceRule.cut_lens`), before the engine sees the drafts.

    The model may be shared with a trainer: its mode, attention and hooks are restored after each
    call. Between calls `policy_version`, what decoding steps took, how proposals fared and, on a
    CPU, the memory of the KV caches are kept (num_slots and max_verify_tokens / verify_chunk rows
    of the longest length so far).

    Args:
        model: Causal LM with all parameters on one device, sdpa or eager attention. It may be
            wrapped by torch.compile, DataParallel or peft: the model inside is run, an adapter's
            layers with it.
        num_slots: Responses decoded at a time. More slots make fewer, fuller steps (measure with
            benchmarks/bench_engine.py); their KV takes num_slots times the longest row.
        max_verify_tokens: Most tokens of one verification forward; bounds the memory of its logits
            (this many rows of the vocabulary).
        verify_chunk: Most tokens of one row in one verification forward. A draft begins with fewer
            and doubles them, so that what is computed after a rejection is less than this, and
            about what was accepted before it.
        max_model_len: Most tokens of prompt and response together; None is as many as the model
            takes (`lengths.row_limit`).
        batch_invariant: Whether a token's logits may not depend, in any bit, on what else is in
            the batch and on how the row was cut into forwards: with `Coupled`, tokens and log-probs
            with a cache are then those without. None: yes on CPU where the model's attention allows
            it, in float32, which is also the faster way (benchmarks/bench_engine.py), and in
            bfloat16 where the machine's matrix products allow it; elsewhere it cannot be had. See
            `batch_invariance_error`.
        check_model: Hold one small ragged batch to a plain forward of each row alone, and refuse
            a model that differs (`row_check`). Done once per architecture and process.

    Attributes:
        before_step: Called before each step of a rollout, verification or decoding; what it raises
            ends the rollout.

    Raises:
        ValueError: naming the argument or what the model has that this engine cannot work with.
    """

    supports_history = True
    # Seconds. What a step of decoding takes decides how much the next ones propose, so tests that
    # count proposals or steps set a clock of their own.
    clock: Callable[[], float] = staticmethod(time.perf_counter)
    last_counters: None = None  # `RolloutStats` says it all

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        num_slots: int = 64,
        max_verify_tokens: int = 2048,
        verify_chunk: int = 32,
        max_model_len: int | None = None,
        batch_invariant: bool | None = None,
        check_model: bool = True,
    ) -> None:
        for name, value in (
            ("num_slots", num_slots),
            ("max_verify_tokens", max_verify_tokens),
            ("verify_chunk", verify_chunk),
        ):
            if integer(name, value) < 1:
                raise ValueError(f"{name}: expected >= 1, got {value}")
        if max_model_len is not None:
            max_model_len = integer("max_model_len", max_model_len)
        model = unwrap(model)
        limit = row_limit(model, model.config.get_text_config(decoder=True))
        if max_model_len is not None and not (2 <= max_model_len <= (limit.most or max_model_len)):
            raise ValueError(
                f"max_model_len: expected 2 to {limit.most} ({limit.reason}), got {max_model_len}"
            )
        self.model = model
        self.num_slots = num_slots
        self.max_verify_tokens = max_verify_tokens
        self.verify_chunk = min(verify_chunk, max_verify_tokens)
        self.max_model_len = limit.usual if max_model_len is None else max_model_len
        make = checked_forward if check_model else ModelForward
        self._forward = make(model, batch_invariant, self.max_model_len)
        self.before_step: Callable[[], None] | None = None
        self._policy_version = 0
        self._payoff = Payoff()
        self._match_shares = MatchShares()

    @property
    def policy_version(self) -> int:
        """Number of `update_weights` calls so far."""
        return self._policy_version

    @property
    def batch_invariant(self) -> bool:
        """Whether the engine keeps to shapes for which results do not depend on the batch."""
        return self._forward.batch_invariant

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens with which the model ends a text, by its configurations; none ends a response here
        that is not among `SamplingParams.stop_token_ids`."""
        generation = getattr(self.model, "generation_config", None)
        text = self.model.config.get_text_config(decoder=True)
        return eos_token_ids(*(getattr(one, "eos_token_id", None) for one in (generation, text)))

    def batch_invariance_error(self) -> float:
        """Largest difference between logits of the same tokens computed in different shapes.

        0.0 means bit for bit equal: with `Coupled`, rollouts with a cache are those without. That
        holds on CPU in float32 as far as the machine's matrix products keep one order of summation
        (where tried they do for inner sizes up to 1,024 and, on one thread, 2,048) and hidden sizes
        are multiples of 32. Otherwise the difference is rounding, and a token flips where two were
        nearly tied.
        """
        with self._forward.session():
            return batch_invariance_error(self._forward)

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copies new weights into the model in place (`weights.copy_weights`).

        Args:
            named_tensors: Names of the model's state dict and tensors of the same shapes; not all
                need be given. A parameter given as itself is not copied.

        Raises:
            ValueError: naming the tensor that is unknown, repeated or of another shape; nothing is
                written then.
        """
        copy_weights(self.model, named_tensors)
        self._policy_version += 1

    def rollout(
        self, requests: RolloutRequests, sampling: SamplingParams, acceptance: AcceptanceRule
    ) -> Rollouts:
        """Generates one response per request (see `RolloutEngine.rollout`).

        A draft ends with its first stop token, whatever `Drafts.finished` says, and is cut to
        `max_tokens`. Prompt and response together never exceed `max_model_len`.

        Raises:
            ValueError: if a prompt leaves no room for one token, an id is outside the vocabulary,
                or the rule reads draft log-probs that are not there; nothing is computed then.
        """
        start = self.clock()
        stats = RolloutStats()
        plan = Plan.of(
            requests,
            sampling,
            acceptance,
            vocab_size=self._forward.vocab_size,
            head_size=self._forward.head_size,
            max_model_len=self.max_model_len,
        )
        results = Results(plan, sampling.stop_token_ids)
        running: list[tuple[float, int]] = []
        if plan.batch:
            with self._forward.session():
                running = self._generate(
                    plan, sampling, acceptance, results, stats, requests.history
                )
            if self._forward.device.type == "cuda":
                ops.check_status(self._forward.device)
        packing = self.clock()
        rollouts = results.pack(requests, self._policy_version, stats)
        end = self.clock()
        stats.assembly_seconds = end - packing
        stats.rollout_seconds = end - start
        return replace(rollouts, running=torch.tensor(running, dtype=torch.float64).view(-1, 2))

    def _generate(
        self,
        plan: Plan,
        sampling: SamplingParams,
        rule: AcceptanceRule,
        results: Results,
        stats: RolloutStats,
        history: History | None,
    ) -> list[tuple[float, int]]:
        """Fills `results`; returns what `Rollouts.running` says."""
        begin = start = self.clock()
        drafter = None
        if history is not None:
            drafter = HistoryDrafter(history, sampling.stop_token_ids, self._match_shares)
            self._payoff.begin()
        steps_before, padding_before = self._forward.num_steps, self._forward.num_padding_tokens
        num_slots = min(self.num_slots, plan.batch)
        num_lanes = min(num_slots, self.max_verify_tokens // self.verify_chunk)
        verifier = Verifier(
            self._forward,
            plan,
            sampling,
            rule,
            num_lanes=num_lanes,
            max_tokens=self.max_verify_tokens,
            chunk=self.verify_chunk,
            stats=stats,
        )
        decoder = Decoder(
            self._forward,
            plan,
            sampling,
            results,
            num_slots=num_slots,
            max_tokens=max(self.max_verify_tokens, num_slots),
            stats=stats,
            drafter=drafter,
            payoff=self._payoff,
            clock=self.clock,
        )
        waiting = deque(plan.order().tolist())
        # Mostly the prompts that several requests share.
        seconds, share = self.clock() - start, float(plan.has_draft.mean())
        stats.verification_seconds += share * seconds
        stats.decode_seconds += (1.0 - share) * seconds
        refill = max(1, int(num_slots * _REFILL_SHARE))
        running = []
        while waiting or verifier.num_busy or decoder.num_live:
            if self.before_step is not None:
                self.before_step()
            start = self.clock()
            if verifier.num_busy or (waiting and decoder.num_free >= refill):
                room = min(decoder.num_free, num_lanes) - verifier.num_busy
                for _ in range(min(room, len(waiting))):
                    verifier.admit(waiting.popleft())
                verified, share = verifier.step()
                decoder.add(self._settle(verified, plan, results), verifier.cache)
                seconds = self.clock() - start
                # Prefill of prompts that came without a draft is part of generating.
                stats.verification_seconds += share * seconds
                stats.decode_seconds += (1.0 - share) * seconds
            else:
                decoder.step()
                stats.decode_seconds += self.clock() - start
            running.append((self.clock() - begin, verifier.num_busy + decoder.num_live))
        stats.num_engine_steps += self._forward.num_steps - steps_before
        stats.num_padding_tokens += self._forward.num_padding_tokens - padding_before
        return running

    @staticmethod
    def _settle(verified: list[Verified], plan: Plan, results: Results) -> list[Verified]:
        """Records what verification gave; returns the requests that need decoding."""
        unfinished = []
        for item in verified:
            response = results.responses[item.request]
            response.accepted_len = item.accepted_len
            response.logprobs.extend(item.logprobs)
            if item.next_token_id is None:
                continue
            response.token_ids.append(np.array([item.next_token_id]))
            if not results.is_last(item.request, item.accepted_len, item.next_token_id):
                unfinished.append(item)
        return unfinished
