"""What a training run is made of: one frozen dataclass per component, validated on construction.

`config.toml` reads and writes them. Unset is `None` ("none" in a file). Relative paths are
relative to the working directory.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from spec_rollout.config.checks import ConfigError, require
from spec_rollout.config.inputs import DataConfig, ModelConfig, RewardConfig
from spec_rollout.config.rollouts import RolloutConfig, VLLMConfig
from spec_rollout.config.training import CheckpointConfig, EvalConfig, LogConfig, TrainConfig

__all__ = [
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "EvalConfig",
    "LogConfig",
    "ModelConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "TrainConfig",
    "VLLMConfig",
]


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
        require(
            not (two_pass and self.rollout.drafting),
            "rollout.drafting",
            "false with vllm.strategy = 'two_pass', which does not propose from history",
            self.rollout.drafting,
        )
        rule, correction = self.rollout.rule, self.train.correction
        require(
            correction == "none" or not self.rollout.acceptance().lossless,
            "train.correction",
            f"'none' with rollout.rule = {rule!r} (it draws every token from the current policy)",
            correction,
        )
        filtered = self.rollout.top_k != 0 or self.rollout.top_p != 1.0
        require(
            correction == "none" or not filtered,
            "train.correction",
            "'none' with rollout.top_k or rollout.top_p (tokens were drawn with log-probs of the "
            "filtered distribution, the trainer's are of the whole)",
            correction,
        )
        buffer, max_tokens = self.train.overlong_buffer, self.rollout.max_tokens
        require(
            buffer is None or buffer <= max_tokens,
            "train.overlong_buffer",
            f"at most rollout.max_tokens ({max_tokens})",
            buffer,
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

    def settled(self) -> RunConfig:
        """The same with the published values of its algorithm written out where they are meant."""
        rollout = self.rollout
        if rollout.rule == "lenient" and rollout.log_lenience is None:
            start = self.train.numbers().log_lenience
            if rollout.lenience_budget is not None:
                low, high = rollout.lenience_range
                start = max(low, min(high, start))
            rollout = replace(rollout, log_lenience=start)
        return replace(self, train=self.train.settled(), rollout=rollout)
