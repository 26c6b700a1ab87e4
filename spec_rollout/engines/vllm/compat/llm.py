"""An offline `LLM`, as the caller's process uses it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from spec_rollout.engines.vllm.compat.cpu_wheels import threads_kept
from spec_rollout.engines.vllm.compat.identity import is_v2, schedules_apart
from spec_rollout.packed import ranges
from spec_rollout.types import SamplingParams


def new_llm(model: str, llm_args: Mapping[str, Any]) -> Any:
    """`vllm.LLM(model, **llm_args)`; the number of torch's threads can still be set afterwards."""
    from vllm import LLM

    with threads_kept():
        return LLM(model, **llm_args)


def shut_down(llm: Any) -> None:
    """Stops the engine of an `LLM` and its processes."""
    llm.llm_engine.engine_core.shutdown()


def model_limits(llm: Any) -> tuple[int, int]:
    """Most tokens of prompt and response together, and the size of the vocabulary."""
    config = llm.llm_engine.vllm_config.model_config
    return config.max_model_len, config.get_vocab_size()


def transformers_config(llm: Any) -> tuple[Any, bool]:
    """The model's configuration, and whether code that comes with the model may be run."""
    config = llm.llm_engine.vllm_config.model_config
    return config.hf_config, bool(config.trust_remote_code)


def named_eos(llm: Any) -> tuple[Any, Any]:
    """What the model's configurations, of generation and of the model, have as `eos_token_id`: an
    id, several, or None."""
    config = llm.llm_engine.vllm_config.model_config
    generation = config.try_get_generation_config()
    return generation.get("eos_token_id"), getattr(config.hf_text_config, "eos_token_id", None)


def why_no_history(llm: Any) -> str | None:
    """With what of an `LLM` with the plugin nothing can be proposed from a history; None: it can.

    What was proposed then is not known where the next step is planned, or not the same on all ranks
    that plan it.
    """
    config = llm.llm_engine.vllm_config
    if runs_on_v2(llm):
        return "asynchronous scheduling" if config.scheduler_config.async_scheduling else None
    if schedules_apart(config.parallel_config):
        num_ranks = config.parallel_config.tensor_parallel_size
        return f"external_launcher and tensor_parallel_size {num_ranks}"
    return None


def is_in_process(llm: Any) -> bool:
    """Whether the worker that an `LLM` calls runs in this process: tensors need not travel to it.

    An engine core of this process may have its workers in others.
    """
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    return isinstance(getattr(core, "model_executor", None), UniProcExecutor)


def num_unfinished(llm: Any) -> int:
    """Requests that an `LLM` has been given and not finished, whoever gave them."""
    return int(llm.llm_engine.get_num_unfinished_requests())


def logprobs_mode(llm: Any) -> str:
    """Of which distribution vLLM's own log-probs are."""
    return str(llm.llm_engine.vllm_config.model_config.logprobs_mode)


def sampling_params(
    sampling: SamplingParams,
    *,
    max_tokens: int,
    prompt_logprobs: int | None,
    extra_args: dict[str, Any],
    logprobs: bool = False,
) -> Any:
    """vLLM's parameters of one request; only `stop_token_ids` and `max_tokens` end it.

    `logprobs`: as `packed_logprobs` reads them.
    """
    from vllm import SamplingParams as VLLMSamplingParams

    return VLLMSamplingParams(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        max_tokens=max_tokens,
        stop_token_ids=list(sampling.stop_token_ids),
        ignore_eos=True,
        detokenize=False,
        prompt_logprobs=prompt_logprobs,
        logprobs=0 if logprobs else None,
        flat_logprobs=logprobs,
        extra_args=extra_args,
    )


def packed_logprobs(completions: Sequence[Any]) -> tuple[bytes, bytes, bytes]:
    """Log-probs of responses, as `Collector.take` has them: the first three of its arrays.

    Args:
        completions: vLLM's, of requests with `sampling_params(logprobs=True)`.
    """
    rows, indices, values = b"", b"", b""
    if completions:
        flats = [completion.logprobs for completion in completions]
        known = [np.asarray(f.logprobs, "<f4")[np.asarray(f.start_indices, int)] for f in flats]
        lens = np.array([part.size for part in known])
        rows = np.repeat(np.arange(lens.size, dtype="<i4"), lens).tobytes()
        indices = ranges(lens).astype("<i4").tobytes()
        values = np.concatenate(known).tobytes()
    return rows, indices, values


def runs_on_v2(llm: Any) -> bool:
    """Whether an `LLM` runs the plugin on vLLM's Model Runner V2."""
    return is_v2(llm.llm_engine.vllm_config)


def scoring_params() -> Any:
    """vLLM's parameters of a request that only wants the log-probs of its prompt."""
    from vllm import SamplingParams as VLLMSamplingParams

    return VLLMSamplingParams(
        max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False, ignore_eos=True
    )


def scored_prompt_tokens(output: Any, first: int) -> np.ndarray:
    """Log-probs of the prompt's tokens from `first` on, of a request with `scoring_params`.

    [num_tokens], float32.
    """
    flat = output.prompt_logprobs
    return np.asarray(flat.logprobs, np.float32)[flat.start_indices[first:]]


def generate(
    llm: Any,
    prompts: Sequence[Mapping[str, Any]],
    params: Any,
    before_step: Callable[[], None] | None = None,
) -> list[Any]:
    """`LLM.generate`, with `before_step` called before every step of the engine.

    An exception on the way aborts all requests of the engine.
    """
    with _interruptible(llm, before_step):
        return llm.generate(prompts, params, use_tqdm=False)


@contextmanager
def _interruptible(llm: Any, before_step: Callable[[], None] | None) -> Iterator[None]:
    """Aborts all requests where the block raises.

    vLLM alone would finish them in the next call, and mix up their outputs with its own.
    """
    engine = llm.llm_engine
    original = engine.step
    if before_step is not None:
        call = before_step

        def step() -> Any:
            call()
            return original()

        engine.step = step
    try:
        yield
    except BaseException:
        engine.abort_request(list(engine.output_processor.request_states), internal=True)
        raise
    finally:
        if before_step is not None:
            engine.step = original
