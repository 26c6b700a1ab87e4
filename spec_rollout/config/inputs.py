"""What a run is given: the policy, its prompts, what its responses are judged by."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from spec_rollout.config.checks import ConfigError, at_least, require


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
        lora_rank: Train LoRA matrices of this rank in float32 and leave the model's weights as they
            are (they may be 16-bit then); None trains the weights. Needs peft.
        lora_alpha: LoRA's scale is this over the rank; None is twice the rank.
        lora_targets: Names of the linear layers that get one; "all-linear" is all but the output
            head.
    """

    path: str
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "auto"
    attention: str = "sdpa"
    reference: str | None = None
    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_targets: tuple[str, ...] = ("all-linear",)

    def __post_init__(self) -> None:
        at_least(1, "model", self, "lora_rank")
        alpha = self.lora_alpha
        require(
            alpha is None or (self.lora_rank is not None and 0 < alpha < math.inf),
            "model.lora_alpha",
            "a positive finite number, with model.lora_rank",
            alpha,
        )
        require(len(self.lora_targets) > 0, "model.lora_targets", "at least one", ())


@dataclass(frozen=True, slots=True)
class DataConfig:
    """Training prompts.

    Attributes:
        path: .jsonl or .parquet file, one row per prompt; a folder of datasets' `save_to_disk`
            ("FOLDER@SPLIT"); "hub:OWNER/NAME[/FILE][:SUBSET][@SPLIT]"; or a named set
            (`loading.hub.NAMED`).
        prompt_column: Text, token ids or chat messages. "a.b" is the key b of the column a. "auto"
            recognises what it is mostly called.
        answer_column: Handed to the rewards as `answer`; None if there is none. "a.b" and "auto" as
            above.
        max_rows: Take only the first rows.
        max_prompt_tokens: Longer prompts are treated as `long_prompts` says.
        long_prompts: "error", or "drop" (told at the start and in dropped.jsonl, counted in the
            summary). The same goes for prompts that leave no room for a response.
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
    prompt_column: str = "auto"
    answer_column: str | None = "auto"
    max_rows: int | None = None
    max_prompt_tokens: int | None = None
    long_prompts: Literal["error", "drop"] = "error"
    shuffle: bool = True
    chat_template: bool | None = None
    system_prompt: str | None = None
    continue_final_message: bool = False
    template_time: str | None = None

    def __post_init__(self) -> None:
        at_least(1, "data", self, "max_rows", "max_prompt_tokens")
        require(
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
class RewardConfig:
    """Verifiable rewards.

    Attributes:
        functions: "package.module:function" each, or a built-in name (`rewards.BUILTIN`).
        weights: One per function; None weighs all 1.
        keep_special_tokens: Special tokens are part of the response that the functions get, but for
            the stop token at its end.
        folder: Where modules of `functions` are looked for first. The command `train` takes the
            folder of its config file.
        answer_seconds: Processor time for each answer that `math_verify` judges; one that takes
            longer counts as wrong.
        on_error: Of a function that raises or returns no number: "stop" ends the run, "skip" leaves
            the response out and counts it. Either names the function and the row.
    """

    functions: tuple[str, ...] = ("exact_match",)
    weights: tuple[float, ...] | None = None
    keep_special_tokens: bool = False
    folder: str | None = None
    answer_seconds: float = 5.0
    on_error: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        require(len(self.functions) >= 1, "reward.functions", "at least one", self.functions)
        require(
            self.weights is None or len(self.weights) == len(self.functions),
            "reward.weights",
            f"one per function ({len(self.functions)})",
            self.weights,
        )
        require(
            all(math.isfinite(weight) for weight in self.weights or ()),
            "reward.weights",
            "finite numbers",
            self.weights,
        )
        require(
            0 < self.answer_seconds <= 3600,
            "reward.answer_seconds",
            "more than 0 and at most 3600",
            self.answer_seconds,
        )
