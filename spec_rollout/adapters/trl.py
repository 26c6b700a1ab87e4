"""TRL's `GRPOTrainer` with drafts from the epoch before.

    from spec_rollout.adapters.trl import SpecRollout
    trainer = GRPOTrainer(..., rollout_func=SpecRollout())

All of TRL that this package touches is named in `trl_contract`.
"""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from spec_rollout.acceptance import AcceptanceRule, Coupled, Schedule
from spec_rollout.adapters.rows import Gather, NamedRollouts, RowNumbers, alone, share, split_rows
from spec_rollout.adapters.trl_contract import (
    check_trainer,
    gather_objects,
    is_server,
    is_sharded,
    plug_into_engines,
    sampling,
)
from spec_rollout.adapters.trl_server import Server
from spec_rollout.cache import RolloutCache
from spec_rollout.engines.base import RolloutEngine
from spec_rollout.keys import prompt_key
from spec_rollout.rollout import RolloutSession
from spec_rollout.types import Rollouts, RolloutStats

_NUM_SPECULATIVE_TOKENS = 64
_NUM_SLOTS = 64

LogProbs = Literal["auto", "current", "behaviour"]


@dataclass(frozen=True, slots=True)
class Turn:
    """What the model said in one turn.

    Attributes:
        completion_ids: Token ids per row.
        logprobs: Of each of these tokens, for TRL's importance sampling correction.
    """

    completion_ids: list[list[int]]
    logprobs: list[list[float]]


@dataclass(slots=True)
class _Told:
    """A row of the running step: who it is, and what was said so far."""

    ids: list[int]  # prompt and completion
    user_key: str  # of the next turn


