"""Arguments that put the plugin into an engine of vLLM's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from spec_rollout.checks import integer, of_kind
from spec_rollout.engines.vllm import compat
from spec_rollout.engines.vllm.options import (
    MODEL_RUNNER,
    MODEL_RUNNERS,
    SECTION,
    chosen_runner,
    section_of,
    speculative_config,
)

ModelRunner = Literal["v1", "v2"]


def engine_args(
    num_speculative_tokens: int = 64,
    *,
    first_chunk: int | None = None,
    logprobs_mode: str | None = "processed_logprobs",
    model_runner: ModelRunner | None = None,
) -> dict[str, Any]:
    """Arguments that put the plugin into any vLLM engine: `LLM(model, **engine_args())`.

    `AsyncEngineArgs` takes the same, and `vllm serve` takes them as JSON: `--speculative-config`,
    `--worker-extension-cls`, `--logprobs-mode`, `--additional-config`.

    Args:
        num_speculative_tokens: Most draft tokens of a request that one step verifies.
        first_chunk: Draft tokens verified in a request's first chunk, which doubles with every
            chunk accepted whole; None is 16.
        logprobs_mode: vLLM's, of the log-probs that it returns. `Lenient` reads those of the
            sampling distribution: `processed_logprobs`. None leaves vLLM's default, which are those
            of temperature 1 without filters.
        model_runner: Which of vLLM's to run on; None is V2 where VLLM_USE_V2_MODEL_RUNNER=1 asks
            for it, and V1 otherwise, also on GPUs. On V2 tokens are those of vLLM's own sampler
            with the request's seed (docs/vllm.md says what else differs).

    Raises:
        ValueError: naming the argument.
        ImportError: if vLLM is missing, or too old.
    """
    for name, value in (
        ("num_speculative_tokens", num_speculative_tokens),
        ("first_chunk", 1 if first_chunk is None else first_chunk),
    ):
        if integer(name, value) < 1:
            raise ValueError(f"{name}: expected >= 1, got {value}")
    if logprobs_mode is not None:
        of_kind("logprobs_mode", logprobs_mode, str, "a mode of vLLM's or None")
    if model_runner is not None and model_runner not in MODEL_RUNNERS:
        raise ValueError(
            f"model_runner: expected one of {', '.join(MODEL_RUNNERS)} or None, "
            f"got {model_runner!r}"
        )
    vllm = compat.require_vllm("spec_rollout.engines.vllm.engine_args()")
    runner = chosen_runner() if model_runner is None else model_runner
    if runner == "v2":
        compat.check_v2(vllm.__version__)
    compat.install()
    args: dict[str, Any] = {
        "speculative_config": speculative_config(num_speculative_tokens, runner),
        "worker_extension_cls": compat.WORKER,
    }
    if logprobs_mode is not None:
        args["logprobs_mode"] = logprobs_mode
    section: dict[str, Any] = {}
    if first_chunk is not None:
        section["first_chunk"] = first_chunk
    if runner == "v2":
        section[MODEL_RUNNER] = "v2"
    if section:
        args["additional_config"] = {SECTION: section}
    return args


def merged(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of an engine: `theirs` before `ours`, and their sections `spec_rollout` as one.

    Raises:
        ValueError: naming the argument of `theirs`.
    """
    name = "additional_config"
    section = section_of(ours.get(name))
    if not section:
        return {**ours, **theirs}
    given = theirs.get(name) or {}
    if not isinstance(given, Mapping):
        raise ValueError(f"{name}: expected a mapping, got {type(given).__name__}")
    return {**ours, **theirs, name: {**given, SECTION: {**section, **section_of(given)}}}
