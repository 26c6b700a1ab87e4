"""How an engine proposes by itself: the variable SPEC_ROLLOUT, or the engine's own config.

Nothing here imports vLLM: a launcher may check the variable before anything is started.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

VARIABLE = "SPEC_ROLLOUT"
SECTION = "spec_rollout"  # of vLLM's additional_config
PROPOSER = "spec_rollout.engines.vllm.proposer.ReuseProposer"
FIRST_CHUNK = "first_chunk"  # of that section
DEFAULT_FIRST_CHUNK = 16
# Of that section: which model runner of vLLM's the plugin is set up for.
MODEL_RUNNER = "model_runner"
MODEL_RUNNERS = ("v1", "v2")
# Model Runner V2 takes no proposer of one's own. This method of its own is the one whose speculator
# needs no model, gets the request states and keeps all token ids on the device.
V2_METHOD = "ngram_gpu"
MODES = ("off", "drafting", "coupled", "lenient")
IDENTITIES = ("request", "arrival")

# 1 + 15 tokens a request: vLLM rounds the sizes of its CUDA graphs up to multiples of that, so a
# decode step is padded to at most 15 tokens more. Few proposals are longer.
_PROPOSAL = 15
# A draft that is accepted whole takes len / (1 + n) steps.
_CHUNK = 31


def chosen_runner(environment: Mapping[str, str] | None = None) -> str:
    """The model runner that the environment tells vLLM to use, else "v1".

    V1 also on GPUs, where vLLM by itself takes V2, until V2 has run on one with the plugin. Not by
    vllm.envs, which keeps the value of when the process's first engine was made.

    Returns:
        "v1" or "v2".
    """
    values = os.environ if environment is None else environment
    return "v1" if values.get("VLLM_USE_V2_MODEL_RUNNER", "") in ("", "0") else "v2"


def section_of(additional_config: Any) -> dict[str, Any]:
    """A copy of our section of vLLM's `additional_config`; {} where it has none.

    A string is read as the variable's text is, but that nothing in it says nothing, as {} does.

    Raises:
        ValueError: if the section is neither a mapping nor a string, or the string is wrong.
    """
    if isinstance(additional_config, str):
        raise ValueError(f"additional_config: expected a mapping, got {additional_config!r:.80}")
    # vLLM takes objects of its platforms, too: they have no section of ours.
    if not isinstance(additional_config, Mapping) or SECTION not in additional_config:
        return {}
    section, source = additional_config[SECTION], f"additional_config.{SECTION}"
    if isinstance(section, str):
        options = EngineOptions.from_text(section, source=source)
        return options.as_dict() if section.strip() else {}
    if not isinstance(section, Mapping):
        raise ValueError(
            f"{source}: expected a mapping, a mode ({', '.join(MODES)}) or a JSON object, got "
            f"{section!r:.80}"
        )
    return dict(section)


def first_chunk(additional_config: Any) -> int:
    """Draft tokens of a request's first chunk, of vLLM's `additional_config`.

    Raises:
        ValueError: if `first_chunk` is no positive integer, or as `section_of`.
    """
    value = section_of(additional_config).get(FIRST_CHUNK, DEFAULT_FIRST_CHUNK)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"first_chunk: expected a positive integer, got {value!r}")
    return value


def speculative_config(num_speculative_tokens: int, model_runner: str = "v1") -> dict[str, Any]:
    """vLLM's `speculative_config` for our proposer, or, on Model Runner V2, our speculator."""
    if model_runner == "v2":
        return {"method": V2_METHOD, "num_speculative_tokens": num_speculative_tokens}
    return {
        "method": "custom_class",
        "model": PROPOSER,
        "num_speculative_tokens": num_speculative_tokens,
    }


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What an engine does with requests that do not come from `VLLMEngine`.

    Attributes:
        mode: `off`; `drafting`: proposals from what this engine generated before, lossless, for
            every request that the sampler can serve; `coupled` and `lenient`: also the sample's own
            last rollout, tested by that rule, for requests that name their sample.
        identity: Where a request does not name its sample: `request`, it has none; `arrival`, the
            k-th request for a prompt since the weights last changed is sample k.
        num_speculative_tokens: Most tokens proposed to a request in one step; 0 is the default of
            the mode (15, and 31 for `coupled` and `lenient`).
        history_bytes: Bound of all that is remembered. Below the rollouts of an epoch most are
            forgotten just before they are wanted (docs/vllm.md).
        log_lenience: Of `lenient` and `coupled`; 0 is the rule without bias for `coupled`.
        require_lossless: Refuse rules that change the distribution.
        seed: Of the noise of samples.
        log_seconds: Least time between two log lines; 0 writes none.
        lagged_tokens: On Model Runner V2: proposals are made a step late, so that scheduling stays
            asynchronous; so many tokens are planned for every request in every step, whatever is
            proposed. 0: they are made in time, and scheduling is synchronous.
        share: Folder in which engines of this machine find each other's finished rollouts, of at
            most `history_bytes`; empty: none.
    """

    mode: str = "off"
    identity: str = "request"
    num_speculative_tokens: int = 0
    history_bytes: int = 1 << 30
    log_lenience: float = 0.0
    require_lossless: bool = False
    seed: int = 0
    log_seconds: float = 60.0
    lagged_tokens: int = 0
    share: str = ""

    def __post_init__(self) -> None:
        _check_choice("mode", self.mode, MODES)
        _check_choice("identity", self.identity, IDENTITIES)
        _check_int("num_speculative_tokens", self.num_speculative_tokens, 0, 1 << 20)
        _check_int("history_bytes", self.history_bytes, 1 << 20, 1 << 50)
        _check_int("lagged_tokens", self.lagged_tokens, 0, self.max_proposal)
        _check_int("seed", self.seed, -(2**63), 2**63 - 1)
        _check_number("log_lenience", self.log_lenience, -math.inf)
        _check_number("log_seconds", self.log_seconds, 0.0)
        if not isinstance(self.share, str) or (self.share and not os.path.isabs(self.share)):
            raise ValueError(f"share: expected the absolute path of a folder, got {self.share!r}")
        if self.share and self.identity == "arrival":
            raise ValueError(
                'share: expected identity "request" with it, got "arrival": each engine counts its '
                "own requests, so two would call different samples by one number"
            )
        if not isinstance(self.require_lossless, bool):
            raise ValueError(
                f"require_lossless: expected true or false, got {self.require_lossless!r}"
            )
        biased = self.mode == "lenient" or (self.mode == "coupled" and self.log_lenience != 0.0)
        if self.require_lossless and biased:
            raise ValueError(
                "require_lossless: expected a lossless mode with it (drafting, or coupled with "
                f"log_lenience 0), got {self.mode} with log_lenience {self.log_lenience}"
            )

    @property
    def is_on(self) -> bool:
        """Whether the engine does anything by itself."""
        return self.mode != "off"

    @property
    def max_proposal(self) -> int:
        """Most tokens proposed to a request in one step."""
        if self.num_speculative_tokens:
            return self.num_speculative_tokens
        return _PROPOSAL if self.mode == "drafting" else _CHUNK

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], *, source: str) -> EngineOptions:
        """Options by name.

        Args:
            values: Option -> value; what is missing keeps its default, but for `mode`: who gives
                options and no mode wants the lossless one that needs no names, `drafting`.
            source: Where they come from; named in errors.

        Raises:
            ValueError: naming source and option.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise ValueError(
                    f"{source}: {name}: expected one of {', '.join(known)}, got an unknown option"
                )
        try:
            return cls(**{"mode": "drafting", **values})
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None

    @classmethod
    def from_text(cls, text: str, *, source: str = VARIABLE) -> EngineOptions:
        """Options as the variable has them: a mode, or a JSON object with `mode` and others.

        Raises:
            ValueError: naming source and option.
        """
        text = text.strip()
        if not text:
            return cls()
        if not text.startswith("{"):
            return cls.from_mapping({"mode": text}, source=source)
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{source}: expected a mode ({', '.join(MODES)}) or a JSON object, got "
                f"{text!r:.80} ({error})"
            ) from None
        return cls.from_mapping(values, source=source)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> EngineOptions:
        """Options in the variable SPEC_ROLLOUT; off without it.

        Raises:
            ValueError: naming the variable and the option.
        """
        values = os.environ if environment is None else environment
        return cls.from_text(values.get(VARIABLE, ""))

    def vllm_arguments(self, model_runner: str = "v1") -> dict[str, Any]:
        """Arguments of `vllm.LLM` and, as JSON, flags of `vllm serve` that say the same."""
        section = self.as_dict()
        if model_runner == "v2":
            section[MODEL_RUNNER] = "v2"
        return {
            "speculative_config": speculative_config(self.max_proposal, model_runner),
            "additional_config": {SECTION: section},
        }

    def as_dict(self) -> dict[str, Any]:
        """`mode`, and those others that are not the default, for vLLM's `additional_config`."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name == "mode" or getattr(self, field.name) != field.default
        }


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def _check_int(name: str, value: Any, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{name}: expected an integer from {least} to {most}, got {value!r}")


def _check_number(name: str, value: Any, least: float) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not least <= value < math.inf:
        raise ValueError(f"{name}: expected a finite number >= {least}, got {value!r}")
