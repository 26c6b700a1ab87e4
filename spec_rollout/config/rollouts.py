"""How responses are generated: sampling, reuse, engines."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

from spec_rollout.config.checks import ConfigError, at_least, require

if TYPE_CHECKING:  # torch comes with these; a command line is read without it
    from spec_rollout.acceptance import AcceptanceRule, Schedule
    from spec_rollout.types import SamplingParams

_POOL = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)  # as `spec_rollout.cache.RayStore` wants it

# Settings that only some rules have, and which.
_RULES = {
    "log_lenience": ("lenient", "coupled"),
    "tolerance": ("lenient", "coupled"),
    "scale": ("lenient",),
    "min_target_prob": ("lenient",),
    "reuse_prob": ("random_reuse",),
}
# Arguments of rules and schedules that are called otherwise here.
_KEYS = {"prob": "reuse_prob", "num_steps": "schedule_steps"}


@dataclass(frozen=True, slots=True)
class RolloutConfig:
    """How responses are generated and what of the previous ones is reused.

    Attributes:
        engine: "transformers" (embedded, with the policy's own weights) or "vllm" (in this process,
            with a copy of them; section `vllm`).
        num_samples: Responses per prompt (the group).
        temperature: Of sampling, positive.
        top_k: Sample from the k likeliest tokens; 0 is off.
        top_p: Then from the likeliest that reach this probability together; 1 is off.
        max_tokens: Longest response, reused tokens included.
        stop_tokens: Token strings that end a response; None takes the model's end-of-sequence
            tokens.
        num_slots: Rollouts generated at once.
        max_model_len: Most tokens of prompt and response together; None is as many as the model
            takes, and with the engine vllm as many as the prompts and `max_tokens` want.
        check_model: Refuse a model whose rows depend on each other (docs/models.md), in rollouts
            or when they are padded for training.
        max_verify_tokens, verify_chunk, batch_invariant: See `TransformersEngine`; the engine vllm
            has none of them.
        reuse: False turns drafts off (the rule still decides which noise is used).
        drafting: Propose from the prompt's other rollouts where there is no draft to follow
            (`RolloutSession`): fewer decoding steps, the same tokens.
        rule: Acceptance rule (classes of `spec_rollout.acceptance`).
        log_lenience: Of the rules lenient and coupled; None is 0 for coupled, and for lenient what
            is published for the algorithm (GRPO 0.5, PPO 0.3, DAPO 0.15).
        scale, min_target_prob: Of the rule lenient.
        tolerance: Of the rules lenient and coupled: nats that rounding may take without a token
            being rejected, or "auto", the measured rounding of the engine (docs/acceptance.md).
        reuse_prob: Of the rule random_reuse.
        start_log_lenience, schedule_steps: Move `log_lenience` linearly from the first value over
            this many steps.
        lenience_budget: Let `log_lenience` follow a budget instead (rule lenient): "kl_reused",
            "reused_fraction" or "new_per_prompt" (docs/metrics.md) is held at `lenience_target`.
            `log_lenience` is where it starts.
        lenience_target: Of the budget.
        lenience_gain: Most that `log_lenience` moves in a step.
        lenience_range: Least and largest `log_lenience` of a budget.
        fresh_share: Share of each group that is drawn from scratch; the samples take turns from
            epoch to epoch. Not with the rule coupled, whose noise would draw the same again.
        max_age: A draft with a token drawn more epochs ago is not reused; None has no limit.
        refresh_epochs: Epochs after which the rule coupled draws new noise; None never does.
        cache_max_bytes: Bound of the rollout cache; None is unbounded. Below the rollouts of an
            epoch most drafts are evicted just before they are wanted.
        cache_path: Cache file of an earlier run to start from.
        cache_store: Where the cached rollouts are: "memory", with a copy in every checkpoint;
            "disk", in a folder to which checkpoints refer (docs/reliability.md; the extra `disk`);
            or "ray", in actors of a Ray cluster, with a copy in every checkpoint (the extra `ray`).
        cache_folder: Of the store on disk; None is `rollouts` in the run's folder. With "ray" an
            absolute path on the machine of each actor; None is the actors' memory.
        cache_ray: With "ray", "namespace/name" of the actors (`spec_rollout.cache.RayStore`).
        cache_actors: With "ray", how many; None takes those that are there, or one.
    """

    engine: Literal["transformers", "vllm"] = "transformers"
    num_samples: int = 8
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_tokens: int = 256
    stop_tokens: tuple[str, ...] | None = None
    num_slots: int = 64
    max_model_len: int | None = None
    check_model: bool = True
    max_verify_tokens: int = 2048
    verify_chunk: int = 32
    batch_invariant: bool | None = None
    reuse: bool = True
    drafting: bool = False
    rule: Literal["lenient", "coupled", "one_hot", "random_reuse", "random_cut", "none"] = "coupled"
    log_lenience: float | None = None
    scale: float = 1.0
    min_target_prob: float = 0.0
    tolerance: float | Literal["auto"] = 0.0
    reuse_prob: float = 0.5
    start_log_lenience: float | None = None
    schedule_steps: int = 0
    lenience_budget: Literal["kl_reused", "reused_fraction", "new_per_prompt"] | None = None
    lenience_target: float | None = None
    lenience_gain: float = 0.1
    lenience_range: tuple[float, float] = (-1.0, 2.0)
    fresh_share: float = 0.0
    max_age: int | None = None
    refresh_epochs: int | None = None
    cache_max_bytes: int | None = None
    cache_path: str | None = None
    cache_store: Literal["memory", "disk", "ray"] = "memory"
    cache_folder: str | None = None
    cache_ray: str | None = None
    cache_actors: int | None = None

    def __post_init__(self) -> None:
        at_least(
            1,
            "rollout",
            self,
            *("num_samples", "num_slots", "max_verify_tokens", "verify_chunk"),
            *("refresh_epochs", "cache_max_bytes", "cache_actors", "max_age"),
        )
        self._check_budget()
        self._check_store()
        share = self.fresh_share
        require(0 <= share <= 1, "rollout.fresh_share", "0 <= value <= 1", share)
        require(
            share == 0 or self.rule != "coupled",
            "rollout.fresh_share",
            "0 with the rule coupled (its noise would draw the same again; see refresh_epochs)",
            share,
        )
        at_least(2, "rollout", self, "max_model_len")
        require(
            self.temperature > 0,
            "rollout.temperature",
            "a positive number (greedy samples of a group are all equal)",
            self.temperature,
        )
        self._check_rule()
        require(
            self.engine != "vllm" or not self.batch_invariant,
            "rollout.batch_invariant",
            "to be left out with the engine vllm",
            self.batch_invariant,
        )
        try:
            self.schedule()
            self.sampling()
        except ConfigError:
            raise
        except ValueError as error:
            name, colon, rest = str(error).partition(":")
            raise ConfigError(f"rollout.{_KEYS.get(name, name)}{colon}{rest}") from None

    def _check_rule(self) -> None:
        """What the rule does not have is not set."""
        defaults = {f.name: f.default for f in fields(self)}
        for key, rules in _RULES.items():
            value, default = getattr(self, key), defaults[key]
            expected = "to be left out" if default is None else f"{default:g}"
            have = "have" if len(rules) > 1 else "has"
            require(
                value == default or self.rule in rules,
                f"rollout.{key}",
                f"{expected} with rule {self.rule!r} (only {' and '.join(rules)} {have} one)",
                value,
            )

    def _check_store(self) -> None:
        store = self.cache_store
        require(
            self.cache_folder is None or store != "memory",
            "rollout.cache_folder",
            "to be left out with cache_store = 'memory'",
            self.cache_folder,
        )
        if store != "ray":
            for key in ("cache_ray", "cache_actors"):
                value = getattr(self, key)
                expected = f"to be left out with cache_store = {store!r}"
                require(value is None, f"rollout.{key}", expected, value)
            return
        require(
            self.cache_ray is not None and _POOL.fullmatch(self.cache_ray) is not None,
            "rollout.cache_ray",
            "namespace/name with cache_store = 'ray' (letters, digits, dots, dashes, underscores)",
            self.cache_ray,
        )
        require(
            self.cache_folder is None or os.path.isabs(self.cache_folder),
            "rollout.cache_folder",
            "an absolute path with cache_store = 'ray' (actors run in folders of their own)",
            self.cache_folder,
        )

    def _check_budget(self) -> None:
        budget, target = self.lenience_budget, self.lenience_target
        if budget is None:
            require(
                target is None,
                "rollout.lenience_target",
                "to be left out without rollout.lenience_budget",
                target,
            )
            return
        require(
            self.rule == "lenient" and self.start_log_lenience is None,
            "rollout.lenience_budget",
            "the rule lenient and no schedule (start_log_lenience) with it",
            budget,
        )
        most = {"reused_fraction": 1.0, "new_per_prompt": float(self.num_samples)}.get(
            budget, math.inf
        )
        require(
            target is not None and 0 < target < most,
            "rollout.lenience_target",
            f"0 < value < {most:g} with lenience_budget = {budget!r}",
            target,
        )
        gain, (low, high) = self.lenience_gain, self.lenience_range
        require(0 < gain < math.inf, "rollout.lenience_gain", "a positive finite number", gain)
        require(
            -math.inf < low < high < math.inf,
            "rollout.lenience_range",
            "two finite numbers, the smaller one first",
            self.lenience_range,
        )
        start = self.log_lenience
        require(
            start is None or low <= start <= high,
            "rollout.log_lenience",
            f"{low:g} to {high:g} (rollout.lenience_range)",
            start,
        )

    def acceptance(self) -> AcceptanceRule:
        """The rule, before any schedule."""
        from spec_rollout.acceptance import (
            Coupled,
            Lenient,
            NoReuse,
            OneHot,
            RandomCut,
            RandomReuse,
        )

        match self.rule:
            case "lenient":
                lenience = 0.5 if self.log_lenience is None else self.log_lenience
                return Lenient(lenience, self.scale, self.min_target_prob, self.tolerance)
            case "coupled":
                return Coupled(self.log_lenience or 0.0, self.tolerance)
            case "one_hot":
                return OneHot()
            case "random_reuse":
                return RandomReuse(self.reuse_prob)
            case "random_cut":
                return RandomCut()
        return NoReuse()

    def schedule(self) -> Schedule:
        """The rule over training steps."""
        from spec_rollout.acceptance import Schedule

        return Schedule(self.acceptance(), self.start_log_lenience, self.schedule_steps)

    def sampling(self, stop_token_ids: tuple[int, ...] = ()) -> SamplingParams:
        """Sampling parameters of training rollouts."""
        from spec_rollout.types import SamplingParams

        return SamplingParams(
            self.temperature, self.top_k, self.top_p, self.max_tokens, stop_token_ids
        )


@dataclass(frozen=True, slots=True)
class VLLMConfig:
    """The engine vllm; without meaning for the engine transformers.

    Attributes:
        strategy: "inflight", or "two_pass", the published design (rule lenient at temperature 1).
        num_speculative_tokens, first_chunk: See `spec_rollout.engines.vllm.engine_args`.
        max_num_batched_tokens: Tokens computed per engine step; None is vLLM's choice.
        enforce_eager: No CUDA graphs; None is true on a CPU.
        gpu_memory_utilization: Share of the device's memory for vLLM; the trainer needs the rest.
        dtype: Of vLLM's copy of the weights; None is `model.dtype`.
        sleep: vLLM gives its memory back during the policy update (its sleep mode, level 1), so
            that both may take most of a GPU.
        kv_cache_gib: Memory of the KV cache; None is what `gpu_memory_utilization` leaves, on a CPU
            what `num_slots` rollouts need, at most 4.
    """

    strategy: Literal["inflight", "two_pass"] = "inflight"
    num_speculative_tokens: int = 64
    first_chunk: int | None = None
    max_num_batched_tokens: int | None = None
    enforce_eager: bool | None = None
    gpu_memory_utilization: float = 0.4
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    sleep: bool = False
    kv_cache_gib: float | None = None

    def __post_init__(self) -> None:
        at_least(
            1,
            "vllm",
            self,
            *("num_speculative_tokens", "first_chunk", "max_num_batched_tokens"),
        )
        for key in ("gpu_memory_utilization", "kv_cache_gib"):
            value = getattr(self, key)
            require(value is None or value > 0, f"vllm.{key}", "a positive number", value)
