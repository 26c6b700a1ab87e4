"""What a training run is made of: one frozen dataclass per component, validated on construction.

`config.toml` reads and writes them. Unset is `None` ("none" in a file). Relative paths are
relative to the working directory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # torch comes with these; a command line is read without it
    from spec_rollout.acceptance import AcceptanceRule, Schedule
    from spec_rollout.types import SamplingParams


class ConfigError(ValueError):
    """A value in the config is not usable; the message names section and key."""


def _require(ok: bool, key: str, expected: str, got: object) -> None:
    if not ok:
        raise ConfigError(f"{key}: expected {expected}, got {got!r}")


def _at_least(minimum: int, section: str, config: object, *names: str) -> None:
    """Each named field is None or at least `minimum`."""
    for name in names:
        value = getattr(config, name)
        _require(
            value is None or value >= minimum, f"{section}.{name}", f"at least {minimum}", value
        )


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The policy.

    Attributes:
        path: Folder with a Hugging Face causal language model and its tokenizer.
        dtype: Of the weights, in training and in rollouts. In 16-bit weights the small steps of RL
            get lost.
        device: "auto" takes the first GPU if there is one.
        attention: Attention implementation, as transformers names it.
        reference: Folder of the KL reference; None takes the policy as it was at the start.
    """

    path: str
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "auto"
    attention: str = "sdpa"
    reference: str | None = None


@dataclass(frozen=True, slots=True)
class DataConfig:
    """Training prompts.

    Attributes:
        path: .jsonl or .parquet file; one row per prompt.
        prompt_column: Text, token ids or chat messages. "a.b" is the key b of the column a.
        answer_column: Handed to the rewards as `answer`; None if there is none. "a.b" as above.
        max_rows: Take only the first rows.
        max_prompt_tokens: Longer prompts are treated as `long_prompts` says.
        long_prompts: "error", or "drop" (counted in the summary).
        shuffle: New order each epoch, from the seed.
        chat_template: Put text prompts through the tokenizer's chat template; None does so where
            there is one. False leaves texts as they are and takes no chat messages.
        system_prompt: First message of each chat that does not begin with one of its own.
        continue_final_message: Where the last message is the assistant's, responses continue it.
            Otherwise such a row is an error.
        template_time: What the chat template sees as the time now, ISO 8601; None is the time when
            the run starts, which its config.toml keeps if the template asks for it.
    """

    path: str
    prompt_column: str = "prompt"
    answer_column: str | None = "answer"
    max_rows: int | None = None
    max_prompt_tokens: int | None = None
    long_prompts: Literal["error", "drop"] = "error"
    shuffle: bool = True
    chat_template: bool | None = None
    system_prompt: str | None = None
    continue_final_message: bool = False
    template_time: str | None = None

    def __post_init__(self) -> None:
        _at_least(1, "data", self, "max_rows", "max_prompt_tokens")
        _require(
            self.system_prompt is None or self.chat_template is not False,
            "data.system_prompt",
            "to be left out with data.chat_template = false",
            self.system_prompt,
        )
        if self.template_time is not None:
            try:
                datetime.fromisoformat(self.template_time)
            except ValueError:
                raise ConfigError(
                    "data.template_time: expected a time like 2026-01-31T09:00:00, got "
                    f"{self.template_time!r}"
                ) from None


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
        max_verify_tokens, verify_chunk, batch_invariant: See `TransformersEngine`; the engine vllm
            has none of them.
        reuse: False turns drafts off (the rule still decides which noise is used).
        drafting: Propose from the prompt's other rollouts where there is no draft to follow
            (`RolloutSession`): fewer decoding steps, the same tokens.
        rule: Acceptance rule (classes of `spec_rollout.acceptance`).
        log_lenience: Of the rules lenient and coupled; None is the rule's usual value (0.5 and 0).
        scale, min_target_prob: Of the rule lenient.
        reuse_prob: Of the rule random_reuse.
        start_log_lenience, schedule_steps: Move `log_lenience` linearly from the first value over
            this many steps.
        refresh_epochs: Epochs after which the rule coupled draws new noise; None never does.
        cache_max_bytes: Bound of the rollout cache; None is unbounded.
        cache_path: Cache file of an earlier run to start from.
    """

    engine: Literal["transformers", "vllm"] = "transformers"
    num_samples: int = 8
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_tokens: int = 256
    stop_tokens: tuple[str, ...] | None = None
    num_slots: int = 64
    max_verify_tokens: int = 2048
    verify_chunk: int = 32
    batch_invariant: bool | None = None
    reuse: bool = True
    drafting: bool = False
    rule: Literal["lenient", "coupled", "one_hot", "random_reuse", "random_cut", "none"] = "coupled"
    log_lenience: float | None = None
    scale: float = 1.0
    min_target_prob: float = 0.0
    reuse_prob: float = 0.5
    start_log_lenience: float | None = None
    schedule_steps: int = 0
    refresh_epochs: int | None = None
    cache_max_bytes: int | None = None
    cache_path: str | None = None

    def __post_init__(self) -> None:
        _at_least(
            1,
            "rollout",
            self,
            *("num_samples", "num_slots", "max_verify_tokens", "verify_chunk"),
            *("refresh_epochs", "cache_max_bytes"),
        )
        _require(
            self.temperature > 0,
            "rollout.temperature",
            "a positive number (greedy samples of a group are all equal)",
            self.temperature,
        )
        if self.log_lenience is not None and self.rule not in ("lenient", "coupled"):
            raise ConfigError(
                f"rollout.log_lenience: expected to be left out with rule {self.rule!r} "
                f"(only lenient and coupled have one), got {self.log_lenience!r}"
            )
        _require(
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
            raise ConfigError(f"rollout.{error}") from None

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
                return Lenient(lenience, self.scale, self.min_target_prob)
            case "coupled":
                return Coupled(self.log_lenience or 0.0)
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
        kv_cache_gib: Memory of the KV cache; None is what `gpu_memory_utilization` leaves, on a CPU
            what `num_slots` rollouts need, at most 4.
    """

    strategy: Literal["inflight", "two_pass"] = "inflight"
    num_speculative_tokens: int = 64
    first_chunk: int | None = None
    max_num_batched_tokens: int | None = None
    enforce_eager: bool | None = None
    gpu_memory_utilization: float = 0.4
    kv_cache_gib: float | None = None

    def __post_init__(self) -> None:
        _at_least(
            1,
            "vllm",
            self,
            *("num_speculative_tokens", "first_chunk", "max_num_batched_tokens"),
        )
        for key in ("gpu_memory_utilization", "kv_cache_gib"):
            value = getattr(self, key)
            _require(value is None or value > 0, f"vllm.{key}", "a positive number", value)