class SpecRollout:
    """A `rollout_func` for `GRPOTrainer` that reuses the rollouts of the epoch before.

    It generates with what the trainer has: the colocated vLLM (`use_vllm=True`), the trainer's own
    model otherwise (the embedded engine), or a vLLM server (`vllm_mode="server"`), which remembers
    by itself and is told the samples' names. One object serves one trainer.

    With a server, rule, drafting, seed and memory are those of its SPEC_ROLLOUT: of the arguments
    only `reuse` and `refresh_epochs` have an effect, a rule has to be the server's, and any other
    that is given is refused. Its log-probs are those of the current policy under any rule, nothing
    goes to TRL's metrics, and `cache` and `last_stats` stay empty.

    A row is known by its prompt's token ids and its number among the rows of that prompt, counted
    over all ranks: shuffling, several processes and gradient accumulation change nothing. Each rank
    keeps the rollouts of all ranks, or all have them in one `RayStore`. Turns after a tool call
    (`tools=`, `environment_factory=`) are rows of their own, whose prompt holds the turns before;
    what tools say is prompt there and never a draft. Evaluation draws fresh samples and does not
    touch the cache.

    Make it before the trainer: TRL builds its vLLM without asking, and this object sees to it that
    engines built from then on run the plugin.

    Args:
        rule: Acceptance rule or schedule; `Coupled()` is lossless, `Lenient(0.5)` is SPEC-RL's.
        drafting: Also propose what earlier rollouts say where no draft is followed (lossless).
        refresh_epochs: As in `RolloutSession`.
        reuse: False generates without drafts, under the same noise; for comparisons. A server is
            told no samples then: it draws with fresh noise.
        cache: Holds the drafts; None is one in memory without a bound. `cache.save(path)` and
            `load`, before the first rollout, carry it over to a resumed run. One over a `RayStore`
            is that of all ranks.
        logprobs: Which log-probs TRL is given: `current`, of the policy that it trains;
            `behaviour`, those with which reused tokens were first drawn, so that TRL's correction
            of a colocated vLLM acts on them (without vLLM TRL has none: only
            `off_policy_mask_threshold` reads them); `auto`, `current` for lossless rules (whose
            tokens are the current policy's) and `behaviour` for others.
        seed: Of the noise; None is the trainer's.
        num_speculative_tokens: Most draft tokens of a request that one step of vLLM verifies.
        num_slots: Responses that the embedded engine decodes at a time.

    Attributes:
        cache: See above.
        engine: The engine; None before the first rollout, and with a server.
        last_stats: What the last rollout of this rank counted.
    """

    def __init__(
        self,
        rule: AcceptanceRule | Schedule | None = None,
        *,
        drafting: bool = True,
        refresh_epochs: int | None = None,
        reuse: bool = True,
        cache: RolloutCache | None = None,
        logprobs: LogProbs = "auto",
        seed: int | None = None,
        num_speculative_tokens: int = _NUM_SPECULATIVE_TOKENS,
        num_slots: int = _NUM_SLOTS,
    ) -> None:
        if logprobs not in ("auto", "current", "behaviour"):
            raise ValueError(f"logprobs: expected auto, current or behaviour, got {logprobs!r}")
        self._has_rule = rule is not None
        own_rule = Coupled() if rule is None else rule
        self.schedule = own_rule if isinstance(own_rule, Schedule) else Schedule(own_rule)
        self.cache = RolloutCache() if cache is None else cache
        self.engine: RolloutEngine | None = None
        self.last_stats = RolloutStats()
        self._drafting = drafting
        self._refresh_epochs = refresh_epochs
        self._reuse = reuse
        self._logprobs = logprobs
        self._seed = seed
        self._num_slots = num_slots
        # What a server cannot be told.
        self._not_for_a_server = [
            name
            for name, is_given in (
                ("drafting", not drafting),
                ("cache", cache is not None),
                ("logprobs", logprobs == "behaviour"),
                ("seed", seed is not None),
                ("num_speculative_tokens", num_speculative_tokens != _NUM_SPECULATIVE_TOKENS),
                ("num_slots", num_slots != _NUM_SLOTS),
            )
            if is_given
        ]
        self._trainer: Any = None
        self._session: RolloutSession | None = None
        self._server: Server | None = None
        self._gather: Gather = alone
        self._rank = 0
        self._numbers = self._eval_numbers = RowNumbers()
        self._told: list[_Told] = []
        self._to_share: list[NamedRollouts] = []
        self._loaded_step = -1
        self._train_state: Any = None
        plug_into_engines(num_speculative_tokens, drafting=drafting)

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """TRL's `RolloutFunc`: a completion for each prompt, as they are repeated already."""
        prompt_ids, images, _ = trainer._tokenize_prompts(prompts)
        if images is not None:
            raise ValueError("prompts: expected text only with SpecRollout, got images")
        turn = self.first_turn(prompt_ids, trainer)
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": turn.completion_ids,
            "logprobs": turn.logprobs,
        }

    def first_turn(self, prompt_ids: Sequence[list[int]], trainer: Any) -> Turn:
        """A completion for each row; for a `rollout_func` of your own.

        Every rank calls it at the same time.

        Args:
            prompt_ids: Token ids of each row's prompt, each repeated as often as it has samples.
            trainer: The `GRPOTrainer`.
        """
        self._attach(trainer)
        self._told = []
        keys = [prompt_key(ids) for ids in prompt_ids]
        if not trainer.model.training:
            samples = self._eval_numbers.next(keys, trainer.state.global_step)
            if self._server is not None:
                return Turn(*self._server.generate(prompt_ids, samples, is_eval=True))
            user_keys = [f"evaluation {n}" for n in samples.tolist()]
            turn = self._evaluate(prompt_ids, user_keys)
            self._tell(turn, prompt_ids, user_keys)
            return turn
        share(self.cache, self._to_share, self._gather, self._rank)
        self._to_share = []
        self._begin_run(trainer.state)
        samples = self._numbers.next(keys, trainer.state.global_step)
        if self._server is not None:
            return Turn(*self._server.generate(prompt_ids, samples, is_eval=False))
        turn = self._generate(prompt_ids, samples, [""] * len(keys))
        self._tell(
            turn,
            prompt_ids,
            [f"{key.hex()} {n}" for key, n in zip(keys, samples.tolist(), strict=True)],
        )
        return turn

    def next_turn(self, prompt_ids: Sequence[list[int]], trainer: Any) -> Turn:
        """Completions of rows of the last turn that go on.

        Ranks may call it as often as they need: nothing is exchanged. (In vLLM's sleep mode each
        call loads the weights again, and reading those that are spread over ranks is a call of all
        of them together: that is refused.)

        Args:
            prompt_ids: Of some of the rows, in their order: prompt, completion and what the
                environment answered.
            trainer: The `GRPOTrainer`.

        Raises:
            ValueError: if one does not begin as a row of the last turn; with a server, which all
                ranks ask at the same time; in sleep mode with weights that are spread over ranks.
        """
        if is_server(trainer):
            raise ValueError(
                "vllm_mode: expected colocate with next_turn, got server: take further turns from "
                "trainer.vllm_generation there"
            )
        if trainer.use_vllm and is_sharded(trainer) and trainer.vllm_generation.enable_sleep_mode:
            raise ValueError(
                "vllm_enable_sleep_mode: expected False with further turns (next_turn, tools) and "
                "weights that FSDP or DeepSpeed ZeRO-3 spread over ranks, got True: a turn loads "
                "them again, which waits for ranks that have no further turn"
            )
        user_keys = self._who_goes_on(prompt_ids)
        if not trainer.model.training:
            turn = self._evaluate(prompt_ids, user_keys)
        else:
            turn = self._generate(prompt_ids, np.zeros(len(user_keys), np.int64), user_keys)
        self._tell(turn, prompt_ids, user_keys)
        return turn

    # -- identity ---------------------------------------------------------------------------------

    def _tell(self, turn: Turn, prompt_ids: Sequence[list[int]], user_keys: Sequence[str]) -> None:
        """Notes what was said, so that it is known whose next turn it is."""
        self._told = [
            _Told([*prompt, *completion], f"{user_key} next")
            for prompt, completion, user_key in zip(
                prompt_ids, turn.completion_ids, user_keys, strict=True
            )
        ]

    def _who_goes_on(self, prompt_ids: Sequence[list[int]]) -> list[str]:
        rows = iter(self._told)
        user_keys = []
        for index, ids in enumerate(prompt_ids):
            row = next((row for row in rows if ids[: len(row.ids)] == row.ids), None)
            if row is None:
                raise ValueError(
                    f"prompt_ids[{index}]: expected it to begin as a row of the last turn, in the "
                    "order of the rows"
                )
            user_keys.append(row.user_key)
        return user_keys

    # -- generation -------------------------------------------------------------------------------

    def _generate(
        self, prompt_ids: Sequence[list[int]], samples: np.ndarray, user_keys: Sequence[str]
    ) -> Turn:
        trainer, session = self._trainer, self._session
        assert session is not None
        if not prompt_ids:
            return Turn([], [])
        step = trainer.state.global_step
        with self._engine_awake():
            rollouts = session.rollout_rows(
                prompt_ids,
                samples,
                sampling(trainer),
                step=step,
                epoch=int(trainer.state.epoch or 0),
                user_keys=user_keys,
            )
        if trainer.accelerator.num_processes > 1 and (self._reuse or self._drafting):
            keys = [prompt_key(ids, k) for ids, k in zip(prompt_ids, user_keys, strict=True)]
            self._to_share.append(NamedRollouts(keys, samples, rollouts))
        self._log(rollouts.stats)
        return _turn(rollouts, self._wanted_logprobs(rollouts, step))

    def _evaluate(self, prompt_ids: Sequence[list[int]], user_keys: Sequence[str]) -> Turn:
        trainer, session = self._trainer, self._session
        assert session is not None
        if not prompt_ids:
            return Turn([], [])
        with self._engine_awake():
            rollouts = session.evaluate(
                prompt_ids,
                1,
                sampling(trainer),
                step=trainer.state.global_step,
                user_keys=user_keys,
            )
        return _turn(rollouts, rollouts.logprobs)

    def _wanted_logprobs(self, rollouts: Rollouts, step: int) -> torch.Tensor:
        wanted = self._logprobs
        if wanted == "auto":
            wanted = "current" if self.schedule.at(step).lossless else "behaviour"
        if wanted == "current":
            return rollouts.logprobs
        if rollouts.behaviour_logprobs is None:
            raise ValueError(
                "logprobs: expected drafts with log-probs for 'behaviour', got some without "
                "(RolloutCache(keep_logprobs=False))"
            )
        return rollouts.behaviour_logprobs

    def _log(self, stats: RolloutStats) -> None:
        """Into TRL's metrics, which average over ranks."""
        self.last_stats = stats
        values = {
            **stats.ratios(),
            "draft_fraction": stats.num_drafts / max(1, stats.num_rollouts),
            "engine_steps": stats.num_engine_steps,
            "rollout_seconds": stats.rollout_seconds,
        }
        for name, value in values.items():
            self._trainer._log_metric(f"spec_rollout/{name}", float(value))

    # -- the trainer's engines --------------------------------------------------------------------

    def _attach(self, trainer: Any) -> None:
        """Sets up for a trainer at its first rollout."""
        if trainer is self._trainer:
            return
        if self._trainer is not None:
            raise ValueError("trainer: expected the one of the first rollout, got another")
        check_trainer(trainer)
        accelerator = trainer.accelerator
        self._rank = accelerator.process_index
        if accelerator.num_processes > 1:
            self._gather = gather_objects
        self._numbers = RowNumbers(self._gather, self._rank)
        self._eval_numbers = RowNumbers(self._gather, self._rank)
        if is_server(trainer):
            self._check_arguments()
            self._server = Server(
                trainer,
                self._gather,
                self._rank,
                reuse=self._reuse,
                refresh_epochs=self._refresh_epochs,
            )
            rule = self._server.rule
            if rule is not None and self._has_rule and self.schedule != Schedule(rule):
                raise ValueError(
                    f"rule: expected that of the server, {rule} (SPEC_ROLLOUT in its environment), "
                    f"or none, got {self.schedule.at(0)}"
                )
            if self._reuse and rule is not None and not rule.lossless:
                _warn_of_bias(rule, "TRL is given the current policy's log-probs by a server")
        else:
            rules = (self.schedule.at(0), self.schedule.rule)
            rule = next((rule for rule in rules if not rule.lossless), None)
            is_told = self._reuse and not trainer.use_vllm and accelerator.is_main_process
            if rule is not None and is_told:
                _warn_of_bias(rule, "TRL corrects nothing with use_vllm=False")
            self.engine = self._make_engine(trainer)
            self._session = RolloutSession(
                self.engine,
                self.schedule,
                cache=self.cache,
                seed=trainer.args.seed if self._seed is None else self._seed,
                refresh_epochs=self._refresh_epochs,
                reuse=self._reuse,
                drafting=self._drafting,
                noise_offset=self._noise_offset(),
            )
            trainer._generate_single_turn = self._single_turn
        self._trainer = trainer

    def _begin_run(self, state: Any) -> None:
        """Notices another call of `train`, whose steps have numbers that this one had."""
        if state is self._train_state:
            return
        if self._train_state is not None:
            self._loaded_step = -1
            if self._session is not None:
                self._session.noise_offset += self._noise_offset()
        self._train_state = state

    def _check_arguments(self) -> None:
        """Refuses what a server would not heed."""
        if self._not_for_a_server:
            raise ValueError(
                f"{', '.join(self._not_for_a_server)}: expected to be left out of SpecRollout with "
                'vllm_mode "server", whose SPEC_ROLLOUT decides instead, got one given'
            )

    def _noise_offset(self) -> int:
        """Keeps fresh noise apart from that which drew what the cache holds already."""
        if not self.cache.is_shared:
            return self.cache.fingerprint()
        # What all machines hold would take too long to read. One number for all ranks; those who
        # wait here have stored nothing since the run began.
        told = self._gather((self.cache.stats.num_samples, secrets.randbits(62)))
        return told[0][1] if any(num_samples for num_samples, _ in told) else 0

    def _make_engine(self, trainer: Any) -> RolloutEngine:
        if trainer.use_vllm:
            from spec_rollout.engines.vllm import VLLMEngine

            return VLLMEngine.wrap(trainer.vllm_generation.llm)
        from spec_rollout.engines.transformers import TransformersEngine

        return TransformersEngine(trainer.model, num_slots=self._num_slots)

    def _single_turn(
        self, prompt_ids: Any, images: Any, fields: Any, num_generations: int, **_: Any
    ) -> tuple[list[list[int]], list[list[float]]]:
        """In the place of TRL's, which its loop over tool calls asks for the turns after."""
        if images is not None:
            raise ValueError("images: expected none with SpecRollout, got some from a tool")
        turn = self.next_turn(prompt_ids, self._trainer)
        return turn.completion_ids, turn.logprobs

    @contextmanager
    def _engine_awake(self) -> Iterator[None]:
        """The engine with the trainer's weights and its memory, as TRL's `generate` has it."""
        trainer = self._trainer
        if not trainer.use_vllm:  # the embedded engine runs the trainer's own model
            yield
            return
        generation = trainer.vllm_generation
        sleeps = generation.enable_sleep_mode
        if sleeps and generation._llm_weights_sleeping:
            generation.sync_weights()
            self._loaded_step = -1
        if self._loaded_step != trainer.state.global_step:
            generation.llm.collective_rpc("spec_rollout_weights_loaded")
            self._loaded_step = trainer.state.global_step
        if sleeps:
            generation.llm.wake_up(tags=["kv_cache"])
        try:
            yield
        finally:
            if sleeps:
                generation.llm.sleep(level=2)
                generation._llm_weights_sleeping = True


def _turn(rollouts: Rollouts, logprobs: torch.Tensor) -> Turn:
    cu_lens = rollouts.cu_response_lens
    return Turn(split_rows(rollouts.response_ids, cu_lens), split_rows(logprobs, cu_lens))


def _warn_of_bias(rule: AcceptanceRule, why: str) -> None:
    warnings.warn(
        f"{rule}: reused tokens are trained on as if the current policy had drawn them: {why}, and "
        "vllm_importance_sampling_correction acts on reused tokens with a colocated vLLM only",
        stacklevel=2,
    )


__all__ = ["SpecRollout", "Turn"]
