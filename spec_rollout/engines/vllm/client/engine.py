"""vLLM as a rollout engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

import torch

from spec_rollout.acceptance import AcceptanceRule
from spec_rollout.engines.eos import eos_token_ids
from spec_rollout.engines.vllm import compat
from spec_rollout.engines.vllm.client.arguments import ModelRunner, engine_args, merged
from spec_rollout.engines.vllm.client.requests import Job, Responses, check_requests
from spec_rollout.engines.vllm.client.two_pass import check_two_pass, two_pass
from spec_rollout.engines.vllm.client.weights import Weights
from spec_rollout.engines.vllm.metrics import ReuseMetrics
from spec_rollout.engines.vllm.options import V2_METHOD
from spec_rollout.engines.vllm.packed_history import pack_history
from spec_rollout.types import RolloutRequests, Rollouts, SamplingParams

Strategy = Literal["inflight", "two_pass"]

# Weights go to worker processes in pieces of about this many bytes.
_BUCKET_BYTES = 64 << 20


class VLLMEngine:
    """A `RolloutEngine` on an offline vLLM `LLM`, which it starts itself.

    `VLLMEngine.wrap` makes one of an `LLM` that exists already. Strategies:

    - `inflight`: drafts are verified by the engine step that writes their KV cache, chunk by chunk,
      and generation goes on in place. One request per rollout.
    - `two_pass`: the published design (SPEC-RL) on the same engine, as a baseline: the draft is
      scored as part of a prompt, cut, and the accepted prefix submitted as the prompt of a second
      request, which finds its KV cache by prefix caching. `Lenient` at temperature 1 without
      filters only: vLLM's prompt log-probs are raw.

    Args:
        model: Folder or name of the model, as vLLM takes it.
        strategy: See above.
        num_speculative_tokens, first_chunk, model_runner: See `engine_args`.
        llm_args: Further arguments of `vllm.LLM`, as `{"max_model_len": 4096}`; they take
            precedence, and their `additional_config` is joined with the plugin's. On Model Runner
            V2 `{"async_scheduling": True}` schedules as vLLM does by itself, and proposes nothing
            from a history.

    Attributes:
        llm: The `LLM`.
        metrics, last_metrics: Counters of all calls of `rollout`, and of the last one.
        before_step: Called before each engine step of a rollout; what it raises aborts the rollout.

    Raises:
        ValueError: naming the argument.
        ImportError: if vLLM is missing, or too old.
    """

    def __init__(
        self,
        model: str,
        *,
        strategy: Strategy = "inflight",
        num_speculative_tokens: int = 64,
        first_chunk: int | None = None,
        llm_args: Mapping[str, Any] | None = None,
        model_runner: ModelRunner | None = None,
    ) -> None:
        _check_strategy(strategy)
        compat.require_vllm("VLLMEngine")
        plugin = engine_args(
            num_speculative_tokens, first_chunk=first_chunk, model_runner=model_runner
        )
        defaults = {
            "skip_tokenizer_init": True,
            "generation_config": "vllm",
            "disable_log_stats": True,
        }
        if plugin["speculative_config"]["method"] == V2_METHOD:
            defaults["async_scheduling"] = False  # a history wants it so
        llm = compat.new_llm(model, merged({**defaults, **plugin}, llm_args or {}))
        try:
            compat.check_plugged(llm)  # which `llm_args` may have undone
            self._take_over(llm, strategy, owns_llm=True)
        except BaseException:
            compat.shut_down(llm)
            raise

    @classmethod
    def wrap(cls, llm: Any, *, strategy: Strategy = "inflight") -> VLLMEngine:
        """An engine on a `vllm.LLM` that exists already, as a trainer has it.

        The `LLM` is shared: others may go on using it between rollouts, `close` leaves it running,
        and weights that others put into it do not count in `policy_version`.

        Args:
            llm: Started with `engine_args()`: `LLM(model, **engine_args())`.
            strategy: See `VLLMEngine`.

        Raises:
            ValueError: naming the argument, and what the `LLM` was started without.
        """
        _check_strategy(strategy)
        compat.check_plugged(llm)
        engine = cls.__new__(cls)
        engine._take_over(llm, strategy, owns_llm=False)
        return engine

    def _take_over(self, llm: Any, strategy: Strategy, *, owns_llm: bool) -> None:
        compat.tell_of_death(llm)
        self.llm = llm
        self.strategy = strategy
        self._owns_llm = owns_llm
        self._on_v2 = compat.runs_on_v2(llm)
        self._no_history = f"the strategy {strategy}" if strategy != "inflight" else None
        if self._no_history is None:
            self._no_history = compat.why_no_history(llm)
        if self._on_v2 and strategy != "inflight":
            raise ValueError(
                f"strategy: expected inflight on vLLM's Model Runner V2, got {strategy}"
            )
        mode = compat.logprobs_mode(llm)
        if self._on_v2 and mode != "processed_logprobs":
            raise ValueError(
                "logprobs_mode: expected processed_logprobs on vLLM's Model Runner V2, got "
                f"{mode}: log-probs of rollouts are vLLM's own there, and those would not be of "
                "the distribution that is sampled from"
            )
        self.max_model_len, self.vocab_size = compat.model_limits(llm)
        self.metrics = ReuseMetrics()
        self.last_metrics = ReuseMetrics()
        self.before_step: Callable[[], None] | None = None
        self._policy_version = 0
        self._weights: Weights | None = None
        self._half_updated: set[str] = set()  # weights of an update that failed on its way
        self._keeps_old_prompts = False  # the prefix cache, of weights that are gone

    @property
    def policy_version(self) -> int:
        """Number of `update_weights` calls so far."""
        return self._policy_version

    @property
    def supports_history(self) -> bool:
        """Whether `RolloutRequests.history` is taken."""
        return self._no_history is None

    @property
    def last_counters(self) -> ReuseMetrics:
        """Those of the last rollout; in a log they are `vllm_*`."""
        return self.last_metrics

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens with which the model ends a text, by its configurations; none ends a response here
        that is not among `SamplingParams.stop_token_ids`."""
        return eos_token_ids(*compat.named_eos(self.llm))

    def rollout(
        self, requests: RolloutRequests, sampling: SamplingParams, acceptance: AcceptanceRule
    ) -> Rollouts:
        """Generates one response per request (see `RolloutEngine.rollout`).

        A draft ends with its first stop token and is cut to `max_tokens`. Prompt and response
        together never exceed `max_model_len`.

        Raises:
            ValueError: naming the argument, before anything is computed.
            RuntimeError: if the `LLM` has unfinished requests of others, or the last weights did
                not arrive whole, or the prefix cache still has what older ones computed.
            vllm.v1.engine.exceptions.EngineDeadError: if the engine's process dies meanwhile.
        """
        limits = [sampling.max_tokens] * requests.batch
        return self.rollout_with_limits(requests, sampling, acceptance, limits)

    def rollout_with_limits(
        self,
        requests: RolloutRequests,
        sampling: SamplingParams,
        acceptance: AcceptanceRule,
        limits: Sequence[int],
    ) -> Rollouts:
        """`rollout`, with a limit of its own for each response.

        `limits` [batch] take the place of `sampling.max_tokens`.
        """
        start = time.perf_counter()
        if requests.history is not None and self._no_history is not None:
            raise ValueError(f"history: expected None with {self._no_history}, got one")
        check_requests(
            requests,
            sampling,
            acceptance,
            vocab_size=self.vocab_size,
            max_model_len=self.max_model_len,
        )
        if len(limits) != requests.batch or min(limits, default=1) < 1:
            raise ValueError(
                f"limits: expected {requests.batch} numbers >= 1, got {list(limits)[:8]}"
            )
        job = Job.of(requests, sampling, acceptance, limits, self.max_model_len)
        # Without drafts there is nothing to score: one plain pass.
        in_two_passes = self.strategy == "two_pass" and job.drafts.token_ids.numel() > 0
        if in_two_passes:
            check_two_pass(sampling, acceptance)
        self._begin(requests, sampling)
        try:
            if in_two_passes:
                responses, verification_seconds = two_pass(
                    job,
                    sampling,
                    generate=self.generate,
                    submit=self.submit,
                    max_model_len=self.max_model_len,
                )
            else:
                responses, verification_seconds = self.generate(job, sampling), 0.0
        except BaseException:
            with suppress(Exception):  # it may have been the engine that failed
                self._end()
            raise
        packing = time.perf_counter()
        metrics = self._end()
        self.metrics += metrics
        self.last_metrics = metrics
        stats = responses.stats(job.drafts, metrics)
        stats.verification_seconds = verification_seconds
        stats.decode_seconds = packing - start - verification_seconds
        rollouts = responses.pack(requests, self._policy_version, stats)
        end = time.perf_counter()
        stats.assembly_seconds = end - packing
        stats.rollout_seconds = end - start
        return rollouts

    def generate(self, job: Job, sampling: SamplingParams) -> Responses:
        """Runs one batch of requests to the end and gathers what the workers recorded."""
        # vLLM begins them in the order in which they come.
        order = range(job.batch) if job.order is None else job.order
        params, prompts = [self._params(job, row, sampling) for row in order], job.prompts()
        outputs = self.submit([prompts[row] for row in order], params)
        completions: list[Any] = [None] * job.batch
        for row, output in zip(order, outputs, strict=True):
            completions[row] = output.outputs[0]
        collected = self._take()
        if self._on_v2:  # whose worker keeps no log-probs: they come with the tokens
            collected = (*compat.packed_logprobs(completions), *collected[3:])
        return Responses.of(job, completions, collected)

    def submit(self, prompts: list[dict[str, list[int]]], params: Any) -> list[Any]:
        """`LLM.generate`; an exception on the way leaves no request behind."""
        return compat.generate(self.llm, prompts, params, self.before_step)

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copies new weights into the workers' model in place and resets the prefix cache.

        What a KV connector offloads (`kv_offloading_size`) is reset with it. The first call tries
        the checkpoint's names on vLLM's model, which writes nothing.

        Args:
            named_tensors: Names and shapes of the model's state dict in transformers, or of the
                checkpoint; of the same model wrapped (torch.compile, DataParallel), or merged by
                peft. Not all need be given, but of a layer that vLLM fuses (query, key and value;
                all experts) all or none. All tensors are held until the call returns.

        Raises:
            ValueError: naming the first weight that is unknown, repeated or of another shape, an
                adapter's, one that vLLM has no place for, or a layer given in part; or a KV
                connector that cannot be reset. Nothing is written then.
            RuntimeError: if the prefix cache cannot be reset because requests are running: before
                anything is written, unless they came meanwhile.
        """
        compat.check_connector(self.llm)
        if self._weights is None:
            config, trusted = compat.transformers_config(self.llm)
            self._weights = Weights(
                config, trust_remote_code=trusted, destinations=self._destinations
            )
        update = self._weights.ready(named_tensors)
        # Tells whether requests run. A connector is emptied once: twice between two steps is too
        # much for vLLM's own.
        self._empty_prefix_cache(connector=False)
        names = {name for name, _ in update}
        failed_before = self._half_updated
        self._half_updated = failed_before | names  # until the last call below
        self._keeps_old_prompts = True
        self.llm.collective_rpc("spec_rollout_start_update")
        try:
            for bucket in self._buckets(update):
                self.llm.collective_rpc("spec_rollout_load", args=(bucket,))
            self.llm.collective_rpc("spec_rollout_finish_update")
        except BaseException:
            with suppress(Exception):
                self.llm.collective_rpc("spec_rollout_abort_update")
            raise
        self._half_updated = set() if names >= failed_before else failed_before
        self._policy_version += 1
        self._empty_prefix_cache()

    def _empty_prefix_cache(self, *, connector: bool = True) -> None:
        if not compat.empty_prefix_cache(self.llm, connector=connector):
            raise RuntimeError(
                "prefix cache: expected no running requests at a weight update (nor transfers of "
                "a KV connector), got some"
            )
        if connector:
            self._keeps_old_prompts = False

    def _destinations(self, weights: list[compat.Described]) -> dict[str, Any]:
        answers = self.llm.collective_rpc("spec_rollout_destinations", args=(weights,))
        layers: dict[str, list[str]] = {}
        for answer in answers:  # of the ranks of a pipeline each has other layers
            if "error" in answer:
                return answer
            layers.update(answer["layers"])
        return {"layers": layers, "partial": answers[0]["partial"]}

    def _buckets(self, update: list[tuple[str, torch.Tensor]]) -> Iterator[list[tuple[str, Any]]]:
        in_process = compat.is_in_process(self.llm)
        bucket: list[tuple[str, Any]] = []
        num_bytes = 0
        for name, tensor in update:
            bucket.append((name, tensor if in_process else _as_bytes(tensor)))
            num_bytes += tensor.nbytes
            if num_bytes >= _BUCKET_BYTES:
                yield bucket
                bucket, num_bytes = [], 0
        if bucket:
            yield bucket

    def sleep(self, level: int = 1) -> None:
        """Frees the accelerator's memory between rollouts; needs vLLM's `enable_sleep_mode`."""
        self.llm.sleep(level=level)

    def wake_up(self) -> None:
        """Inverse of `sleep`."""
        self.llm.wake_up()

    def close(self) -> None:
        """Stops vLLM and its processes; an `LLM` that was wrapped goes on running."""
        if self._owns_llm:
            compat.shut_down(self.llm)

    def _params(self, job: Job, row: int, sampling: SamplingParams) -> Any:
        return compat.sampling_params(
            sampling,
            max_tokens=job.limits[row],
            prompt_logprobs=job.prompt_logprobs,
            extra_args=job.extra_args(row),
            logprobs=self._on_v2,
        )

    def _begin(self, requests: RolloutRequests, sampling: SamplingParams) -> None:
        if others := compat.num_unfinished(self.llm):  # their outputs would come among ours
            raise RuntimeError(
                f"llm: expected no unfinished requests at a rollout, got {others}, as of an "
                "enqueue() or of a generate() that was interrupted; let them finish "
                "(llm.wait_for_completion()) or abort them"
            )
        if self._half_updated:
            raise RuntimeError(
                "weights: expected a whole update after one that failed on its way, got none that "
                f"has {min(self._half_updated)!r} and the {len(self._half_updated) - 1} others"
            )
        if self._keeps_old_prompts:
            self._empty_prefix_cache()
        history = None if requests.history is None else pack_history(requests.history)
        stops = list(sampling.stop_token_ids)
        keyed = sampling.temperature > 0  # greedy decoding knows no noise
        self.llm.collective_rpc("spec_rollout_begin", args=(requests.batch, history, stops, keyed))

    def _end(self) -> ReuseMetrics:
        return ReuseMetrics.from_dict(self.llm.collective_rpc("spec_rollout_end")[0])

    def _take(self) -> tuple[bytes, ...]:
        return tuple(self.llm.collective_rpc("spec_rollout_take")[0])

    def _take_metrics(self) -> ReuseMetrics:
        return ReuseMetrics.from_dict(
            self.llm.collective_rpc("spec_rollout_metrics", args=(True,))[0]
        )


def _check_strategy(strategy: str) -> None:
    if strategy not in ("inflight", "two_pass"):
        raise ValueError(f"strategy: expected 'inflight' or 'two_pass', got {strategy!r}")


def _as_bytes(tensor: torch.Tensor) -> tuple[str, list[int], bytes]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    flat = tensor.cpu().contiguous().view(-1).view(torch.uint8)
    return dtype, list(tensor.shape), flat.numpy().tobytes()


__all__ = ["VLLMEngine", "engine_args"]