@dataclass(frozen=True, slots=True)
class RewardConfig:
    """Verifiable rewards.

    Attributes:
        functions: "package.module:function" each, or a built-in name (`rewards.BUILTIN`).
        weights: One per function; None weighs all 1.
        keep_special_tokens: Special tokens are part of the response that the functions get, but for
            the stop token at its end.
        folder: Where modules of `functions` are looked for first. The command `train` takes the
            folder of its config file.
    """

    functions: tuple[str, ...] = ("exact_match",)
    weights: tuple[float, ...] | None = None
    keep_special_tokens: bool = False
    folder: str | None = None

    def __post_init__(self) -> None:
        _require(len(self.functions) >= 1, "reward.functions", "at least one", self.functions)
        _require(
            self.weights is None or len(self.weights) == len(self.functions),
            "reward.weights",
            f"one per function ({len(self.functions)})",
            self.weights,
        )
        _require(
            all(math.isfinite(weight) for weight in self.weights or ()),
            "reward.weights",
            "finite numbers",
            self.weights,
        )


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """The policy update.

    Attributes:
        algorithm: Name of the algorithm (`spec_rollout.train.algorithms`), which has its settings
            from this section.
        seed: Of data order, noise and everything else.
        prompts_per_step: Prompts (groups) per step.
        epochs: Passes over the data; None is bounded by `max_steps` only.
        max_steps: Stop after this many steps.
        minibatches: Optimizer steps a batch of rollouts is split into, group by group.
        micro_batch_tokens: Tokens (padding included) of one forward and backward pass; gradients
            accumulate.
        lr, betas, eps, weight_decay: Of AdamW; weight decay spares vectors (norms, biases).
        warmup_steps: Steps of linear warm-up.
        grad_clip: Largest gradient norm; None does not clip.
        clip_low, clip_high: The ratio is clipped to [1 - clip_low, 1 + clip_high].
        kl_coef: Weight of the KL to the reference; 0 needs no reference.
        loss_aggregation: "token_mean" over all tokens of a minibatch, or "seq_mean": over responses
            of their means.
        normalize_advantages: Divide by the group's standard deviation.
        recompute_logprobs: Take old log-probs from a forward pass of the trainer instead of the
            engine's own pass.
        skip_zero_advantage: Leave responses without advantage out of the forward pass. Same
            gradient (needs kl_coef = 0), but entropy, KL and clip fraction are then of the rest
            only.
        threads: CPU threads; None leaves torch's choice.
    """

    algorithm: str = "grpo"
    seed: int = 0
    prompts_per_step: int = 32
    epochs: int | None = 1
    max_steps: int | None = None
    minibatches: int = 1
    micro_batch_tokens: int = 4096
    lr: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 0
    grad_clip: float | None = 1.0
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 0.0
    loss_aggregation: Literal["token_mean", "seq_mean"] = "token_mean"
    normalize_advantages: bool = True
    recompute_logprobs: bool = False
    skip_zero_advantage: bool = False
    threads: int | None = None

    def __post_init__(self) -> None:
        _at_least(
            1,
            "train",
            self,
            *("prompts_per_step", "minibatches", "micro_batch_tokens"),
            *("epochs", "max_steps", "threads"),
        )
        _require(
            self.epochs is not None or self.max_steps is not None,
            "train.epochs",
            "a number, since train.max_steps is left out",
            None,
        )
        _require(0 <= self.lr < math.inf, "train.lr", "a finite number >= 0", self.lr)
        _require(all(0 <= b < 1 for b in self.betas), "train.betas", "0 <= value < 1", self.betas)
        _require(self.eps > 0, "train.eps", "a positive number", self.eps)
        _at_least(0, "train", self, "weight_decay", "warmup_steps", "kl_coef")
        grad_clip_ok = self.grad_clip is None or self.grad_clip > 0
        _require(grad_clip_ok, "train.grad_clip", "a positive number", self.grad_clip)
        _require(0 < self.clip_low <= 1, "train.clip_low", "0 < value <= 1", self.clip_low)
        _require(self.clip_high > 0, "train.clip_high", "a positive number", self.clip_high)
        _require(
            not (self.skip_zero_advantage and self.kl_coef > 0),
            "train.skip_zero_advantage",
            "false when train.kl_coef > 0 (such responses then have a gradient)",
            True,
        )


