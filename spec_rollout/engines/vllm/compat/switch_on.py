"""The variable SPEC_ROLLOUT puts the plugin into engines that others build.

`EngineArgs.create_speculative_config` is asked once for every engine, offline, asynchronous or
server, after vLLM has loaded its general plugins and the model's config is known. Trainers that let
no engine arguments through are reached there, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from spec_rollout.engines.vllm.compat.identity import schedules_apart
from spec_rollout.engines.vllm.compat.versions import check_v2, require_vllm
from spec_rollout.engines.vllm.options import (
    FIRST_CHUNK,
    MODEL_RUNNER,
    PROPOSER,
    SECTION,
    V2_METHOD,
    VARIABLE,
    EngineOptions,
    chosen_runner,
    section_of,
)

# Keys of that section that are no `EngineOptions`.
_OTHER_KEYS = (FIRST_CHUNK, MODEL_RUNNER)
# vLLM's own short forms of keys of `speculative_config`, which it refuses beside these.
_SHORT_FORMS = {
    "method": "spec_method",
    "model": "spec_model",
    "num_speculative_tokens": "spec_tokens",
}
# Backends of vLLM's weight transfer that refuse engines with any speculation, but only when the
# first weights are sent; and who sets them. verl/workers/rollout/vllm_rollout/delta_weight_transfer
_WITHOUT_SPECULATION = {"verl_delta_ipc": "verl's checkpoint_engine.backend=delta_sharded"}


def configured_options(additional_config: Any) -> EngineOptions | None:
    """The options in an engine's `additional_config`; None if it has none of them.

    Options without a mode are those of `drafting`, as in the variable.

    Raises:
        ValueError: naming the option.
    """
    section = section_of(additional_config)
    for key in _OTHER_KEYS:
        section.pop(key, None)
    if not section:
        return None
    return EngineOptions.from_mapping(section, source=f"additional_config.{SECTION}")


def speculative_config(original: Callable) -> Callable:
    """For `EngineArgs.create_speculative_config`."""

    def create_speculative_config(self: Any, *args: Any, **kw: Any) -> Any:
        model_config = kw.get("target_model_config", args[0] if args else None)
        switch_on(self, model_config)
        return original(self, *args, **kw)

    return create_speculative_config


def switch_on(engine_args: Any, model_config: Any) -> None:
    """Gives `EngineArgs` our speculative config, if the variable or the engine's config ask for it.

    Args:
        engine_args: vLLM's `EngineArgs`; changed in place.
        model_config: vLLM's `ModelConfig` of the model.

    Raises:
        ValueError: where the engine has another speculative method, a pipeline, asynchronous
            scheduling, a weight transfer that goes with no speculation, or shares rollouts between
            tensor parallel ranks or on Model Runner V2, or is to propose late on V1 or there has a
            scheduler for each tensor parallel rank, or an `additional_config` that is no mapping,
            or an option is wrong.
    """
    options = configured_options(engine_args.additional_config)
    source = f"additional_config.{SECTION}"
    if options is None:
        options, source = EngineOptions.from_environment(), VARIABLE
    if not options.is_on:
        return
    from vllm.logger import init_logger

    logger = init_logger("vllm.plugins.spec_rollout")
    asked = f"{source}={options.mode}"
    if getattr(model_config, "runner_type", "generate") != "generate":
        logger.info("%s: off for %s, which generates nothing", asked, model_config.model)
        return
    if engine_args.async_scheduling and not options.lagged_tokens:
        raise ValueError(
            f"{asked}: expected an engine without async_scheduling, got True: what is proposed is "
            "known when a step's tokens are"
        )
    if options.lagged_tokens and engine_args.async_scheduling is False:
        raise ValueError(
            f"{asked}: lagged_tokens: expected an engine with async_scheduling, got False: without "
            "it proposals need not be late"
        )
    if engine_args.pipeline_parallel_size > 1:
        raise ValueError(
            f"{asked}: expected pipeline_parallel_size 1, got {engine_args.pipeline_parallel_size}"
        )
    if options.share and engine_args.tensor_parallel_size > 1:
        raise ValueError(
            f"{asked}: share: expected tensor_parallel_size 1 with it, got "
            f"{engine_args.tensor_parallel_size}: its ranks have to draft alike in every step, and "
            "would each find what others share at another moment"
        )
    if engine_args.logits_processors:
        raise ValueError(
            f"{asked}: expected an engine without logits_processors, which vLLM allows together "
            f"with no speculation, got {len(engine_args.logits_processors)}"
        )
    backend = getattr(getattr(engine_args, "weight_transfer_config", None), "backend", None)
    if backend in _WITHOUT_SPECULATION:
        raise ValueError(
            f"{asked}: expected a weight transfer that goes with speculation, got {backend} "
            f"({_WITHOUT_SPECULATION[backend]}), which refuses it when the first weights are sent: "
            "choose another, or leave out the variable"
        )
    additional = engine_args.additional_config or {}
    if not isinstance(additional, Mapping):
        raise ValueError(
            f"{asked}: additional_config: expected a mapping, got {type(additional).__name__}"
        )
    section = section_of(additional)
    given = _folded(engine_args)
    method, model = given.get("method"), given.get("model")
    is_for_v2 = method == V2_METHOD and section.get(MODEL_RUNNER) == "v2"
    if given.keys() == {"num_speculative_tokens"}:
        raise ValueError(
            f"{asked}: expected an engine without speculative_config, got num_speculative_tokens "
            f"{given['num_speculative_tokens']}; leave it out, and say it beside the mode, by the "
            "option of that name"
        )
    if given and model != PROPOSER and not is_for_v2:
        raise ValueError(
            f"{asked}: expected an engine without speculative_config, got one with method "
            f"{method or model}; leave out one of the two"
        )
    runner = "v2" if is_for_v2 else chosen_runner()
    if runner == "v2":
        check_v2(require_vllm(asked).__version__)
    if options.share and runner == "v2":
        raise ValueError(f"{asked}: share: expected Model Runner V1 with it, got V2")
    if options.lagged_tokens and runner != "v2":
        raise ValueError(f"{asked}: lagged_tokens: expected Model Runner V2 with it, got V1")
    if runner == "v1" and schedules_apart(engine_args):
        raise ValueError(
            f"{asked}: tensor_parallel_size: expected 1 with distributed_executor_backend "
            f"external_launcher on Model Runner V1, got {engine_args.tensor_parallel_size}: each "
            "rank schedules for itself, and would propose another number of tokens"
        )
    args = options.vllm_arguments(runner)
    if given and not is_for_v2 and runner == "v2":
        key = "num_speculative_tokens"
        args["speculative_config"][key] = given.get(key, options.max_proposal)
        given = {}
    engine_args.speculative_config = given or args["speculative_config"]
    engine_args.additional_config = {
        **additional,
        SECTION: {**section, **args["additional_config"][SECTION]},
    }
    if runner == "v2":
        engine_args.async_scheduling = options.lagged_tokens > 0
    logger.info(
        "%s: requests are proposed what this engine generated before, up to %d tokens a step, on "
        "Model Runner %s%s",
        asked,
        # The engine's own, where it has our config already.
        engine_args.speculative_config.get("num_speculative_tokens", options.max_proposal),
        runner.upper(),
        "" if options.mode != "lenient" else " (lenient: not lossless)",
    )


def _folded(engine_args: Any) -> dict[str, Any]:
    """The `speculative_config` of `EngineArgs` with vLLM's short forms, which are taken away.

    One that is given in both forms stays, and is vLLM's to refuse.
    """
    given = engine_args.speculative_config or {}
    folded = {name.replace("-", "_"): value for name, value in given.items()}
    for key, name in _SHORT_FORMS.items():
        value = getattr(engine_args, name, None)
        if value is not None and key not in folded:
            folded[key] = value
            setattr(engine_args, name, None)
    return folded
