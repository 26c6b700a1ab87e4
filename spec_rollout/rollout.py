"""One rollout step, whatever the engine.

Drafts are looked up, the engine verifies and continues them, the result is stored.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from spec_rollout.acceptance import AcceptanceRule, NoReuse, Schedule
from spec_rollout.batch import Batch
from spec_rollout.cache import RolloutCache
from spec_rollout.checks import integer, of_kind, real, shown, whole
from spec_rollout.engines.base import RolloutEngine
from spec_rollout.keys import TokenIds, noise_keys
from spec_rollout.origins import count_responses, kl_sum, taken_lens, with_origins
from spec_rollout.packed import lens_to_stop
from spec_rollout.rounding import Rounding, measure_rounding
from spec_rollout.types import Drafts, History, RolloutRequests, Rollouts, SamplingParams

_LOGGER = logging.getLogger(__name__)

# Keeps the noise of evaluation apart from that of training with the same seed.
_EVALUATION_SALT = 0x5DEECE66D2B79F1A


class RolloutSession:
    """Rolls prompts out with reuse of what the same prompts gave before.

    Every random decision depends on (seed, noise epoch, prompt, sample index, position) alone. The
    noise epoch is the training step for rules that need fresh noise and `epoch // refresh_epochs`
    for `Coupled`, with reuse on or off, so that under a lossless coupling both give the same
    tokens. Two calls with the same noise epoch and prompt draw the same noise: advance `step`, and
    give rows of a data set that repeats prompts `user_keys` of their own if `Coupled` may meet them
    in different batches of an epoch.

    A draft must not be tested with the noise that drew it, but under `Coupled`: after a rejection
    that noise mostly draws the rejected token again. So a session whose cache begins with rollouts
    of another session or run of the same seed has another `noise_offset`.

    Args:
        engine: Generates and verifies.
        rule: Acceptance rule, or a schedule of it over training steps.
        cache: Where rollouts are kept between calls; None makes an unbounded one in memory.
        seed: Any integer.
        refresh_epochs: Epochs after which `Coupled` draws new noise (an epoch with new noise reuses
            little); None is never. Other rules ignore it.
        reuse: False generates every response from scratch, with the same noise, and leaves the
            cache alone. So does a rule that accepts nothing (`NoReuse`).
        fresh_share: Share of each group that is drawn from scratch, whatever is cached; the samples
            take turns, by `epoch`. 0 to 1; only 0 with a rule that keeps its noise (`Coupled`).
        max_age: A draft with a token drawn more epochs ago is not reused; None has no limit.
        drafting: Where no draft is followed, propose from the prompt's cached rollouts and from
            what its samples generate meanwhile. It changes the number of decoding steps, never a
            token. Needs the cache, with any rule and `reuse`.
        noise_offset: Any integer, added to the noise epoch of rules that need fresh noise.
            `cache.fingerprint()`, taken once before the first rollout, keeps the noise apart from
            that which drew what the cache holds. A session that goes on after the steps of one that
            ended takes that one's.

    Attributes:
        rounding: What the engine's rounding was when it was measured: for a rule with
            `tolerance="auto"` before the first drafts are verified, else by `measure_rounding`.
            None before.

    Raises:
        ValueError: naming the argument; also if the rule reads draft log-probs that the cache does
            not keep.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        rule: AcceptanceRule | Schedule,
        *,
        cache: RolloutCache | None = None,
        seed: int = 0,
        refresh_epochs: int | None = None,
        reuse: bool = True,
        drafting: bool = False,
        fresh_share: float = 0.0,
        max_age: int | None = None,
        noise_offset: int = 0,
    ) -> None:
        self.schedule = rule if isinstance(rule, Schedule) else Schedule(rule)
        if refresh_epochs is not None and integer("refresh_epochs", refresh_epochs) < 1:
            raise ValueError(f"refresh_epochs: expected >= 1 or None (never), got {refresh_epochs}")
        if not 0 <= real("fresh_share", fresh_share) <= 1:
            raise ValueError(f"fresh_share: expected 0 <= value <= 1, got {fresh_share}")
        if fresh_share > 0 and not self.schedule.rule.fresh_noise:
            raise ValueError(
                f"fresh_share: expected 0 with {self.schedule.rule}, whose noise would draw the "
                f"same again, got {fresh_share}"
            )
        if max_age is not None and integer("max_age", max_age) < 1:
            raise ValueError(f"max_age: expected >= 1 or None (no limit), got {max_age}")
        self.fresh_share = float(fresh_share)
        self.max_age = max_age
        # Called with the requests of each call, drafts as they are verified, before the engine is.
        self.on_requests: Callable[[RolloutRequests, AcceptanceRule], None] | None = None
        if not callable(getattr(engine, "rollout", None)):
            raise ValueError(f"engine: expected a RolloutEngine, got {shown(engine)}")
        if cache is not None:
            of_kind("cache", cache, RolloutCache, "a RolloutCache or None")
        self.engine = engine
        self.cache = RolloutCache() if cache is None else cache
        self.seed = whole("seed", seed)
        self.noise_offset = whole("noise_offset", noise_offset)
        self.refresh_epochs = refresh_epochs
        self.reuse = reuse
        self.rounding: Rounding | None = None
        self._told_of_eos = False
        if reuse:
            _warn_of_rounding(engine, self.schedule.rule)
        self.drafting = drafting
        if drafting:
            _check_drafting(engine)
        if reuse and self.schedule.rule.needs_draft_logprobs and not self.cache.keep_logprobs:
            raise ValueError(
                f"cache: expected one that keeps log-probs, as {self.schedule.rule} needs, "
                "got keep_logprobs=False"
            )

    def rollout(
        self,
        prompts: Sequence[TokenIds],
        num_samples: int,
        sampling: SamplingParams,
        *,
        step: int,
        epoch: int,
        user_keys: Sequence[str | bytes] | None = None,
    ) -> Rollouts:
        """Generates `num_samples` responses per prompt and keeps them as the next drafts.

        `rollout_rows` with sample indices 0..num_samples - 1 for each prompt. A prompt may occur
        several times in a batch: occurrence k takes the sample indices from k * num_samples on.

        Args:
            prompts: Token ids of each prompt; at least one prompt, each of at least one token.
            num_samples: Rollouts per prompt.
            sampling: The same for all rows. A draft longer than its `max_tokens` is cut; one that
                contains a stop token ends there.
            step: Training step, 0-based.
            epoch: Pass over the data, 0-based.
            user_keys: Namespace of each prompt (`prompt_key`). Bytes are the key itself, at least
                8 of them: of a row whose text may change (a chat template with today's date), while
                its rollouts stay of use. 16 bytes are taken for a hash, as `prompt_key` gives one.

        Returns:
            Rollouts of prompt 0's samples, then prompt 1's, and so on: batch = len(prompts) *
            num_samples. `stats` covers this call from its first line to its last.

        Raises:
            ValueError: naming the argument, before anything is computed or stored; also if a cached
                draft lacks the log-probs that the rule reads.
        """
        start = time.perf_counter()
        batch = Batch.of_prompts(prompts, num_samples, user_keys)
        return self._rollout(batch, sampling, step, epoch, start)

    def rollout_rows(
        self,
        prompts: Sequence[TokenIds],
        sample_ids: Sequence[int] | np.ndarray | torch.Tensor,
        sampling: SamplingParams,
        *,
        step: int,
        epoch: int,
        user_keys: Sequence[str | bytes] | None = None,
    ) -> Rollouts:
        """Generates one response per row, for trainers whose batches are rows.

        A row is a rollout: its prompt and its index among the rollouts of that prompt. Rows may
        come in any order, and the rows of a prompt may be spread over calls or processes: what a
        row draws, and which draft it finds, depend on (prompt, user key, sample id) alone.

        Args:
            prompts: Token ids of each row's prompt. Length batch, at least one.
            sample_ids: Index of each row within its prompt's group. [batch], integer, >= 0. No two
                rows have the same prompt, user key and sample id: they would draw the same tokens.
            sampling, step, epoch: As in `rollout`.
            user_keys: As in `rollout`, of each row's prompt. Length batch.

        Returns:
            Rollouts in the order of the rows.

        Raises:
            ValueError: as `rollout`.
        """
        start = time.perf_counter()
        batch = Batch.of_rows(prompts, sample_ids, user_keys)
        return self._rollout(batch, sampling, step, epoch, start)

    def _rollout(
        self, batch: Batch, sampling: SamplingParams, step: int, epoch: int, start: float
    ) -> Rollouts:
        """Looks drafts up, generates and stores; `start` is when the caller's call began."""
        of_kind("sampling", sampling, SamplingParams, "SamplingParams")
        _check_count("step", step)
        _check_count("epoch", epoch)
        rule = self.schedule.at(step)
        keys = noise_keys(
            self.seed, self._noise_epoch(rule, step, epoch), batch.keys, batch.sample_ids
        )
        reuse = self.reuse and rule.uses_drafts

        lookup_start = time.perf_counter()
        cached = Drafts.none(batch.size)
        if reuse or self.drafting:
            cached = self.cache.lookup(batch.keys, batch.sample_ids, max_tokens=sampling.max_tokens)
        history = None
        if self.drafting:
            history = History(
                cached.token_ids, cached.cu_lens, batch.groups, batch.groups, cached.logprobs
            )
        drafts, num_misses = Drafts.none(batch.size), 0
        draft_lens = drafts.lens
        if reuse:
            drafts = cached
            if rule.needs_draft_logprobs and drafts.logprobs is None:
                raise ValueError(
                    f"cache: expected drafts with log-probs, as {rule} needs, got entries without"
                )
            num_misses = int((drafts.lens == 0).sum())
            drafts = _end_at_stop(drafts, sampling.stop_token_ids)
            drafts = drafts.cut_to(
                taken_lens(
                    drafts,
                    batch.sample_ids,
                    epoch,
                    fresh_share=self.fresh_share,
                    max_age=self.max_age,
                )
            )
            draft_lens = drafts.lens  # what the baselines throw away unseen was a draft too
            cut_lens = rule.cut_lens(draft_lens, keys)
            drafts = drafts if cut_lens is None else drafts.cut_to(cut_lens)
        expected_lens = batch.expected_lens(cached, sampling.max_tokens)
        lookup_end = time.perf_counter()

        if rule.needs_rounding:
            if self.rounding is None and drafts.token_ids.numel():
                self.rounding = self._measure_rounding(batch, sampling)
            rule = rule.with_tolerance(0.0 if self.rounding is None else self.rounding.tolerance)
        requests = batch.requests(keys, drafts, history, expected_lens)
        if self.on_requests is not None:
            self.on_requests(requests, rule)
        rollouts = self._generate(batch, requests, sampling, rule)

        store_start = time.perf_counter()
        if reuse or self.drafting:
            self.cache.store(batch.keys, batch.sample_ids, rollouts)
        store_end = time.perf_counter()
        responses = count_responses(batch.keys, rollouts, cached)
        assert rollouts.ages is not None
        stats = replace(
            rollouts.stats,
            num_groups=responses.num_groups,
            num_distinct_responses=responses.num_distinct,
            num_new_responses=responses.num_new,
            sum_ages=int(rollouts.ages.sum(dtype=torch.int64)),
            sum_kl_reused=kl_sum(rollouts),
            num_drafts=int((draft_lens > 0).sum()),
            num_draft_tokens=int(draft_lens.sum()),
            num_cache_misses=num_misses,
            lookup_seconds=lookup_end - lookup_start,
            store_seconds=store_end - store_start,
        )
        stats.rollout_seconds = time.perf_counter() - start
        return replace(rollouts, stats=stats)

    def measure_rounding(
        self, prompts: Sequence[TokenIds], num_samples: int, sampling: SamplingParams
    ) -> Rounding:
        """How far log-probs of the engine's own tokens move when they are verified, under the
        weights that drew them (`rounding.measure_rounding`). The cache is left alone.

        Arguments as in `rollout`.
        """
        of_kind("sampling", sampling, SamplingParams, "SamplingParams")
        batch = Batch.of_prompts(prompts, num_samples, None)
        self.rounding = self._measure_rounding(batch, sampling)
        return self.rounding

    def _measure_rounding(self, batch: Batch, sampling: SamplingParams) -> Rounding:
        keys = noise_keys(self.seed ^ _EVALUATION_SALT, 0, batch.keys, batch.sample_ids)
        requests = batch.requests(keys, Drafts.none(batch.size), None)
        rounding = measure_rounding(self.engine, requests, sampling)
        _LOGGER.info("rounding of %s: %s", type(self.engine).__name__, rounding)
        return rounding

    def evaluate(
        self,
        prompts: Sequence[TokenIds],
        num_samples: int,
        sampling: SamplingParams,
        *,
        step: int,
        user_keys: Sequence[str | bytes] | None = None,
    ) -> Rollouts:
        """Plain samples of the current weights, for judging them: no cache, no drafts.

        The noise differs from that of every training step and changes with `step`. Reused rollouts
        are no measure of the policy: their reward can rise while that of fresh samples falls.
        Arguments as in `rollout`.
        """
        start = time.perf_counter()
        batch = Batch.of_prompts(prompts, num_samples, user_keys)
        return self._evaluate(batch, sampling, step, False, start)

    def evaluate_rows(
        self,
        prompts: Sequence[TokenIds],
        sample_ids: Sequence[int] | np.ndarray | torch.Tensor,
        sampling: SamplingParams,
        *,
        step: int,
        drafting: bool = False,
    ) -> Rollouts:
        """`evaluate` for rows, as `rollout_rows` is `rollout` for rows.

        Args:
            drafting: Propose from what the other samples of a prompt in this call have generated so
                far. It changes the number of decoding steps, never a token.
        """
        start = time.perf_counter()
        batch = Batch.of_rows(prompts, sample_ids, None)
        return self._evaluate(batch, sampling, step, drafting, start)

    def _evaluate(
        self, batch: Batch, sampling: SamplingParams, step: int, drafting: bool, start: float
    ) -> Rollouts:
        _check_count("step", step)
        of_kind("sampling", sampling, SamplingParams, "SamplingParams")
        history = None
        if drafting:
            _check_drafting(self.engine)
            history = History(
                token_ids=torch.empty(0, dtype=torch.int32),
                cu_lens=torch.zeros(1, dtype=torch.int64),
                row_groups=torch.empty(0, dtype=torch.int64),
                request_groups=batch.groups,
                logprobs=torch.empty(0, dtype=torch.float32),
            )
        keys = noise_keys(self.seed ^ _EVALUATION_SALT, step, batch.keys, batch.sample_ids)
        requests = batch.requests(keys, Drafts.none(batch.size), history)
        rollouts = self._generate(batch, requests, sampling, NoReuse())
        stats = replace(rollouts.stats, rollout_seconds=time.perf_counter() - start)
        return replace(rollouts, stats=stats)

    def _noise_epoch(self, rule: AcceptanceRule, step: int, epoch: int) -> int:
        if rule.fresh_noise:
            return self.noise_offset + step
        return 0 if self.refresh_epochs is None else epoch // self.refresh_epochs

    def _generate(
        self,
        batch: Batch,
        requests: RolloutRequests,
        sampling: SamplingParams,
        rule: AcceptanceRule,
    ) -> Rollouts:
        if not (sampling.stop_token_ids or self._told_of_eos):
            self._told_of_eos = True
            _warn_of_eos(self.engine)
        rollouts = self.engine.rollout(requests, sampling, rule)
        if not (
            torch.equal(rollouts.cu_prompt_lens, batch.cu_prompt_lens)
            and torch.equal(rollouts.prompt_ids, batch.prompt_ids)
        ):
            raise RuntimeError(
                f"engine {type(self.engine).__name__}: expected the {batch.size} requests back in "
                f"order, got {rollouts.batch} rows of other prompts"
            )
        return rollouts if rollouts.ages is not None else with_origins(rollouts, requests.drafts)


