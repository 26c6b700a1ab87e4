"""How a run trains, and what it evaluates, keeps and writes on the way."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Literal

from spec_rollout.config.checks import at_least, require
from spec_rollout.config.published import Published, published


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """The policy update.

    Where None stands for the published value, it is that of the algorithm (`config.published`).

    Attributes:
        algorithm: "grpo", "ppo" or "dapo" (`spec_rollout.train.algorithms`), which has its settings
            from this section.
        seed: Of data order, noise and everything else.
        prompts_per_step: Prompts (groups) per step.
        epochs: Passes over the data; None is bounded by `max_steps` only.
        max_steps: Stop after this many steps.
        minibatches: Optimizer steps a batch of rollouts is split into, group by group.
        micro_batch_tokens: Tokens (padding included) of one forward and backward pass; gradients
            accumulate.
        compute_dtype: "bfloat16" computes matrix products of the trainer's passes in it, over
            weights, gradients and moments of `model.dtype` (autocast); None computes in that.
        gradient_checkpointing: Layers keep their inputs only, and are computed once more in the
            backward pass: less memory, about a third more arithmetic.
        lr: Learning rate; None is the published one, 5e-7.
        critic_lr: Of the value head of PPO; None is the published one, 1e-5.
        betas, eps, weight_decay: Of AdamW; weight decay spares vectors (norms, biases).
        warmup_steps: Steps of linear warm-up.
        grad_clip: Largest gradient norm, of policy and value head each; None does not clip.
        clip_low, clip_high: The ratio is clipped to [1 - clip_low, 1 + clip_high]; None is the
            published range, 0.2 and 0.2, of DAPO 0.2 and 0.28.
        kl_coef: Weight of the KL to the reference; 0 needs no reference. None is the published one,
            1e-4 of GRPO and 0 of others.
        loss_aggregation: "token_mean" over all tokens of a minibatch; "seq_mean": over responses of
            their means; "constant": every token weighs 1 / (responses * rollout.max_tokens), with
            normalize_advantages = false the form of Dr. GRPO.
        normalize_advantages: GRPO and DAPO divide by the group's standard deviation; PPO makes the
            advantages of a batch those of mean 0 and variance 1.
        gamma, gae_lambda: Discount of rewards, and of the errors of the value head (PPO).
        clip_value: Farthest that a value may move in an update before its loss stops counting the
            move as progress (PPO).
        value_coef: Weight of the value loss beside the policy's (PPO). Its gradient reaches the
            policy's weights, too.
        refill_rounds: How often a step draws other prompts in the place of those whose rewards are
            all equal; 0 never does (DAPO).
        overlong_buffer: The last so many tokens before rollout.max_tokens cost reward, the more the
            longer a response is (DAPO). None is a fifth of rollout.max_tokens, as published; 0 is
            off.
        overlong_penalty: What a response of rollout.max_tokens loses by that (DAPO).
        recompute_logprobs: Take old log-probs from a forward pass of the trainer instead of the
            engine's own pass.
        correction: What is done about reused tokens, which an older policy drew: "none";
            "clipped_behaviour": their old log-probs in the clipped ratio are those they were drawn
            with; "truncated": their policy loss is weighted by min(correction_cap, ratio of the
            current policy to the one that drew them).
        correction_cap: See there.
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
    compute_dtype: Literal["bfloat16"] | None = None
    gradient_checkpointing: bool = False
    lr: float | None = None
    critic_lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 0
    grad_clip: float | None = 1.0
    clip_low: float | None = None
    clip_high: float | None = None
    kl_coef: float | None = None
    loss_aggregation: Literal["token_mean", "seq_mean", "constant"] = "token_mean"
    normalize_advantages: bool = True
    gamma: float = 1.0
    gae_lambda: float = 1.0
    clip_value: float = 0.5
    value_coef: float = 0.1
    refill_rounds: int = 3
    overlong_buffer: int | None = None
    overlong_penalty: float = 1.0
    recompute_logprobs: bool = False
    correction: Literal["none", "clipped_behaviour", "truncated"] = "none"
    correction_cap: float = 2.0
    skip_zero_advantage: bool = False
    threads: int | None = None

    def __post_init__(self) -> None:
        at_least(
            1,
            "train",
            self,
            *("prompts_per_step", "minibatches", "micro_batch_tokens"),
            *("epochs", "max_steps", "threads"),
        )
        require(
            self.epochs is not None or self.max_steps is not None,
            "train.epochs",
            "a number, since train.max_steps is left out",
            None,
        )
        numbers = self.numbers()
        for key in ("lr", "critic_lr"):
            value = getattr(numbers, key)
            require(0 <= value < math.inf, f"train.{key}", "a finite number >= 0", value)
        require(all(0 <= b < 1 for b in self.betas), "train.betas", "0 <= value < 1", self.betas)
        require(self.eps > 0, "train.eps", "a positive number", self.eps)
        at_least(0, "train", self, "weight_decay", "warmup_steps", "kl_coef", "refill_rounds")
        at_least(0, "train", self, "overlong_buffer", "overlong_penalty")
        grad_clip_ok = self.grad_clip is None or self.grad_clip > 0
        require(grad_clip_ok, "train.grad_clip", "a positive number", self.grad_clip)
        clip_low, clip_high = numbers.clip_low, numbers.clip_high
        require(0 < clip_low <= 1, "train.clip_low", "0 < value <= 1", clip_low)
        require(clip_high > 0, "train.clip_high", "a positive number", clip_high)
        for key in ("gamma", "gae_lambda"):
            value = getattr(self, key)
            require(0 <= value <= 1, f"train.{key}", "0 <= value <= 1", value)
        for key in ("clip_value", "value_coef", "correction_cap"):
            value = getattr(self, key)
            require(0 < value < math.inf, f"train.{key}", "a positive finite number", value)
        given = "" if self.kl_coef is not None else f" (published for {self.algorithm}: "
        given += "" if self.kl_coef is not None else f"{numbers.kl_coef}; set it to 0)"
        require(
            not (self.skip_zero_advantage and numbers.kl_coef > 0),
            "train.skip_zero_advantage",
            f"false when train.kl_coef > 0{given} (such responses then have a gradient)",
            True,
        )

    def numbers(self) -> Published:
        """What is set here, and the published values of what is not."""
        values = published(self.algorithm)
        given = {f.name: getattr(self, f.name, None) for f in fields(values)}
        return replace(values, **{name: v for name, v in given.items() if v is not None})

    def settled(self) -> TrainConfig:
        """The same with the published values written out."""
        numbers = self.numbers()
        own = {f.name for f in fields(self)}
        return replace(
            self, **{f.name: getattr(numbers, f.name) for f in fields(numbers) if f.name in own}
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
        at_least(0, "eval", self, "num_train_prompts", "temperature")
        at_least(1, "eval", self, "num_heldout_prompts", "num_samples", "every_steps")


@dataclass(frozen=True, slots=True)
class CheckpointConfig:
    """Resumable checkpoints, written whole or not at all.

    One is also written whenever a run ends early, by a signal or an error.

    Attributes:
        every_steps: After every so many steps; None does not count steps.
        every_minutes: After the step that ends so many minutes after the last one; later where
            writing would take more than a twentieth of the time. None does not look at the time.
        keep_last: Older ones are removed.
        at_end: Write one after the last step (its folder `model` loads with `from_pretrained`).
    """

    every_steps: int | None = None
    every_minutes: float | None = 10.0
    keep_last: int = 2
    at_end: bool = True

    def __post_init__(self) -> None:
        at_least(1, "checkpoint", self, "every_steps", "keep_last")
        minutes = self.every_minutes
        require(
            minutes is None or 0 < minutes < math.inf,
            "checkpoint.every_minutes",
            "a positive number",
            minutes,
        )


@dataclass(frozen=True, slots=True)
class LogConfig:
    """What a run writes.

    Attributes:
        run_dir: New or empty folder for config.toml, metrics.jsonl, samples.jsonl, summary.json,
            checkpoints.
        progress: "auto" shows a bar on a terminal and, elsewhere, a line every 30 seconds; "on"
            the bar anyway; "off" neither.
        samples_per_step: Rollouts of each step of the first epoch written to samples.jsonl; every
            later epoch writes those of the same prompts.
        to: "tensorboard" and "wandb": the numbers of metrics.jsonl there, too (docs/runs.md).
        wandb_project: Project of a W&B run; None is the variable WANDB_PROJECT, or spec-rollout.
    """

    run_dir: str = "runs/train"
    progress: Literal["auto", "on", "off"] = "auto"
    samples_per_step: int = 2
    to: tuple[Literal["tensorboard", "wandb"], ...] = ()
    wandb_project: str | None = None

    def __post_init__(self) -> None:
        require(self.run_dir != "", "log.run_dir", "a folder", self.run_dir)
        at_least(0, "log", self, "samples_per_step")
        require(len(set(self.to)) == len(self.to), "log.to", "each logger once", self.to)