@dataclass(frozen=True, slots=True)
class EvalConfig:
    """Evaluation by fresh plain sampling of the current weights; cached rollouts play no part.

    Attributes:
        path: Held-out rows, same columns as the training data; None evaluates training prompts
            only.
        num_train_prompts: Training prompts evaluated (the first rows); 0 is none.
        num_heldout_prompts: Held-out prompts evaluated; None is all.
        num_samples: Responses per prompt.
        temperature: 0 is greedy; None is the rollouts' temperature.
        correct_at: A response counts as correct from this reward on.
        at_start, at_end: Evaluate before the first and after the last update.
        every_steps: Also evaluate after every so many steps.
    """

    path: str | None = None
    num_train_prompts: int = 64
    num_heldout_prompts: int | None = None
    num_samples: int = 4
    temperature: float | None = None
    correct_at: float = 1.0
    at_start: bool = True
    at_end: bool = True
    every_steps: int | None = None

    def __post_init__(self) -> None:
        _at_least(0, "eval", self, "num_train_prompts", "temperature")
        _at_least(1, "eval", self, "num_heldout_prompts", "num_samples", "every_steps")


@dataclass(frozen=True, slots=True)
class CheckpointConfig:
    """Resumable checkpoints, written whole or not at all.

    Attributes:
        every_steps: None writes one at the end and when interrupted only.
        keep_last: Older ones are removed.
        at_end: Write one after the last step (its folder `model` loads with `from_pretrained`).
    """

    every_steps: int | None = None
    keep_last: int = 2
    at_end: bool = True

    def __post_init__(self) -> None:
        _at_least(1, "checkpoint", self, "every_steps", "keep_last")


@dataclass(frozen=True, slots=True)
class LogConfig:
    """What a run writes.

    Attributes:
        run_dir: New or empty folder for config.toml, metrics.jsonl, samples.jsonl, summary.json,
            checkpoints.
        progress: Progress bar: "auto" shows it on a terminal only.
        samples_per_step: Rollouts of each step written to samples.jsonl.
    """

    run_dir: str = "runs/train"
    progress: Literal["auto", "on", "off"] = "auto"
    samples_per_step: int = 2

    def __post_init__(self) -> None:
        _require(self.run_dir != "", "log.run_dir", "a folder", self.run_dir)
        _at_least(0, "log", self, "samples_per_step")


@dataclass(frozen=True, slots=True)
class RunConfig:
    """A whole run. Sections of the TOML file are the fields of this class."""

    model: ModelConfig
    data: DataConfig
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    vllm: VLLMConfig = field(default_factory=VLLMConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        two_pass = self.rollout.engine == "vllm" and self.vllm.strategy == "two_pass"
        _require(
            not (two_pass and self.rollout.drafting),
            "rollout.drafting",
            "false with vllm.strategy = 'two_pass', which does not propose from history",
            self.rollout.drafting,
        )
        if self.train.recompute_logprobs:
            return
        for key, off in (("top_k", 0), ("top_p", 1.0)):
            value = getattr(self.rollout, key)
            if value != off:
                raise ConfigError(
                    f"rollout.{key}: expected train.recompute_logprobs = true with it (the "
                    "engine's log-probs are "
                    f"of the filtered distribution, the trainer's of the whole), got {value!r}"
                )
