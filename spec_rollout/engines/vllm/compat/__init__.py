"""The only package that reaches into vLLM.

Official hooks carry most of the plugin: the `custom_class` proposer, `worker_extension_cls`,
`additional_config` and the `vllm.general_plugins` entry point. What has no official hook is
replaced, once per process. Each replacement hands over to vLLM's own code unless the engine runs
our proposer.

- `install`: puts the replacements in, and is the entry point.
- `versions`: which vLLM will do, and the error where there is none.
- `identity`: which engines run the plugin.
- `requests`: a malformed request fails alone, before a worker sees it.
- `switch_on`: the variable SPEC_ROLLOUT, for engines that others build.
- `watching`: what a worker is told about its model.
- `sampling`: our sampler in the place of vLLM's rejection sampler.
- `workers`: a worker's proposer, and its model's weights.
- `shared_rollouts`: of which model an engine's rollouts are.
- `recurrent`: models that are refused.
- `prefix_cache`: what is computed of prompts, emptied when weights change.
- `rehearsal`, `reload`: which weights a model takes; new weights for a model in use.
- `shared_classes`: transformers' models beside an engine stay as they are.
- `llm`: an offline `LLM`, as the caller's process uses it.
- `death`: who waits for an engine that dies is told.
- `v2`: the plugin on vLLM's Model Runner V2, whose own sampler draws.
- `cpu_wheels`: defects of vLLM's builds for CPUs.

Importing this package does not import vLLM; calling its functions does.
"""

from spec_rollout.engines.vllm.compat.cpu_wheels import keep_cpu_weights
from spec_rollout.engines.vllm.compat.death import tell_of_death
from spec_rollout.engines.vllm.compat.identity import (
    PROPOSER,
    WORKER,
    check_pipeline,
    check_plugged,
    check_scheduling,
    has_peers,
    is_ours,
    noise_salt,
    noise_source,
)
from spec_rollout.engines.vllm.compat.install import (
    install,
    install_sharing,
    install_worker,
    plugin,
)
from spec_rollout.engines.vllm.compat.llm import (
    generate,
    is_in_process,
    logprobs_mode,
    model_limits,
    named_eos,
    new_llm,
    num_unfinished,
    packed_logprobs,
    runs_on_v2,
    sampling_params,
    scored_prompt_tokens,
    scoring_params,
    shut_down,
    transformers_config,
    why_no_history,
)
from spec_rollout.engines.vllm.compat.prefix_cache import check_connector, empty_prefix_cache
from spec_rollout.engines.vllm.compat.recurrent import check_state
from spec_rollout.engines.vllm.compat.rehearsal import Described, destinations
from spec_rollout.engines.vllm.compat.shared_rollouts import history_identity
from spec_rollout.engines.vllm.compat.switch_on import configured_options
from spec_rollout.engines.vllm.compat.versions import (
    NEWEST_TESTED,
    OLDEST,
    check_v2,
    check_version,
    require_vllm,
)
from spec_rollout.engines.vllm.compat.watching import attach_calls, log, watch_weights
from spec_rollout.engines.vllm.compat.workers import (
    call_of,
    finish_update,
    live_requests,
    proposer_of,
    start_update,
    weights_loaded,
)

__all__ = [
    "NEWEST_TESTED",
    "OLDEST",
    "PROPOSER",
    "WORKER",
    "Described",
    "attach_calls",
    "call_of",
    "check_connector",
    "check_pipeline",
    "check_plugged",
    "check_scheduling",
    "check_state",
    "check_v2",
    "check_version",
    "configured_options",
    "destinations",
    "empty_prefix_cache",
    "finish_update",
    "generate",
    "has_peers",
    "history_identity",
    "install",
    "install_sharing",
    "install_worker",
    "is_in_process",
    "is_ours",
    "keep_cpu_weights",
    "live_requests",
    "log",
    "logprobs_mode",
    "model_limits",
    "named_eos",
    "new_llm",
    "noise_salt",
    "noise_source",
    "num_unfinished",
    "packed_logprobs",
    "plugin",
    "proposer_of",
    "require_vllm",
    "runs_on_v2",
    "sampling_params",
    "scored_prompt_tokens",
    "scoring_params",
    "shut_down",
    "start_update",
    "tell_of_death",
    "transformers_config",
    "watch_weights",
    "weights_loaded",
    "why_no_history",
]