def _warn_of_rounding(engine: RolloutEngine, rule: AcceptanceRule) -> None:
    """Says so where a lossless rule meets an engine whose results depend on the batch."""
    if not rule.fresh_noise and rule.lossless and getattr(engine, "batch_invariant", None) is False:
        _LOGGER.warning(
            "%s: the engine's log-probs depend, by rounding, on what is computed together. The law "
            "of the samples stays exact, but near-ties turn: drafts are rejected that the policy "
            "would draw again, and tokens differ from those without a cache. "
            "RolloutSession.measure_rounding says how many; Coupled(tolerance='auto') keeps them, "
            "at a stated bias (docs/acceptance.md)",
            rule,
        )


def _warn_of_eos(engine: RolloutEngine) -> None:
    """Says so where no token ends responses, though the model names one."""
    eos: tuple[int, ...] = getattr(engine, "eos_token_ids", ())
    if eos:
        _LOGGER.warning(
            "sampling: no stop_token_ids, so responses go on to max_tokens, past the model's end "
            "of text; SamplingParams(stop_token_ids=%s) would end them there",
            eos,
        )


def _check_drafting(engine: RolloutEngine) -> None:
    if not engine.supports_history:
        raise ValueError(
            f"drafting: expected False with {type(engine).__name__}, which does not propose from "
            "history; got True"
        )


def _end_at_stop(drafts: Drafts, stop_token_ids: Sequence[int]) -> Drafts:
    """Cuts each draft after its first stop token.

    Such a draft is finished, one without a stop token is not, whatever the stop tokens were when
    it was drawn.
    """
    lens, stopped = lens_to_stop(drafts.token_ids.numpy(), drafts.cu_lens.numpy(), stop_token_ids)
    cut = drafts.cut_to(torch.from_numpy(lens))
    return replace(cut, finished=torch.from_numpy(stopped))


def _check_count(name: str, value: int) -> None:
    if integer(name, value) < 0:
        raise ValueError(f"{name}: expected >= 0, got {value}")
